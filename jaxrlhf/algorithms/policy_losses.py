"""Policy-gradient losses: each is Σ weight·(token loss), float32, additive over rows."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Metrics, check_shapes
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
    weight_BT = _weights(mask_BT, aggregation, length, weight_BT)
    logp_BT, old_logp_BT, advantage_BT = _read(mask_BT, logp_BT, old_logp_BT, advantage_BT)
    log_ratio_BT = logp_BT - old_logp_BT
    if ratio == "sequence":
        # log ρ of a row: its mean in value, each token's own log-prob in gradient
        mean_B1 = masked.mean(log_ratio_BT, mask_BT, axis=1)[:, None]
        log_ratio_BT = jax.lax.stop_gradient(mean_B1) + (logp_BT - jax.lax.stop_gradient(logp_BT))
    elif ratio != "token":
        raise ValueError(f"ratio={ratio!r}: choose token or sequence")
    ratio_BT = masked.fill(bounded_exp(log_ratio_BT), mask_BT, 1.0)

    free_BT = -ratio_BT * advantage_BT
    clipped_BT = -jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high) * advantage_BT
    # the larger loss of the two: clipping takes away what would be gained, never what is lost
    loss_BT = jnp.maximum(free_BT, clipped_BT)
    if dual_clip is not None:
        # where A > 0 the loss is negative, so the bound acts on A < 0 alone
        loss_BT = jnp.minimum(loss_BT, dual_clip * jnp.abs(advantage_BT))
    metrics = _ratio_metrics(loss_BT != free_BT, ratio_BT, logp_BT, old_logp_BT, mask_BT, weight_BT)
    return (weight_BT * loss_BT).sum(), metrics


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
    weight_BT = _weights(mask_BT, aggregation, length, weight_BT)
    logp_BT, old_logp_BT, advantage_BT = _read(mask_BT, logp_BT, old_logp_BT, advantage_BT)
    ratio_BT = jax.lax.stop_gradient(bounded_exp(logp_BT - old_logp_BT))
    ratio_BT = masked.fill(ratio_BT, mask_BT, 1.0)
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    clip_BT = clipped_BT != ratio_BT
    metrics = _ratio_metrics(clip_BT, ratio_BT, logp_BT, old_logp_BT, mask_BT, weight_BT)
    return -(weight_BT * clipped_BT * advantage_BT * logp_BT).sum(), metrics


def policy_gradient_loss(
    logp_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    aggregation: Aggregation = "token",
    weight_BT: Array | None = None,
) -> tuple[Array, Metrics]:
    """−Σ weight·log π·A: minus the utility whose gradient is the policy gradient (REINFORCE, A2C).

    Arguments as in ``ppo_policy_loss``; ``aggregation="sequence_sum"`` is the textbook's.

    Returns:
      The loss, and sums under the weights: ``logp`` (nats) and ``weight``.
    """
    weight_BT = _weights(mask_BT, aggregation, None, weight_BT)
    logp_BT, advantage_BT = _read(mask_BT, logp_BT, advantage_BT)
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


def _weights(
    mask_BT: Array, aggregation: Aggregation, length: int | None, weight_BT: Array | None
) -> Array:
    if weight_BT is None:
        return masked.weights(mask_BT, aggregation, length)
    return masked.fill(weight_BT, mask_BT)


def _read(mask_BT: Array, logp_BT: Array, *target_BT: Array) -> list[Array]:
    """Log-probs and targets, 0 under the mask; no gradient flows into the targets."""
    check_shapes(2, logp_BT, *target_BT, mask_BT)
    # filled before anything is computed: a NaN times a weight of 0 would still be a NaN
    filled = [masked.fill(x_BT, mask_BT) for x_BT in (logp_BT, *target_BT)]
    return [filled[0], *jax.lax.stop_gradient(filled[1:])]


def _ratio_metrics(
    clip_BT: Array,
    ratio_BT: Array,
    logp_BT: Array,
    old_logp_BT: Array,
    mask_BT: Array,
    weight_BT: Array,
) -> Metrics:
    return {
        "clip_fraction": (weight_BT * clip_BT).sum(),
        # π_old drew the tokens, so it comes first
        "approx_kl": (weight_BT * kl_estimate(old_logp_BT, logp_BT, "k3")).sum(),
        "weight": weight_BT.sum(),
        "ratio_max": jnp.max(ratio_BT, where=mask_BT != 0, initial=0),
    }
