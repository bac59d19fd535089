"""REINFORCE, with and without a baseline."""

import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.on_policy import learnable, needs, penalised, price, to_go
from jaxrlhf.algorithms.policy_losses import policy_gradient_loss
from jaxrlhf.config.on_policy import ReinforceConfig
from jaxrlhf.types import Array, Batch, Outputs, Rollout


def reinforce(config: ReinforceConfig) -> Algorithm:
    """Loss −Σ_t log π(a_t|s_t)·(G_t − b), G_t = Σ_{s≥t} γ^{s−t} r_s (Williams 1992).

    b is 0, or with ``baseline: mean`` the mean over responses of the return of their first token: a
    constant, so the gradient stays unbiased up to the 1/B that a response has in its own baseline.
    """

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
    ) -> tuple[Batch, Metrics]:
        priced = price(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients)
        advantage_BT = to_go(priced.reward_BT, priced.mask_BT, config.gamma)
        if config.baseline == "mean":
            first_B = masked.sum(advantage_BT, _first(priced.mask_BT), axis=1)
            baseline = masked.mean(first_B, priced.mask_BT.any(1))
            advantage_BT = masked.fill(advantage_BT - baseline, priced.mask_BT)
        return jax.lax.stop_gradient((learnable(config, priced, advantage_BT), priced.metrics))

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        total, metrics = policy_gradient_loss(
            outputs.logp_BT, batch.advantage_BT, batch.mask_BT, weight_BT=batch.weight_BT
        )
        return penalised(config, total, metrics, outputs, batch)

    return Algorithm(targets, loss, needs=needs(config))


def _first(mask_BT: Array) -> Array:
    """bool [B, T], True in the column of each row's first token."""
    return (mask_BT != 0) & (jnp.cumsum(mask_BT != 0, axis=1) == 1)
