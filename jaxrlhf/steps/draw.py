"""How a token is drawn from logits: truncation, and an exact draw that is cheap and shards well."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.config import SampleConfig
from jaxrlhf.core.types import Array, StopTable
from jaxrlhf.mesh.sharding import DECODE, constrain, vocab_shards
from jaxrlhf.models.decode import Weights
from jaxrlhf.models.transformer import Model


class Drawn(NamedTuple):
    """A token of each row, and what is known of it; log-probs in nats, float32 [B]."""

    token_B: Array
    logp_B: Array
    """Of the full vocabulary at the temperature, what ``score`` returns."""
    sample_logp_B: Array
    """Of the distribution that was drawn from."""
    value_B: Array | None
    """V of the state that it was drawn in."""
    ended_B: Array
    """bool, whether it ends its row."""
    read_B: Array | None
    """How much of the stop strings the row has read with it; see ``StopTable``."""


def columns_of(found: Drawn) -> dict[str, Array]:
    """What a rollout holds of a token that counts, by the names of its columns."""
    columns = {
        "token_BN": found.token_B,
        # A stop token counts too: stopping is learnt.
        "mask_BN": jnp.ones(found.token_B.shape, jnp.float32),
        "logp_BN": found.logp_B,
        "sample_logp_BN": found.sample_logp_B,
    }
    return columns if found.value_B is None else {**columns, "value_BN": found.value_B}


def choose(
    model: Model,
    weights: Weights,
    hidden_BD: Array,
    key_B: Array,
    t: Array,
    read_B: Array | None,
    config: SampleConfig,
    value: bool,
    stops: StopTable | None,
) -> Drawn:
    """Draw the t-th token of every row from the hidden states [B, D] before it.

    Args:
      key_B: a key a row; the draw uses ``fold_in(key, t)``.
      t: int32, one for all rows or [B].
      read_B: as in ``Drawn``, before the token; None without stop strings.
      value: also return the values, from the head in ``weights``.
    """
    logits_BV = constrain(model.logits(weights.outer, hidden_BD), ("batch", "vocab"), DECODE)
    token_B, logp_B, sample_logp_B = _token(logits_BV, key_B, t, config)
    value_B = model.scalar(weights.outer, hidden_BD) if value else None
    ended_B, read_B = _ends(config, stops, token_B, read_B)
    return Drawn(token_B, logp_B, sample_logp_B, value_B, ended_B, read_B)


def _ends(
    config: SampleConfig, stops: StopTable | None, token_B: Array, read_B: Array | None
) -> tuple[Array, Array | None]:
    """Whether a token ends its row, and how much of the stop strings the row has read with it."""
    ended_B = (token_B[:, None] == jnp.array(config.stop, jnp.int32)).any(1)
    if stops is None:
        return ended_B, None
    read_B = jnp.asarray(stops.next_SC)[read_B, jnp.asarray(stops.class_V)[token_B]]
    return ended_B | (read_B == stops.next_SC.shape[0] - 1), read_B


def _token(
    logits_BV: Array, key_B: Array, t: Array, config: SampleConfig
) -> tuple[Array, Array, Array]:
    """The drawn token, its log-prob at the temperature, and that under the truncated draw."""
    if config.temperature == 0.0:
        token_B = jnp.argmax(forbid(logits_BV, config), axis=1).astype(jnp.int32)
        return token_B, log_prob(logits_BV, token_B), jnp.zeros(token_B.shape)
    # logp: full vocabulary at T, what ``score`` returns; sample_logp: what was drawn from.
    logits_BV = logits_BV / config.temperature
    allowed_BV = truncate(forbid(logits_BV, config), config)
    t_B = jnp.broadcast_to(t, key_B.shape)
    token_B, mass_B = draw(jax.vmap(jax.random.fold_in)(key_B, t_B), allowed_BV)
    sample_logp_B = log_prob(allowed_BV, token_B, mass_B)
    if allowed_BV is logits_BV:
        return token_B, sample_logp_B, sample_logp_B
    return token_B, log_prob(logits_BV, token_B), sample_logp_B


def log_prob(logits_BV: Array, token_B: Array, mass_B: Array | None = None) -> Array:
    """log softmax(logits)[token], float32 [B], without a second [B, V] array; ``mass_B`` is the
    logsumexp of the logits where that is known."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return chosen_B - (jax.nn.logsumexp(logits_BV, axis=1) if mass_B is None else mass_B)


BLOCK = 256
"""Tokens that share one Gumbel variable at the first level of a draw."""


def draw(key_B: Array, logits_BV: Array) -> tuple[Array, Array]:
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
      int32 [B]; and the logsumexp of the logits, [B].
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
    token_B = (block_B * BLOCK + token_B).astype(jnp.int32)
    return token_B, jax.nn.logsumexp(mass_BJ, axis=1)


def forbid(logits_BV: Array, config: SampleConfig) -> Array:
    """−inf on ``config.forbidden``, ids that no text shows; logits [B, V] untouched without."""
    chex.assert_rank(logits_BV, 2)
    if not config.forbidden:
        return logits_BV
    id_V = jnp.arange(logits_BV.shape[1])
    ranges = jnp.array(config.forbidden)
    none_V = ((id_V >= ranges[:, :1]) & (id_V < ranges[:, 1:])).any(0)
    return jnp.where(none_V, -jnp.inf, logits_BV)


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
