"""The critic: generalised advantage estimation, and the loss that its values learn by."""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Metrics, check_shapes
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array


def gae(
    reward_BT: Array,
    value_BT: Array,
    mask_BT: Array,
    gamma: Array | float,
    lam: Array | float,
    bootstrap_B: Array | float = 0,
) -> tuple[Array, Array]:
    """A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V(s_{t+1}) − V(s_t) (arXiv:1506.02438).

    The response may have gaps (tokens that a tool wrote): the recursion steps over columns where
    the mask is 0, so "t+1" is the next token that the policy wrote, and whatever such columns hold
    is never read. Padding on either side leaves the results equal bit for bit.

    Args:
      reward_BT: [B, T], reward units.
      value_BT: [B, T], V(tokens < t): the value of the state in which token t is chosen.
      mask_BT: [B, T], non-zero on the tokens that the policy wrote.
      gamma: discount a token.
      lam: λ; 0 is one-step temporal difference, 1 is return minus value.
      bootstrap_B: [B] or scalar, the value of the state after the last token; 0 if it ended there.

    Returns:
      advantage_BT and return_BT = advantage + value, float32 [B, T], 0 where the mask is 0. No
      gradient flows through either.
    """
    check_shapes(2, reward_BT, value_BT, mask_BT)
    mask_BT = mask_BT != 0
    reward_BT, value_BT = masked.fill(reward_BT, mask_BT), masked.fill(value_BT, mask_BT)

    def step(carry, column):
        advantage_B, next_value_B = carry
        reward_B, value_B, mask_B = column
        delta_B = reward_B + gamma * next_value_B - value_B
        # a gap hands both on as they are: the token before it bootstraps from the one after it
        advantage_B = jnp.where(mask_B, delta_B + gamma * lam * advantage_B, advantage_B)
        return (advantage_B, jnp.where(mask_B, value_B, next_value_B)), advantage_B

    bootstrap_B = jnp.broadcast_to(jnp.asarray(bootstrap_B, jnp.float32), reward_BT.shape[:1])
    columns = (reward_BT.T, value_BT.T, mask_BT.T)
    _, advantage_TB = jax.lax.scan(
        step, (jnp.zeros_like(bootstrap_B), bootstrap_B), columns, reverse=True
    )
    advantage_BT = masked.fill(advantage_TB.T, mask_BT)
    return jax.lax.stop_gradient((advantage_BT, advantage_BT + value_BT))


def to_go(reward_BT: Array, mask_BT: Array, gamma: float = 1.0) -> Array:
    """Σ over this and later tokens of γᵏ·r, float32 [B, T], 0 where the mask is 0."""
    # with V = 0 every δ is a reward, and with λ = 1 GAE adds them all up
    return gae(reward_BT, jnp.zeros(reward_BT.shape), mask_BT, gamma, 1.0)[0]


def explained_variance(value_BT: Array, return_BT: Array, mask_BT: Array) -> Array:
    """1 − Var(R − V) / Var(R) over ``mask_BT``: 1 for a perfect critic, 0 for a constant one.

    Float32 scalar; 0 where the returns do not vary at all. Shapes are [B, T].
    """
    check_shapes(2, value_BT, return_BT, mask_BT)
    spread = masked.variance(return_BT, mask_BT)
    left = masked.variance(return_BT - value_BT, mask_BT)
    return jnp.where(spread > 0, 1 - left / jnp.where(spread > 0, spread, 1), 0)


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
    check_shapes(2, value_BT, old_value_BT, return_BT, mask_BT)
    weight_BT = masked.weights(mask_BT) if weight_BT is None else masked.fill(weight_BT, mask_BT)
    value_BT, old_value_BT, return_BT = (
        masked.fill(x, mask_BT) for x in (value_BT, old_value_BT, return_BT)
    )
    old_value_BT, return_BT = jax.lax.stop_gradient((old_value_BT, return_BT))

    error_BT = (value_BT - return_BT) ** 2
    loss_BT = error_BT
    if clip is not None:
        near_BT = jnp.clip(value_BT, old_value_BT - clip, old_value_BT + clip)
        # the larger of the two: progress beyond the clip earns nothing, a step back costs in full
        loss_BT = jnp.maximum(error_BT, (near_BT - return_BT) ** 2)
    return 0.5 * (weight_BT * loss_BT).sum(), {
        "value_clip_fraction": (weight_BT * (loss_BT != error_BT)).sum(),
        "value_mean": (weight_BT * value_BT).sum(),
        "return_mean": (weight_BT * return_BT).sum(),
        "return_sq": (weight_BT * return_BT**2).sum(),
        "value_error_sq": (weight_BT * error_BT).sum(),
        "weight": weight_BT.sum(),
    }
