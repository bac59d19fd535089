"""ReMax: the greedy response is the baseline."""

import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.on_policy import Credit, Priced, gradient_loss, needs, targets_of, to_go
from jaxrlhf.config.on_policy import ReMaxConfig
from jaxrlhf.errors import InputError
from jaxrlhf.types import Array


def remax(config: ReMaxConfig) -> Algorithm:
    """REINFORCE with the score of the policy's own greedy response subtracted (arXiv:2310.10505).

    The loop samples that response once a prompt: ``baseline_B`` [B], reward units, the same in all
    samples of a prompt. A baseline that depends on the prompt alone leaves the gradient unbiased.
    """

    def credit(priced: Priced, baseline_B: Array | None = None) -> Credit:
        if baseline_B is None:
            raise InputError("baseline_B=None: remax needs the scores of the greedy responses")
        advantage_BT = to_go(priced.reward_BT, priced.mask_BT) - baseline_B[:, None]
        known_B = jnp.isfinite(baseline_B)
        advantage_BT = masked.fill(advantage_BT, priced.mask_BT * known_B[:, None])
        return Credit(advantage_BT)

    return Algorithm(
        targets_of(config, credit), gradient_loss(config), needs=needs(config, "greedy")
    )
