"""ReMax: the greedy response is the baseline."""

import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.on_policy import Credit, Priced, gradient_loss, needs, targets_of, to_go
from jaxrlhf.algorithms.penalties import score_penalty
from jaxrlhf.config.on_policy import OnPolicyConfig, ReMaxConfig
from jaxrlhf.errors import InputError
from jaxrlhf.types import Array, Batch, Rollout


def remax(config: ReMaxConfig) -> Algorithm:
    """REINFORCE with the score of the policy's own greedy response subtracted (arXiv:2310.10505).

    The loop samples that response once a prompt: ``baseline_B`` [B], see ``greedy_baseline``, the
    same in all samples of a prompt. A baseline that depends on the prompt alone leaves the gradient
    unbiased. Rows whose baseline is not finite are left out, as those without a reward are.
    """

    def credit(priced: Priced, baseline_B: Array) -> Credit:
        advantage_BT = to_go(priced.reward_BT, priced.mask_BT) - baseline_B[:, None]
        return Credit(masked.fill(advantage_BT, priced.mask_BT))

    compared = targets_of(config, credit)

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
        baseline_B: Array | None = None,
    ) -> tuple[Batch, Metrics]:
        if baseline_B is None:
            raise InputError("baseline_B=None: remax needs the scores of the greedy responses")
        valid_B = (valid_B != 0) & jnp.isfinite(baseline_B)
        return compared(rollout, ref_logp_BT, reward_B, valid_B, coefficients, baseline_B)

    return Algorithm(targets, gradient_loss(config), needs=needs(config, "greedy"))


def greedy_baseline(config: OnPolicyConfig, greedy: Rollout, reward_Q: Array, n: int) -> Array:
    """The scores of the greedy responses less their penalties, as samples pay them; float32 [Q·n].

    Args:
      greedy: a response to each of Q prompts.
      reward_Q: their scores; NaN where there is none.
      n: samples of each prompt that are compared with them.
    """
    return jnp.repeat(reward_Q.astype(jnp.float32) - score_penalty(config, greedy), n)
