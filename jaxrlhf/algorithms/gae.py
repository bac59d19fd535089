"""Generalised advantage estimation."""

import chex
import jax
import jax.numpy as jnp

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
    chex.assert_rank([reward_BT, value_BT, mask_BT], 2)
    chex.assert_equal_shape([reward_BT, value_BT, mask_BT])
    mask_BT = mask_BT != 0
    reward_BT, value_BT = masked.fill(reward_BT, mask_BT), masked.fill(value_BT, mask_BT)

    def step(carry, column):
        advantage_B, next_value_B = carry
        reward_B, value_B, mask_B = column
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = jnp.where(mask_B, delta_B + gamma * lam * advantage_B, advantage_B)
        return (advantage_B, jnp.where(mask_B, value_B, next_value_B)), advantage_B

    bootstrap_B = jnp.broadcast_to(jnp.asarray(bootstrap_B, jnp.float32), reward_BT.shape[:1])
    columns = (reward_BT.T, value_BT.T, mask_BT.T)
    _, advantage_TB = jax.lax.scan(
        step, (jnp.zeros_like(bootstrap_B), bootstrap_B), columns, reverse=True
    )
    advantage_BT = masked.fill(advantage_TB.T, mask_BT)
    return jax.lax.stop_gradient((advantage_BT, advantage_BT + value_BT))


def explained_variance(value_BT: Array, return_BT: Array, mask_BT: Array) -> Array:
    """1 − Var(R − V) / Var(R) over ``mask_BT``: 1 for a perfect critic, 0 for a constant one.

    Float32 scalar; 0 where the returns do not vary at all. Shapes are [B, T].
    """
    chex.assert_equal_shape([value_BT, return_BT, mask_BT])
    spread = masked.variance(return_BT, mask_BT)
    left = masked.variance(return_BT - value_BT, mask_BT)
    return jnp.where(spread > 0, 1 - left / jnp.where(spread > 0, spread, 1), 0)
