"""The critic's regression."""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Metrics
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array


def value_loss(
    value_BT: Array,
    old_value_BT: Array,
    return_BT: Array,
    mask_BT: Array,
    clip: Array | float | None = 0.2,
    weight_BT: Array | None = None,
) -> tuple[Array, Metrics]:
    """½·Σ weight·max((V − R)², (V_old + clip(V − V_old, ±clip) − R)²) (arXiv:1707.06347's code).

    Args:
      value_BT: [B, T], V(tokens < t), reward units.
      old_value_BT: [B, T], the critic's estimate when the rollout was scored.
      return_BT: [B, T], targets. No gradient flows into either of these two.
      mask_BT: [B, T], non-zero on the tokens that learn; the other columns are never read.
      clip: how far V may move before its loss stops falling, reward units; None: freely.
      weight_BT: [B, T], as made by ``masked.weights``; None: mean over tokens.

    Returns:
      The loss, and sums under the weights: ``value_clip_fraction`` (tokens where clipping changed
      the loss), ``value_mean``, ``return_mean``, ``return_sq``, ``value_error_sq``, ``weight``.
      From these, each divided by ``weight``, explained variance = 1 − (value_error_sq −
      (return_mean − value_mean)²) / (return_sq − return_mean²).
    """
    inputs = [value_BT, old_value_BT, return_BT, mask_BT]
    chex.assert_rank(inputs, 2)
    chex.assert_equal_shape(inputs)
    weight_BT = masked.weights(mask_BT) if weight_BT is None else masked.fill(weight_BT, mask_BT)
    value_BT = masked.fill(value_BT, mask_BT)
    old_value_BT = jax.lax.stop_gradient(masked.fill(old_value_BT, mask_BT))
    return_BT = jax.lax.stop_gradient(masked.fill(return_BT, mask_BT))

    error_BT = (value_BT - return_BT) ** 2
    loss_BT = error_BT
    if clip is not None:
        near_BT = jnp.clip(value_BT, old_value_BT - clip, old_value_BT + clip)
        loss_BT = jnp.maximum(error_BT, (near_BT - return_BT) ** 2)
    return 0.5 * (weight_BT * loss_BT).sum(), {
        "value_clip_fraction": (weight_BT * (loss_BT != error_BT)).sum(),
        "value_mean": (weight_BT * value_BT).sum(),
        "return_mean": (weight_BT * return_BT).sum(),
        "return_sq": (weight_BT * return_BT**2).sum(),
        "value_error_sq": (weight_BT * error_BT).sum(),
        "weight": weight_BT.sum(),
    }
