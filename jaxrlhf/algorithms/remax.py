"""ReMax: the greedy response is the baseline."""

import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.on_policy import learnable, needs, penalised, price, to_go
from jaxrlhf.algorithms.policy_losses import policy_gradient_loss
from jaxrlhf.config.on_policy import ReMaxConfig
from jaxrlhf.errors import InputError
from jaxrlhf.types import Array, Batch, Outputs, Rollout


def remax(config: ReMaxConfig) -> Algorithm:
    """REINFORCE with the score of the policy's own greedy response subtracted (arXiv:2310.10505).

    The loop samples that response once a prompt: ``baseline_B`` [B], reward units, the same in all
    samples of a prompt. A baseline that depends on the prompt alone leaves the gradient unbiased.
    """

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
        baseline_B: Array | None = None,
    ) -> tuple[Batch, Metrics]:
        priced = price(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients)
        if baseline_B is None:
            raise InputError("baseline_B=None: remax needs the scores of the greedy responses")
        advantage_BT = to_go(priced.reward_BT, priced.mask_BT) - baseline_B[:, None]
        known_B = jnp.isfinite(baseline_B)
        advantage_BT = masked.fill(advantage_BT, priced.mask_BT * known_B[:, None])
        return jax.lax.stop_gradient((learnable(config, priced, advantage_BT), priced.metrics))

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        total, metrics = policy_gradient_loss(
            outputs.logp_BT, batch.advantage_BT, batch.mask_BT, weight_BT=batch.weight_BT
        )
        return penalised(config, total, metrics, outputs, batch)

    return Algorithm(targets, loss, needs=needs(config, "greedy"))
