"""Policy-gradient losses: each is Σ weight·(token loss), float32, additive over rows."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Metrics
from jaxrlhf.algorithms.kl import bounded_exp, kl_estimate
from jaxrlhf.config.algorithms import Aggregation
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array


def ppo_policy_loss(
    logp_BT: Array,
    old_logp_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    clip_low: Array | float = 0.2,
    clip_high: Array | float = 0.2,
    dual_clip: Array | float | None = None,
    aggregation: Aggregation = "token",
    length: int | None = None,
    ratio: Literal["token", "sequence"] = "token",
    weight_BT: Array | None = None,
) -> tuple[Array, Metrics]:
    """Σ weight · max(−ρ·A, −clip(ρ, 1 − clip_low, 1 + clip_high)·A) (PPO; arXiv:1707.06347).

    ρ = π/π_old, a token's (``ratio="token"``) or its whole row's geometric mean over tokens
    (``"sequence"``; GSPO, arXiv:2507.18071, which averages with ``aggregation="sequence"``);
    unequal clips are DAPO's (arXiv:2503.14476). ``dual_clip=c`` bounds the token loss by c·|A|
    where A < 0 (arXiv:1912.09729). A ratio beyond e²⁰ is continued linearly (``bounded_exp``).

    Args:
      logp_BT: [B, T], nats, log π of each token under the policy that learns.
      old_logp_BT: [B, T], nats, under the policy that sampled.
      advantage_BT: [B, T]. No gradient flows into it, nor into ``old_logp_BT``.
      mask_BT: [B, T], non-zero on the tokens that learn; the other columns are never read.
      clip_low, clip_high: how far the ratio may fall below and rise above 1.
      dual_clip: c > 1, or None.
      aggregation, length: as in ``masked.weights``.
      weight_BT: [B, T], ready-made weights (of a whole minibatch, of which this may be a part);
        ``aggregation`` and ``length`` are then not read.

    Returns:
      The loss, and sums under the weights: ``clip_fraction`` (tokens where clipping changed the
      loss), ``approx_kl`` (k3 of KL(π_old‖π), nats), ``weight``; and ``ratio_max``.

    Raises:
      ValueError: if ``ratio`` or ``aggregation`` is not one of its names.
    """
    chex.assert_rank([logp_BT, old_logp_BT, advantage_BT, mask_BT], 2)
    chex.assert_equal_shape([logp_BT, old_logp_BT, advantage_BT, mask_BT])
    weight_BT = _weights(mask_BT, aggregation, length, weight_BT)
    logp_BT = masked.fill(logp_BT, mask_BT)
    old_logp_BT = jax.lax.stop_gradient(masked.fill(old_logp_BT, mask_BT))
    advantage_BT = jax.lax.stop_gradient(masked.fill(advantage_BT, mask_BT))
    log_ratio_BT = _log_ratio(logp_BT, old_logp_BT, mask_BT, ratio)
    ratio_BT = masked.fill(bounded_exp(log_ratio_BT), mask_BT, 1.0)

    free_BT = -ratio_BT * advantage_BT
    clipped_BT = -jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high) * advantage_BT
    loss_BT = jnp.maximum(free_BT, clipped_BT)
    if dual_clip is not None:
        loss_BT = jnp.minimum(loss_BT, dual_clip * jnp.abs(advantage_BT))  # A > 0: loss < 0
    kl_BT = kl_estimate(old_logp_BT, logp_BT, "k3")
    return (weight_BT * loss_BT).sum(), {
        "clip_fraction": (weight_BT * (loss_BT != free_BT)).sum(),
        "approx_kl": (weight_BT * kl_BT).sum(),
        "weight": weight_BT.sum(),
        "ratio_max": jnp.max(ratio_BT, where=mask_BT != 0, initial=0),
    }


def cispo_loss(
    logp_BT: Array,
    old_logp_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    clip_low: Array | float = 1.0,
    clip_high: Array | float = 0.2,
    aggregation: Aggregation = "token",
    length: int | None = None,
    weight_BT: Array | None = None,
) -> tuple[Array, Metrics]:
    """−Σ weight·sg(clip(ρ, 1 − clip_low, 1 + clip_high))·A·log π (CISPO; arXiv:2506.13585).

    Arguments and metrics as in ``ppo_policy_loss``; ``clip_fraction`` counts the tokens whose
    weight was clipped, which still learn.
    """
    chex.assert_rank([logp_BT, old_logp_BT, advantage_BT, mask_BT], 2)
    chex.assert_equal_shape([logp_BT, old_logp_BT, advantage_BT, mask_BT])
    weight_BT = _weights(mask_BT, aggregation, length, weight_BT)
    logp_BT, old_logp_BT, advantage_BT = (
        masked.fill(x, mask_BT) for x in (logp_BT, old_logp_BT, advantage_BT)
    )
    old_logp_BT, advantage_BT = jax.lax.stop_gradient((old_logp_BT, advantage_BT))
    ratio_BT = jax.lax.stop_gradient(bounded_exp(logp_BT - old_logp_BT))
    ratio_BT = masked.fill(ratio_BT, mask_BT, 1.0)
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    return -(weight_BT * clipped_BT * advantage_BT * logp_BT).sum(), {
        "clip_fraction": (weight_BT * (clipped_BT != ratio_BT)).sum(),
        "approx_kl": (weight_BT * kl_estimate(old_logp_BT, logp_BT, "k3")).sum(),
        "weight": weight_BT.sum(),
        "ratio_max": jnp.max(ratio_BT, where=mask_BT != 0, initial=0),
    }


def policy_gradient_loss(
    logp_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    aggregation: Aggregation = "token",
    weight_BT: Array | None = None,
) -> tuple[Array, Metrics]:
    """−Σ weight·log π·A: minus the utility whose gradient is the policy gradient (REINFORCE, A2C).

    Args:
      logp_BT: [B, T], nats.
      advantage_BT: [B, T]; no gradient flows into it.
      mask_BT: [B, T], non-zero on the tokens that learn; the other columns are never read.
      aggregation: as in ``masked.weights``; ``sequence_sum`` is the textbook's.
      weight_BT: [B, T], ready-made weights; ``aggregation`` is then not read.

    Returns:
      The loss, and sums under the weights: ``logp`` (nats) and ``weight``.
    """
    chex.assert_rank([logp_BT, advantage_BT, mask_BT], 2)
    chex.assert_equal_shape([logp_BT, advantage_BT, mask_BT])
    weight_BT = _weights(mask_BT, aggregation, None, weight_BT)
    logp_BT = masked.fill(logp_BT, mask_BT)
    advantage_BT = jax.lax.stop_gradient(masked.fill(advantage_BT, mask_BT))
    loss = -(weight_BT * logp_BT * advantage_BT).sum()
    return loss, {"logp": (weight_BT * logp_BT).sum(), "weight": weight_BT.sum()}


def entropy_bonus(entropy_BT: Array, mask_BT: Array, weight_BT: Array) -> Array:
    """Σ weight·H, nats, float32 scalar: subtract it from a loss to keep the policy open.

    Args:
      entropy_BT: [B, T], nats, entropy of the distribution that each token was drawn from.
      mask_BT: [B, T], non-zero on the tokens that count; the other columns are never read.
      weight_BT: [B, T], as made by ``masked.weights``.
    """
    chex.assert_equal_shape([entropy_BT, mask_BT, weight_BT])
    return (masked.fill(weight_BT, mask_BT) * masked.fill(entropy_BT, mask_BT)).sum()


def _log_ratio(logp_BT: Array, old_logp_BT: Array, mask_BT: Array, ratio: str) -> Array:
    """log ρ; a row's is its mean in value and each token's own log-prob in gradient."""
    if ratio == "token":
        return logp_BT - old_logp_BT
    if ratio != "sequence":
        raise ValueError(f"ratio={ratio!r}: choose token or sequence")
    mean_B1 = masked.mean(logp_BT - old_logp_BT, mask_BT, axis=1)[:, None]
    return jax.lax.stop_gradient(mean_B1) + (logp_BT - jax.lax.stop_gradient(logp_BT))


def _weights(
    mask_BT: Array, aggregation: Aggregation, length: int | None, weight_BT: Array | None
) -> Array:
    if weight_BT is None:
        return masked.weights(mask_BT, aggregation, length)
    return masked.fill(weight_BT, mask_BT)
