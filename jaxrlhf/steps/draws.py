"""From logits to a token: truncation, and an exact draw that costs little and shards well."""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.config import SampleConfig
from jaxrlhf.sharding import DECODE, constrain, vocab_shards
from jaxrlhf.types import Array

BLOCK = 256
"""Tokens that share one Gumbel variable at the first level of a draw."""


def draw(key_B: Array, logits_BV: Array) -> Array:
    """One token a row with Pr(v) ∝ exp(logits_v), by the Gumbel-max trick on two levels.

    argmax_j [logsumexp(block j) + Gumbel_j] is an exact draw of a block of 256 tokens, and
    argmax_v [logits_v + Gumbel_v] within it an exact draw of a token, at V/256 + 256 Gumbels a row
    instead of V. A token with logit −inf is never drawn, and logits that differ by rounding give
    the same token unless two candidates tie to that rounding (unlike an inverse CDF).

    Under a mesh the blocks are split over ``tensor``, −inf ones added until they divide, which
    changes no draw; a device sends the mass of its blocks, and of the block drawn its tokens.

    Args:
      key_B: one PRNG key a row.
      logits_BV: float32 [B, V], unnormalised; −inf forbids a token.

    Returns:
      int32 [B].
    """
    chex.assert_rank(logits_BV, 2)
    width = logits_BV.shape[1]
    blocks = -(-width // BLOCK)
    more = -(-blocks // vocab_shards()) * vocab_shards()
    padding = ((0, 0), (0, more * BLOCK - width))
    padded = jnp.pad(logits_BV.astype(jnp.float32), padding, constant_values=-jnp.inf)
    padded = constrain(padded, ("batch", "vocab"), DECODE)
    block_BJV = padded.reshape(-1, more, BLOCK)
    mass_BJ = jax.nn.logsumexp(block_BJV, axis=2)[:, :blocks]
    mass_BJ = constrain(mass_BJ, ("batch", None), DECODE)

    def choose(key: Array, mass: Array) -> tuple[Array, Array]:
        outer, inner = jax.random.split(key)
        return jnp.argmax(mass + jax.random.gumbel(outer, (blocks,))), inner

    block_B, inner_B = jax.vmap(choose)(key_B, mass_BJ)
    chosen_BV = jnp.take_along_axis(block_BJV, block_B[:, None, None], axis=1)[:, 0]
    chosen_BV = constrain(chosen_BV, ("batch", None), DECODE)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (BLOCK,)))(inner_B)
    token_B = jnp.argmax(chosen_BV + noise_BV, axis=1)
    return (block_B * BLOCK + token_B).astype(jnp.int32)


def truncate(logits_BV: Array, config: SampleConfig) -> Array:
    """Forbid (−inf) what top-k, top-p and min-p leave out, in this order; logits [B, V].

    - ``top_k``: only the k likeliest tokens stay (ties with the k-th stay too).
    - ``top_p`` (arXiv:1904.09751): a token stays if the tokens likelier than it hold less than
      ``top_p`` of what is left; at least one always does.
    - ``min_p`` (arXiv:2407.01082): a token stays if it is at least ``min_p`` times as likely as
      the likeliest.

    Logits are already divided by the temperature. Without truncation they come back untouched.
    """
    chex.assert_rank(logits_BV, 2)
    if 0 < config.top_k < logits_BV.shape[1]:
        kth_B1 = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if config.top_p < 1.0:
        sorted_BV = -jnp.sort(-logits_BV, axis=1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=1)
        before_BV = jnp.pad(jnp.cumsum(probability_BV, axis=1)[:, :-1], ((0, 0), (1, 0)))
        kept_BV = jnp.where(before_BV < config.top_p, sorted_BV, jnp.inf)
        kept_BV = kept_BV.at[:, 0].set(sorted_BV[:, 0])
        logits_BV = jnp.where(logits_BV >= kept_BV.min(1, keepdims=True), logits_BV, -jnp.inf)
    if config.min_p > 0.0:
        floor_B1 = logits_BV.max(1, keepdims=True) + jnp.log(config.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return logits_BV
