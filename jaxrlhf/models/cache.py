"""Keys and values as decoding keeps them: a cache a layer, in the model's dtype or a smaller."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.config import DecoderConfig
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import DECODE, constrain

KEPT = ("batch", "kv_heads", "slots", "head_dim")
"""Keys and values as decoding reads them: the tokens of a head lie together."""

Kind = str
"""What they are kept in: float32, bfloat16 or int8."""


class Stored(NamedTuple):
    """Vectors of H numbers, x · scale."""

    x: Array
    """[B, K, S, H]."""
    scale: Array | None
    """float32 [B, K, S]; None is 1."""


Layer = tuple[Stored, Stored]
"""Keys and values of one layer: of prompts (B = Q, S = P), or of the tokens since."""


def store(x: Array, kind: Kind) -> Stored:
    """Vectors [..., H] in this dtype; int8 with a scale each, max |x| / 127 (absmax rounding)."""
    if kind != "int8":
        return Stored(x.astype(kind), None)
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    steps = jnp.round(x / jnp.maximum(scale, 1e-30)[..., None])
    return Stored(steps.astype(jnp.int8), scale)


def slots_of(tokens: int) -> int:
    """Slots of a cache for so many new tokens: GPUs copy what is no multiple of their tiles."""
    tile = 64 if tokens > 64 else 8
    return -(-max(tokens, 1) // tile) * tile


def empty_cache(decoder: DecoderConfig, kind: Kind, rows: int, tokens: int) -> tuple[Layer, ...]:
    """Room for the keys and values of so many new tokens of each row."""
    zeros = jnp.zeros((rows, decoder.kv_heads, slots_of(tokens), decoder.head_dim), kind)
    scale = jnp.zeros(zeros.shape[:-1], jnp.float32) if kind == "int8" else None
    blank = laid_out(Stored(zeros, scale))
    return ((blank, blank),) * decoder.layers


def grow(cache: tuple[Layer, ...], tokens: int) -> tuple[Layer, ...]:
    """The cache with room for so many new tokens, no fewer than it has room for."""
    more = slots_of(tokens) - cache[0][0].x.shape[2]
    if more <= 0:
        return cache
    width = ((0, 0), (0, 0), (0, more), (0, 0))
    return laid_out(jax.tree.map(lambda x: jnp.pad(x, width[: x.ndim]), cache))


def write(old: Stored, new: Array, at: Array) -> Stored:
    """A cache with the new token's [B, K, 1, H] in slot ``at``, which is one, or one a row, [B]."""
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1 if at.ndim else 2)
    put = jax.vmap(update) if at.ndim else update
    return jax.tree.map(lambda x, y: put(x, y, at), old, store(new, old.x.dtype.name))


def scores(query: Array, keys: Stored) -> Array:
    """q·k of M queries [B, K, M, H] a head, float32 [B, K, M, S]."""
    found = _product("bkmh,bksh->bkms", query, keys.x.astype(query.dtype))
    return found if keys.scale is None else found * keys.scale[:, :, None]


def mixed(weight: Array, values: Stored, dtype: Any) -> Array:
    """Σ_s weight·v of M queries a head, [B, K, M, S] → float32 [B, K, M, H], read in ``dtype``."""
    weight = weight if values.scale is None else weight * values.scale[:, :, None]
    return _product("bkms,bksh->bkmh", weight.astype(dtype), values.x.astype(dtype))


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def laid_out(caches: Any) -> Any:
    """Caches as they lie on a mesh."""
    return jax.tree.map(lambda x: constrain(x, KEPT[: x.ndim], DECODE), caches)
