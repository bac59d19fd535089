"""Where a token stands, how that turns its queries and keys, and what layers differ in.

Layers of one decoder may look at rows differently: through a window, by other rotary frequencies or
by none, with heads of another size. Those are the ``Kind``s of a decoder; most have one.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.config import DecoderConfig, RopeScaling
from jaxrlhf.core.types import Array
from jaxrlhf.models.stacks import places

Angles = tuple[Array, Array]
"""cos and sin of the rotary embedding, [B, T, 1, rotated/2], float32."""


class Kind(NamedTuple):
    """How a layer looks at its rows."""

    window: int
    """Tokens that a token looks at, up to itself; 0: all before it."""
    rotated: bool
    theta: float
    scaling: RopeScaling | None
    head_dim: int
    kv_heads: int


class Kinds(NamedTuple):
    """The kinds of a decoder's layers."""

    all: tuple[Kind, ...]
    """Each once."""
    of_layer: tuple[int, ...]
    """Which of them each layer is."""


@functools.lru_cache(maxsize=64)
def kinds(c: DecoderConfig) -> Kinds:
    """How each layer looks at its rows."""

    def kind(c: DecoderConfig, layer: int) -> Kind:
        window = c.windows[layer % len(c.windows)] if c.windows else 0
        still = bool(c.no_rope) and c.no_rope[layer % len(c.no_rope)]
        heads = c.head_dim, c.kv_heads
        if still or c.positions == "learned":
            return Kind(window, False, 0.0, None, *heads)
        if window and c.window_rope_theta is not None:
            return Kind(window, True, c.window_rope_theta, None, *heads)
        return Kind(window, True, c.rope_theta, _chosen(c), *heads)

    layers = [kind(stack.decoder, layer) for stack, layer in places(c)]
    distinct = tuple(dict.fromkeys(layers))
    return Kinds(distinct, tuple(map(distinct.index, layers)))


def layers_of(c: DecoderConfig) -> list[Kind]:
    """The kind of each layer."""
    found = kinds(c)
    return [found.all[which] for which in found.of_layer]


def _chosen(c: DecoderConfig) -> RopeScaling | None:
    """The scaling, with longrope's long factors for its short ones where rows may be long."""
    scaling = c.rope_scaling
    if scaling is None or scaling.kind != "longrope" or c.context <= scaling.original_context:
        return scaling
    return replace(scaling, factors=scaling.long_factors)


def positions(mask_BT: Array, segment_BT: Array | None = None) -> Array:
    """Real tokens before each token, in its row or in its segment of it; [B, T] int32, at least 0.

    A segment is a stretch of equal numbers.
    """
    count_BT = jnp.cumsum(mask_BT, axis=1) - 1
    if segment_BT is not None:
        starts = jnp.diff(segment_BT, axis=1, prepend=segment_BT[:, :1]) != 0
        # Counts only grow, so the running maximum is the count at the start of the token's segment.
        count_BT -= jax.lax.cummax(jnp.where(starts, count_BT, 0), axis=1)
    return jnp.maximum(count_BT, 0)


def rotary_angles(position_BT: Array, c: DecoderConfig, kind: Kind) -> Angles:
    """Angle position · theta^(−2i/R) of pair i of R/2 (arXiv:2104.09864), stretched by the kind's
    scaling; 0 where it has none. The R numbers of a head are in pairs (i, i + R/2)."""
    half = (c.rotary_dim or kind.head_dim) // 2
    frequency = jnp.zeros(half) if not kind.rotated else _frequencies(half, kind)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    factor = kind.scaling.attention_factor if kind.scaling else 1.0
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1 else (factor * cos, factor * sin)


def angle_tables(positions: int, c: DecoderConfig) -> tuple[Angles, ...]:
    """The angles of positions 0 to ``positions`` − 1, for each of ``kinds``: cos and sin
    [positions, 1, 1, rotated/2], float32."""
    each = jnp.arange(positions)[:, None]
    return tuple(rotary_angles(each, c, kind) for kind in kinds(c).all)


def angles_by_kind(position_BT: Array, c: DecoderConfig) -> Callable[[Array], Angles]:
    """The number of a kind, in a loop over layers of one stack → the angles of its layers."""
    each = [rotary_angles(position_BT, c, kind) for kind in kinds(c).all]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    return lambda which: each[0] if len(each) == 1 else jax.tree.map(lambda x: x[which], stacked)


def _frequencies(half: int, kind: Kind) -> Array:
    frequency = kind.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = kind.scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "proportional":
        turned = jnp.arange(half) < int(2 * half * scaling.share // 2)
        return jnp.where(turned, frequency / scaling.factor, 0.0)
    if scaling.kind == "longrope":
        return frequency / jnp.array(scaling.factors, jnp.float32)
    keep = _yarn_kept(half, kind, scaling) if scaling.kind == "yarn" else _kept(frequency, scaling)
    return frequency * (keep + (1 - keep) / scaling.factor)


def _kept(frequency: Array, scaling: RopeScaling) -> Array:
    """Llama 3.1: of high frequencies 1, of low ones 0, a ramp in between."""
    # Full turns that a pair makes over the context that the model was first trained on.
    turns = scaling.original_context * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return jnp.clip((turns - low) / (high - low), 0, 1)


def _yarn_kept(half: int, kind: Kind, scaling: RopeScaling) -> Array:
    """YaRN (arXiv:2309.00071, 3.2): likewise, but the ramp is over the pairs' numbers."""

    def pair(turns: float) -> float:
        """The number of the pair that makes so many turns over the first context."""
        length = scaling.original_context / (2 * math.pi * turns)
        return half * math.log(length) / math.log(kind.theta)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first if last != first else 0.001
    return 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / width, 0, 1)


def rotate(x: Array, angles: Angles) -> Array:
    """Turn the pairs (i, i + R/2) of the first R numbers of x [B, T, heads, H], in float32."""
    cos, sin = angles
    size = 2 * cos.shape[-1]
    left, right = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    turned = turned.astype(x.dtype)
    if size == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., size:]], axis=-1)
