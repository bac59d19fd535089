"""Attention: each token looks at those before it, however long the row is."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.config import DecoderConfig
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import budget, constrain, devices_in_mesh, length_shards
from jaxrlhf.models.cache import Layer, mixed, scores

SCORES_A_DEVICE = 2**26
"""Attention scores that may exist at once on a device (256 MiB in float32); see ``budget``."""

QUERIES = ("batch", "length", "heads", "head_dim")
KEYS = ("batch", "slots", "kv_heads", "head_dim")

LOWEST = -1e30
"""A score that no exp(score − most) is felt of."""


class Look(NamedTuple):
    """How a decoder's layers look at tokens, beside the window, in which they differ."""

    scale: float | None = None
    """Scores are q·k times it; None: 1/√H."""
    softcap: float = 0.0
    """A score s becomes cap·tanh(s / cap); 0: it stays."""


PLAIN = Look()


def look_of(c: DecoderConfig) -> Look:
    """What a decoder's config says of it."""
    return Look(c.attention_scale, c.attention_softcap)


def attend(
    query: Array,
    key: Array,
    value: Array,
    allowed_BTS: Array,
    look: Look = PLAIN,
    sink_N: Array | None = None,
) -> Array:
    """softmax(q·kᵀ/√H)·v of T queries [B, T, N, H] over S keys [B, S, K, H] where ``allowed``.

    ``sink_N`` is a score that each head's softmax has beside those of the keys, with no value to
    be read (``attention_sinks``; arXiv:2309.17453).
    """
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    if not look.softcap and sink_N is None:
        mask = allowed_BTS[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=look.scale)
    rows, tokens, heads, size = query.shape
    query = query.reshape(rows, tokens, key.shape[2], -1, size)
    found = _product("btkgh,bskh->bkgts", query, key)
    found = capped(found * (look.scale or size**-0.5), look.softcap)
    found = jnp.where(allowed_BTS[:, None, None], found, LOWEST)
    weight = _softmax(found, sink_N).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weight, value).reshape(rows, tokens, heads, size)


def _softmax(found: Array, sink_N: Array | None) -> Array:
    """Of scores [B, K, G, T, S] over their last axis, with a sink or without."""
    if sink_N is None:
        return jax.nn.softmax(found, axis=-1)
    most, rest = _with_sink(found.max(-1, keepdims=True), sink_N)
    found = jnp.exp(found - most)
    return found / (found.sum(-1, keepdims=True) + rest)


def _with_sink(most: Array, sink_N: Array | None) -> tuple[Array, Array | float]:
    """(m, exp(sink − m)): the largest score m [B, K, G, …] of each head, its sink among them."""
    if sink_N is None:
        return most, 0.0
    sink = sink_N.astype(most.dtype).reshape(*most.shape[1:3], *(1,) * (most.ndim - 3))
    most = jax.lax.stop_gradient(jnp.maximum(most, sink))
    return most, jnp.exp(sink - most)


def capped(x: Array, cap: float) -> Array:
    """cap·tanh(x / cap), which stays within ±cap (arXiv:2408.00118); x itself where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def pieces_of(query: Array, keys: int) -> int:
    """In how many pieces queries [B, T, N, H] must be taken for their scores to be few enough."""
    rows, tokens, heads, _ = query.shape
    most = budget(SCORES_A_DEVICE, 1 / 64) * devices_in_mesh()
    return -(-rows * heads * tokens * keys // most)


def attend_before(
    query: Array,
    key: Array,
    value: Array,
    mask_BT: Array,
    segment_BT: Array | None = None,
    window: int | Array = 0,
    look: Look = PLAIN,
    sink_N: Array | None = None,
) -> Array:
    """``attend`` of rows to themselves: a token to the real ones up to it, of its own segment, and
    of the last ``window`` columns alone if that is not 0.

    Under a mesh with ``context`` the queries are split over it by their place in the row, and keys
    and values are gathered over it, once a layer: T·K·H numbers a row, where the scores are N·T²
    and stay split. Against ring attention, which passes keys and values on piece by piece, that
    costs the memory of one layer's keys and values, and saves an online softmax, a schedule that
    shares the causal work out, and a second account of padding and segments.

    Scores that exceed ``SCORES_A_DEVICE`` are computed some queries at a time, and again for their
    gradient. That is exact, since no query's softmax is cut.
    """
    tokens = query.shape[1]
    key, value = constrain(key, KEYS), constrain(value, KEYS)

    def some(query: Array, key: Array, value: Array, place_T: Array) -> Array:
        """Of the queries with these places in their rows."""
        allowed = (place_T[:, None] >= jnp.arange(tokens)) & (mask_BT[:, None] != 0)
        if segment_BT is not None:
            allowed &= segment_BT[:, place_T, None] == segment_BT[:, None]
        if not isinstance(window, int) or window:
            far = place_T[:, None] - jnp.arange(tokens) >= window
            allowed &= ~far | (jnp.asarray(window) == 0)
        return attend(query, key, value, allowed, look, sink_N)

    if (pieces := pieces_of(query, tokens)) > 1:
        return _in_pieces(some, query, key, value, pieces)
    return some(query, key, value, jnp.arange(tokens))


def _in_pieces(
    some: Callable[..., Array], query: Array, key: Array, value: Array, pieces: int
) -> Array:
    """``some`` of a part of the queries at a time.

    With T = (C, width, pieces), C being ``context``, a piece has every pieces-th query of each
    device, so that pieces are alike in their causal work. Each device has keys and values of its
    own, [C, …]: their gradient is summed over the devices after the last piece, not after each.
    """
    rows, tokens, *rest = query.shape
    shards = length_shards()
    width = -(-tokens // (shards * pieces))
    extra = shards * width * pieces - tokens
    # What fills the last piece takes the last token's place: every place is one of the row's.
    place_PCW = jnp.minimum(jnp.arange(tokens + extra), tokens - 1)
    place_PCW = jnp.moveaxis(place_PCW.reshape(shards, width, pieces), 2, 0)
    query = constrain(jnp.pad(query, ((0, 0), (0, extra), (0, 0), (0, 0))), QUERIES)
    query = query.reshape(rows, shards, width, pieces, *rest)
    query = jnp.transpose(query, (3, 1, 0, 2, 4, 5))  # [pieces, C, B, width, N, H]
    query = constrain(query, (None, "length", "batch", None, "heads", "head_dim"))

    def own(x: Array) -> Array:
        return constrain(jnp.broadcast_to(x, (shards, *x.shape)), ("length", *KEYS))

    keys, values = own(key), own(value)

    # Scores are what must not pile up: the backward pass computes each piece's again.
    @jax.checkpoint
    def piece(item: tuple[Array, Array]) -> Array:
        query, place_CW = item
        mixed = jax.vmap(some)(query, keys, values, place_CW)
        return constrain(mixed, ("length", "batch", None, "heads", "head_dim"))

    mixed = jax.lax.map(piece, (query, place_PCW))
    mixed = jnp.transpose(mixed, (2, 1, 3, 0, 4, 5)).reshape(rows, -1, *rest)
    return constrain(mixed, QUERIES)[:, :tokens]


def attend_next(
    query: Array,
    prompt: Layer,
    prompt_mask_QP: Array,
    since: Layer,
    at: Array,
    window: int = 0,
    look: Look = PLAIN,
    sink_N: Array | None = None,
) -> Array:
    """``attend`` of the next token of B rows, whose keys and values lie in two places.

    One softmax over the prompt and the tokens since. Its parts are computed where they lie, none is
    copied to stand beside the other: with m the largest score and z = Σ exp(s − m) of both parts,
    and of a sink, what a row sees is Σ exp(s − m)·v / z.

    Args:
      query: [B, N, H]; B = Q·n, prompt-major; what is returned is as it.
      prompt: keys and values [Q, K, P, H] of the prompts, each one's shared by its n rows; with a
        window of the prompts' last tokens alone, where they have more.
      prompt_mask_QP: 1 on real tokens.
      since: keys and values [B, K, S, H] of the new tokens up to this one, number t in slot t mod
        S; what slots of no token hold is not read.
      at: the number of this token: one, or one for each row, [B].
      window: tokens that it looks at, itself among them, at most S; 0: all.
    """
    rows, heads, size = query.shape
    prompts, kv_heads = prompt[0].x.shape[:2]
    groups = heads // kv_heads

    def of_prompt(x: Array) -> Array:
        """[B, K, G, …] → [Q, K, n·G, …]: all that look at one prompt, as the rows of a product."""
        x = x.reshape(prompts, -1, *x.shape[1:])
        return jnp.swapaxes(x, 1, 2).reshape(prompts, kv_heads, -1, x.shape[-1])

    def of_row(x: Array) -> Array:
        """Back again."""
        x = x.reshape(prompts, kv_heads, -1, groups, x.shape[-1])
        return jnp.swapaxes(x, 1, 2).reshape(rows, kv_heads, groups, -1)

    query, scale = query.reshape(rows, kv_heads, groups, size), look.scale or size**-0.5
    at = at.reshape(-1, 1, 1, 1)
    first = of_row(capped(scale * scores(of_prompt(query), prompt[0]), look.softcap))
    later = capped(scale * scores(query, since[0]), look.softcap)
    columns, slots = first.shape[-1], later.shape[-1]
    real = jnp.repeat(prompt_mask_QP[:, -columns:] != 0, rows // prompts, axis=0)[:, None, None]
    ago = (at - jnp.arange(slots)) % slots if window else at - jnp.arange(slots)
    there = (ago >= 0) & (ago <= at)
    if window:
        real &= at + columns - jnp.arange(columns) < window
        there &= ago < window
    first, later = jnp.where(real, first, LOWEST), jnp.where(there, later, LOWEST)
    most = jnp.maximum(first.max(-1, keepdims=True), later.max(-1, keepdims=True))
    most, rest = _with_sink(most, sink_N)
    first, later = jnp.exp(first - most), jnp.exp(later - most)
    total = first.sum(-1, keepdims=True) + later.sum(-1, keepdims=True) + rest
    seen = of_row(mixed(of_prompt(first), prompt[1], query.dtype))
    seen += mixed(later, since[1], query.dtype)
    return (seen / total).astype(query.dtype).reshape(rows, heads, size)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
