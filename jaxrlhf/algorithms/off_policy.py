"""Weights for learning from tokens that another distribution drew."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.kl import bounded_exp
from jaxrlhf.types import Array


def importance_weights(
    logp_BT: Array,
    behaviour_logp_BT: Array,
    mask_BT: Array,
    level: Literal["token", "sequence"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    cap: float = 2.0,
) -> Array:
    """w = π/μ, bounded: π the policy that the loss is written for, μ the one that sampled.

    Levels: ``token`` takes each token's own ratio: low variance, biased, because what the policies
    think of the other tokens is left out. ``sequence`` gives all tokens of a row exp of the *sum*
    of its log-ratios, the row's exact ratio: unbiased before it is bounded, and soon at its bounds
    in long rows. The geometric mean (``ratio="sequence"`` of ``ppo_policy_loss``) is that ratio's
    root, to the number of tokens: it stays near 1 and is no importance weight.

    Modes: ``truncate`` is min(w, cap) (V-trace's ρ, Espeholt et al. 2018, arXiv:1802.01561; TIS,
    Yao et al. 2025, fengyao.notion.site/off-policy-rl). ``mask`` is w where 1/cap ≤ w ≤ cap, else
    0: a token on which the two disagree teaches nothing (IcePop, arXiv:2510.18855), though a mean
    over tokens still counts it.

    Args:
      logp_BT: [B, T], nats, log π of each token.
      behaviour_logp_BT: [B, T], nats, log μ of the same tokens; ``Rollout.sample_logp_BT``.
      mask_BT: [B, T], non-zero on the tokens that learn; the other columns are never read.
      level, mode: see above.
      cap: the largest weight, a Python number; > 0, and ≥ 1 with ``mask``.

    Returns:
      float32 [B, T], without gradient; 0 where the mask is 0. A factor of a policy loss's
      advantage or ``weight_BT``.

    Raises:
      ValueError: if ``level`` or ``mode`` is not one of its names, or ``cap`` is out of range.
    """
    chex.assert_rank([logp_BT, behaviour_logp_BT, mask_BT], 2)
    chex.assert_equal_shape([logp_BT, behaviour_logp_BT, mask_BT])
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode={mode!r}: choose truncate or mask")
    if not cap > 0 or (mode == "mask" and cap < 1):
        raise ValueError(f"cap={cap}: must be > 0, and at least 1 with mode='mask'")
    logp_BT, behaviour_logp_BT = (
        jax.lax.stop_gradient(masked.fill(x, mask_BT)) for x in (logp_BT, behaviour_logp_BT)
    )
    log_ratio_BT = logp_BT - behaviour_logp_BT
    if level == "sequence":
        sum_B1 = log_ratio_BT.sum(1, keepdims=True)
        log_ratio_BT = jnp.broadcast_to(sum_B1, log_ratio_BT.shape)
    elif level != "token":
        raise ValueError(f"level={level!r}: choose token or sequence")
    weight_BT = bounded_exp(log_ratio_BT)
    if mode == "truncate":
        weight_BT = jnp.minimum(weight_BT, cap)
    else:
        weight_BT = jnp.where((weight_BT >= 1 / cap) & (weight_BT <= cap), weight_BT, 0)
    return masked.fill(weight_BT, mask_BT)
