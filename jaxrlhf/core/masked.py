"""Means, sums and whitening over a mask: the only place that divides by ``mask.sum()``.

Masked-out elements never matter: they are replaced before anything is computed from them, so a
NaN, an inf or a huge value under a 0 of the mask changes neither a result nor a gradient.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array


def fill(x: Array, mask: Array, value: float = 0.0) -> Array:
    """``x`` where ``mask`` is non-zero, ``value`` elsewhere; float32, same shape."""
    chex.assert_equal_shape([x, mask])
    # where, not x·mask: NaN · 0 is NaN, in the value and in the gradient.
    return jnp.where(mask != 0, x.astype(jnp.float32), jnp.float32(value))


def sum(x: Array, mask: Array, axis: int | None = None) -> Array:
    """Σ x over ``mask``, float32."""
    return fill(x, mask).sum(axis)


def mean(x: Array, mask: Array, axis: int | None = None) -> Array:
    """Σ x·mask / Σ mask, float32; 0 where nothing is selected."""
    count = (mask != 0).sum(axis)
    return sum(x, mask, axis) / jnp.maximum(count, 1)


def centre(x: Array, mask: Array, axis: int | None = None) -> Array:
    """x − mean over ``mask`` (along ``axis``), 0 elsewhere; float32, same shape."""
    # Twice: the first mean is rounded, and what it leaves on equal elements would look like a
    # spread once it is divided by its own standard deviation.
    for _ in range(2):
        mean_x = mean(x, mask, axis)
        x = fill(x - (mean_x if axis is None else jnp.expand_dims(mean_x, axis)), mask)
    return x


def variance(x: Array, mask: Array, axis: int | None = None) -> Array:
    """Unbiased variance (ddof 1) over ``mask``; 0 if fewer than two elements are selected."""
    count = (mask != 0).sum(axis)
    return (centre(x, mask, axis) ** 2).sum(axis) / jnp.maximum(count - 1, 1)


def whiten(x: Array, mask: Array, shift_mean: bool = True, eps: float = 1e-8) -> Array:
    """(x − mean) / √(var + eps) over ``mask``, 0 elsewhere.

    The variance is unbiased. ``shift_mean=False`` adds the mean back: scale without moving, for
    rewards, whose sign means something. One selected element, or equal ones, give 0 (or the mean),
    never NaN. Statistics are over the whole array, so under ``jit`` on a mesh they are global.

    Args:
      x: any shape, in any unit; the result has the same shape, in standard deviations, float32.
      mask: same shape, non-zero on the elements that count.
    """
    # eps inside the root: where all are equal, (x − mean)/√eps is 0 and its gradient finite.
    scaled = centre(x, mask) * jax.lax.rsqrt(variance(x, mask) + eps)
    return scaled if shift_mean else fill(scaled + mean(x, mask), mask)


def weights(mask_BT: Array, aggregation: str = "token", length: int | None = None) -> Array:
    """The weight of each token, so that Σ weight·x is the mean that ``aggregation`` names.

    - ``token``: mean over all tokens of the batch (DAPO; arXiv:2503.14476).
    - ``sequence``: mean over rows of the mean over the row's tokens (GRPO; arXiv:2402.03300).
    - ``sequence_sum``: mean over rows of the sum over the row's tokens: the policy gradient itself.
    - ``fixed``: sum over tokens / (rows · ``length``) (Dr.GRPO; arXiv:2503.20783); ``length`` in
      tokens, T if None.

    Rows without a single token count for nothing: neither in the sum nor in the number of rows.
    Computed over the whole minibatch, the weights make losses additive over rows, so
    microbatches and devices simply add up.

    Args:
      mask_BT: [B, T], non-zero on the tokens that count.

    Returns:
      float32 [B, T], 0 where the mask is 0.

    Raises:
      ValueError: if ``aggregation`` is not one of the four names.
    """
    chex.assert_rank(mask_BT, 2)
    mask_BT = (mask_BT != 0).astype(jnp.float32)
    tokens_B1 = mask_BT.sum(1, keepdims=True)
    rows = jnp.maximum((tokens_B1 > 0).sum(), 1)
    # No divisor is below 1: a batch without a single token weighs 0, not NaN.
    match aggregation:
        case "token":
            return mask_BT / jnp.maximum(tokens_B1.sum(), 1)
        case "sequence":
            return mask_BT / (jnp.maximum(tokens_B1, 1) * rows)
        case "sequence_sum":
            return mask_BT / rows
        case "fixed":
            return mask_BT / (rows * (mask_BT.shape[1] if length is None else length))
    raise ValueError(f"aggregation={aggregation!r}: choose token, sequence, sequence_sum or fixed")
