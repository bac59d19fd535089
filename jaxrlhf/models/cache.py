"""Keys and values as decoding keeps them: a cache a layer, in the model's dtype or a smaller."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.config import DecoderConfig
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import DECODE, constrain
from jaxrlhf.models.rope import Kind as LayerKind
from jaxrlhf.models.rope import kinds
from jaxrlhf.models.stacks import own_caches
from jaxrlhf.models.turned import turns

KEPT = ("batch", "kv_heads", "slots", "head_dim")
"""Keys and values as decoding reads them: the tokens of a head lie together."""

QUERIES = 3
"""Of a head, up to which CPUs mix the values of several rows quicker by adding up than by a product
of each row and head (benchmarks/RESULTS.md)."""

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


def slots_in(kind: LayerKind, tokens: int) -> int:
    """Slots of such a layer's cache for so many new tokens: with a window it is a ring of its size,
    in which a token takes the place of one that is out of sight."""
    return min(slots_of(tokens), slots_of(kind.window)) if kind.window else slots_of(tokens)


def empty_cache(decoder: DecoderConfig, kind: Kind, rows: int, tokens: int) -> tuple[Layer, ...]:
    """Room for the keys and values of so many new tokens of each row, a layer that has some; as
    loops hand it on (``closed``)."""
    found = kinds(decoder)

    def blank(layer: LayerKind) -> Layer:
        shape = rows, layer.kv_heads, slots_in(layer, tokens), layer.head_dim
        zeros = jnp.zeros(shape, kind)
        scale = jnp.zeros(zeros.shape[:-1], jnp.float32) if kind == "int8" else None
        both = laid_out(Stored(zeros, scale))
        return closed((both, both))

    each = [blank(layer) for layer in found.all]
    return tuple(each[which] for which in found.of_layer[: own_caches(decoder)])


def grow(decoder: DecoderConfig, cache: tuple[Layer, ...], tokens: int) -> tuple[Layer, ...]:
    """The cache with room for so many new tokens, no fewer than it has room for.

    A ring that grows has not come round yet: it is of the size of its window from then on.
    """
    found, wider = kinds(decoder), []
    for which, layer in zip(found.of_layer[: own_caches(decoder)], cache, strict=True):
        kind = found.all[which]
        more = max(slots_in(kind, tokens) - layer[0].x.shape[-2], 0)
        width = ((0, 0), (0, 0), (0, more), (0, 0))
        whole = opened(layer, kind.kv_heads)
        padded = jax.tree.map(lambda x, w=width: jnp.pad(x, w[: x.ndim]), whole)
        wider.append(closed(laid_out(padded)) if more else layer)
    return tuple(wider)


def closed(layer: Layer) -> Layer:
    """A cache as loops hand it on: of one row, or of one head, without that axis.

    Around a product XLA drops axes of length one. If they came back for the next token, its
    compiler for CPUs would write this one's keys and values twice, each time into a copy. Of int8
    it is the other way round: there the axis keeps what widens a cache out of what writes it.
    """

    def few(stored: Stored) -> Stored:
        if stored.scale is not None:
            return stored
        x = stored.x
        return Stored(x.reshape(*(n for n in x.shape[:2] if n > 1), *x.shape[2:]), None)

    keys, values = layer
    return few(keys), few(values)


def opened(layer: Layer, kv_heads: int) -> Layer:
    """A cache, closed or not, with its axes of rows and heads: [B, K, S, H], scales [B, K, S]."""

    def whole(stored: Stored) -> Stored:
        slots = stored.x.ndim - 2
        return jax.tree.map(lambda x: x.reshape(-1, kv_heads, *x.shape[slots:]), stored)

    keys, values = layer
    return whole(keys), whole(values)


def write(old: Stored, new: Array, at: Array) -> Stored:
    """A cache, closed or not, with token ``at``, [B, K, 1, H], in its slot of the ring; one, or one
    a row, [B]."""
    slots = old.x.ndim - 2
    at = (at[0] if at.shape == (1,) else at) % old.x.shape[slots]
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=slots - at.ndim)
    put = jax.vmap(update) if at.ndim else update

    def one(x: Array, y: Array) -> Array:
        return put(x, y.reshape(*x.shape[:slots], 1, *x.shape[slots + 1 :]), at)

    return jax.tree.map(one, old, store(new, old.x.dtype.name))


def scores(query: Array, keys: Stored) -> Array:
    """q·k of M queries [B, K, M, H] a head, float32 [B, K, M, S]."""
    x = keys.x.astype(query.dtype)
    if turns():
        # Keys on the left, where a CPU reads them as they lie; see ``turned``.
        found = jax.lax.optimization_barrier(_product("bksh,bkmh->bksm", x, query))
        found = jnp.swapaxes(found, 2, 3)
    else:
        found = _product("bkmh,bksh->bkms", query, x)
    return found if keys.scale is None else found * keys.scale[:, :, None]


def mixed(weight: Array, values: Stored, dtype: Any) -> Array:
    """Σ_s weight·v of M queries a head, [B, K, M, S] → float32 [B, K, M, H], read in ``dtype``."""
    weight = weight if values.scale is None else weight * values.scale[:, :, None]
    weight, x = weight.astype(dtype), values.x.astype(dtype)
    if turns() and weight.shape[0] > 1 and weight.shape[2] <= QUERIES:
        weight, x = weight.astype(jnp.float32), x.astype(jnp.float32)
        return (weight[..., None] * x[:, :, None]).sum(3)
    return _product("bkms,bksh->bkmh", weight, x)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def laid_out(caches: Any) -> Any:
    """Caches as they lie on a mesh."""
    return jax.tree.map(lambda x: constrain(x, KEPT[: x.ndim], DECODE), caches)
