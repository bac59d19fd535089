"""Advantages relative to the other samples of the same prompt: no critic.

Rows are prompt-major, so ``reward_B.reshape(Q, G)`` is the argument of the functions.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.core import masked
from jaxrlhf.core.types import Array


def group_advantage(
    reward_QG: Array,
    mask_QG: Array | None = None,
    scale: Literal["std", "none"] = "std",
    eps: float = 1e-6,
) -> Array:
    """(r − mean) / (std + eps) within each group (GRPO; arXiv:2402.03300).

    The standard deviation is unbiased (ddof 1). ``scale="none"`` only subtracts the mean
    (Dr.GRPO; arXiv:2503.20783).

    Args:
      reward_QG: [Q, G], reward units; a row of G samples answers one prompt.
      mask_QG: [Q, G], non-zero where the reward is known; None: everywhere. A reward that is not
        finite counts as unknown in any case.
      eps: added to the standard deviation, reward units.

    Returns:
      float32 [Q, G], without gradient; 0 where the reward is unknown, in a group with fewer than
      two known rewards, and in one whose rewards are equal.

    Raises:
      ValueError: if ``scale`` is not one of its names.
    """
    reward_QG, mask_QG = _known(reward_QG, mask_QG)
    centred_QG = masked.centre(reward_QG, mask_QG, axis=1)
    if scale == "none":
        return centred_QG
    if scale != "std":
        raise ValueError(f"scale={scale!r}: choose std or none")
    return centred_QG / (jnp.sqrt(masked.variance(reward_QG, mask_QG, axis=1))[:, None] + eps)


def each_advantage(
    score_SQG: Array, weight_S: Array, mask_QG: Array | None = None, eps: float = 1e-6
) -> Array:
    """Σ_s weight_s · (r_s − mean) / (std + eps) of each source within each group.

    The first half of GDPO (arXiv:2601.05242): normalised one by one, rewards of different scales
    weigh as their weights say, and two samples differ wherever one of their rewards does, even
    where the sums are equal. ``batch_advantage`` is the second half.

    Args:
      score_SQG: [S, Q, G], unweighted, reward units; not finite where a source does not apply.
      weight_S: [S].
      mask_QG: [Q, G], non-zero on the rows that count; None: all.

    Returns:
      float32 [Q, G], without gradient. A source adds 0 where ``group_advantage`` of it is 0, over
      the rows of the group that it applies to.
    """
    chex.assert_rank(score_SQG, 3)
    advantage_SQG = jax.vmap(lambda x_QG: group_advantage(x_QG, mask_QG, eps=eps))(score_SQG)
    return (advantage_SQG * jnp.asarray(weight_S, jnp.float32)[:, None, None]).sum(0)


def batch_advantage(advantage_QG: Array, mask_QG: Array, eps: float = 1e-6) -> Array:
    """(A − mean) / (std + eps) over all groups, standard deviation unbiased (ddof 1).

    Args:
      advantage_QG: [Q, G].
      mask_QG: [Q, G], non-zero on the rows that count.

    Returns:
      float32 [Q, G], without gradient; 0 elsewhere, and everywhere if fewer than two rows count.
    """
    advantage_QG = jax.lax.stop_gradient(advantage_QG)
    spread = jnp.sqrt(masked.variance(advantage_QG, mask_QG))
    return masked.centre(advantage_QG, mask_QG) / (spread + eps)


def rloo_advantage(reward_QG: Array, mask_QG: Array | None = None) -> Array:
    """r − mean of the *other* rewards of the group (REINFORCE leave-one-out; arXiv:2402.14740).

    Arguments and result as in ``group_advantage``, reward units.
    """
    reward_QG, mask_QG = _known(reward_QG, mask_QG)
    # r − (Σ − r)/(n − 1) = (r − Σ/n)·n/(n − 1), so the group's own mean does
    count_Q1 = mask_QG.sum(1, keepdims=True)
    return masked.centre(reward_QG, mask_QG, axis=1) * count_Q1 / jnp.maximum(count_Q1 - 1, 1)


def _known(reward_QG: Array, mask_QG: Array | None) -> tuple[Array, Array]:
    """Rewards without their gradient, and the bool mask of those that are known."""
    chex.assert_rank(reward_QG, 2)
    reward_QG = jax.lax.stop_gradient(reward_QG)
    known_QG = jnp.isfinite(reward_QG)
    if mask_QG is not None:
        chex.assert_equal_shape([reward_QG, mask_QG])
        known_QG &= mask_QG != 0
    return reward_QG, known_QG
