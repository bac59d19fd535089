"""A penalty on length, in tokens, as a source of reward."""

import chex
import jax.numpy as jnp

from jaxrlhf.types import Array


def length_penalty(mask_BT: Array, start: int, end: int) -> Array:
    """−clip((n − start)/(end − start), 0, 1) of responses of n tokens.

    0 up to ``start`` tokens, falling linearly to −1 at ``end``; that of DAPO (arXiv:2503.14476,
    equation 13) has ``end`` at the longest response that can be sampled.

    Args:
      mask_BT: [B, T], 1 on the response's tokens, stop token included.
      start, end: tokens, start < end.

    Returns:
      float32 [B], from −1 to 0, reward units.
    """
    chex.assert_rank(mask_BT, 2)
    count_B = (mask_BT != 0).sum(1).astype(jnp.float32)
    return -jnp.clip((count_B - start) / (end - start), 0, 1)
