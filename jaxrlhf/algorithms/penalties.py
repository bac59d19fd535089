"""What is taken off a score for a response that was cut off, or is long."""

import jax.numpy as jnp

from jaxrlhf.config.on_policy import OnPolicyConfig
from jaxrlhf.types import Array, Rollout


def score_penalty(config: OnPolicyConfig, rollout: Rollout) -> Array:
    """``missing_eos_penalty`` and ``overlong_penalty`` of each response, float32 [B], reward units.

    Samples pay it, and so does whatever else they are compared with.
    """
    penalty_B = jnp.where(rollout.ended_B, 0, jnp.float32(config.missing_eos_penalty))
    if config.overlong_buffer:
        penalty_B += overlong_penalty(rollout.mask_BT, config.overlong_buffer)
    return penalty_B


def overlong_penalty(mask_BT: Array, buffer: int) -> Array:
    """Soft penalty on length, in tokens: 0 up to N − buffer, then linear up to 1 at N.

    max(0, length − (N − buffer)) / buffer (DAPO; arXiv:2503.14476, equation 13), where N is the
    most tokens that a response can have.

    Args:
      mask_BT: [B, T], 1 on the response's tokens; the first column of any response is that of all.
      buffer: tokens, at least 1.

    Returns:
      float32 [B], from 0 to 1, reward units.
    """
    mask_BT = mask_BT != 0
    most = mask_BT.shape[1] - jnp.argmax(mask_BT.any(0))
    return jnp.clip((mask_BT.sum(1) - (most - buffer)) / buffer, 0, 1)
