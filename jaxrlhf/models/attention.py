"""Attention: each token looks at those before it, however long the row is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import DECODE, constrain, devices_in_mesh, length_shards

SCORES_A_DEVICE = 2**26
"""Attention scores that may exist at once on a device (256 MiB in float32)."""

QUERIES = ("batch", "length", "heads", "head_dim")
KEYS = ("batch", "slots", "kv_heads", "head_dim")


def attend(query: Array, key: Array, value: Array, allowed_BTS: Array) -> Array:
    """softmax(q·kᵀ/√H)·v of T queries [B, T, N, H] over S keys [B, S, K, H] where ``allowed``."""
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, mask=allowed_BTS[:, None])


def pieces_of(query: Array, keys: int) -> int:
    """In how many pieces queries [B, T, N, H] must be taken for their scores to be few enough."""
    rows, tokens, heads, _ = query.shape
    return -(-rows * heads * tokens * keys // (SCORES_A_DEVICE * devices_in_mesh()))


def attend_before(
    query: Array, key: Array, value: Array, mask_BT: Array, segment_BT: Array | None = None
) -> Array:
    """``attend`` of rows to themselves: a token to the real ones up to it, of its own segment.

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
        return attend(query, key, value, allowed)

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


def attend_cached(query: Array, keys: Array, values: Array, first: Array, mask_BS: Array) -> Array:
    """``attend`` of rows' next tokens [B, T, N, H], which are in the slots from ``first`` on: to
    the real ones up to them among the S in the cache.

    Scores that exceed ``SCORES_A_DEVICE`` are computed some queries at a time, which is exact.
    """
    rows, tokens, slots = *query.shape[:2], keys.shape[1]
    width = -(-tokens // min(pieces_of(query, slots), tokens))
    pieces = -(-tokens // width)
    slot_T = first + jnp.arange(tokens)

    def some(item: tuple[Array, Array]) -> Array:
        query, slot_W = item
        allowed = (jnp.arange(slots) <= slot_W[:, None]) & (mask_BS[:, None] != 0)
        return attend(query, keys, values, allowed)

    if pieces == 1:
        return some((query, slot_T))

    # T → [pieces, width]; what fills the last piece is its last column, again.
    at = jnp.minimum(jnp.arange(pieces * width), tokens - 1).reshape(pieces, width)
    lay: Any = (None, *QUERIES)
    query = constrain(jnp.moveaxis(query[:, at], 1, 0), lay, DECODE)
    mixed = constrain(jax.lax.map(some, (query, slot_T[at])), lay, DECODE)
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(rows, -1, *query.shape[3:])
    return constrain(mixed[:, :tokens], QUERIES, DECODE)
