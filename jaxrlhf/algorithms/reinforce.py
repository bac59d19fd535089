"""REINFORCE, with and without a baseline."""

import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.on_policy import Credit, Priced, gradient_loss, needs, targets_of, to_go
from jaxrlhf.config.on_policy import ReinforceConfig
from jaxrlhf.types import Array


def reinforce(config: ReinforceConfig) -> Algorithm:
    """Loss −Σ_t log π(a_t|s_t)·(G_t − b), G_t = Σ_{s≥t} γ^{s−t} r_s (Williams 1992).

    b is 0, or with ``baseline: mean`` the mean over responses of the return of their first token: a
    constant, so the gradient stays unbiased up to the 1/B that a response has in its own baseline.
    """

    def credit(priced: Priced) -> Credit:
        advantage_BT = to_go(priced.reward_BT, priced.mask_BT, config.gamma)
        if config.baseline == "mean":
            first_B = masked.sum(advantage_BT, _first(priced.mask_BT), axis=1)
            baseline = masked.mean(first_B, priced.mask_BT.any(1))
            advantage_BT = masked.fill(advantage_BT - baseline, priced.mask_BT)
        return Credit(advantage_BT)

    return Algorithm(targets_of(config, credit), gradient_loss(config), needs=needs(config))


def _first(mask_BT: Array) -> Array:
    """bool [B, T], True in the column of each row's first token."""
    return (mask_BT != 0) & (jnp.cumsum(mask_BT != 0, axis=1) == 1)
