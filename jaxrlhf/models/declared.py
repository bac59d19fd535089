"""The modules of a decoder as NNX declares them, without computing a weight."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.core.types import Array, Params
from jaxrlhf.models.block import Block
from jaxrlhf.models.layers import Ends
from jaxrlhf.models.turned import Turned


class Declared(NamedTuple):
    """A module as NNX declares it: its graph, and the shapes and axes of its weights."""

    graph: Any
    shapes: Params
    axes: Any


def declare(make: Any, layers: int | None = None) -> Declared:
    """The structure of ``make(rngs)``, without computing a weight.

    With ``layers``, shapes and axes are those of as many, stacked; the graph is that of one.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    axes = jax.tree.map(
        lambda v: v.get_metadata()["axes"], state, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    shapes, axes = nnx.to_pure_dict(state), nnx.to_pure_dict(axes)
    if layers is not None:
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct((layers, *s.shape), s.dtype), shapes)
        axes = jax.tree.map(
            lambda names: ("layers", *names), axes, is_leaf=lambda names: isinstance(names, tuple)
        )
    return Declared(graph, shapes, axes)


# Cached: steps that are traced again and again would otherwise build the modules each time.
@functools.lru_cache(maxsize=64)
def blocks(decoder: DecoderConfig, lora: LoraConfig | None) -> Declared:
    """The layers of one stack, with or without adapters."""
    return declare(lambda rngs: Block(decoder, rngs, lora), decoder.layers)


@functools.lru_cache(maxsize=64)
def fused(decoder: DecoderConfig) -> Declared:
    """A layer whose products that read one input are one: q, k and v; gate and up."""
    return declare(lambda rngs: Block(decoder, rngs, fused=True))


@functools.lru_cache(maxsize=64)
def ends(decoder: DecoderConfig, head: bool) -> Declared:
    """Embedding, last norm, output projection, and the scalar head if asked for."""
    return declare(lambda rngs: Ends(decoder, rngs, head))


def fuse(layer: Params) -> Params:
    """A layer's weights with q, k, v and gate, up joined, as ``fused`` declares them; arrays, or
    kernels that are ``Turned``."""
    attention, mlp = layer["attention"], layer["mlp"]
    if "k" in attention:  # else it shares those of another layer
        parts = [attention[name] for name in "qkv" if name in attention]
        rest = {name: x for name, x in attention.items() if name not in ("q", "k", "v")}
        attention = {**rest, "qkv": _joined(_beside, parts)}
    if "gate" in mlp and "router" not in mlp:
        mlp = {"gate_up": _joined(_paired, [mlp["gate"], mlp["up"]]), "down": mlp["down"]}
    return {**layer, "attention": attention, "mlp": mlp}


def _joined(join: Callable[..., Array], maps: list[Params]) -> Params:
    """Linear maps that read one input as one: ``join(axis, *maps)``, with the axis that tells them
    apart. Not mapped over the inputs, which would turn each weight around."""
    found = {}
    for name in maps[0]:
        parts = [one[name] for one in maps]
        if isinstance(parts[0], Turned):
            found[name] = Turned(join(-3, *(part.x for part in parts)), 1)
        else:
            found[name] = join(-2, *parts)
    return found


def _beside(axis: int, query: Array, *rest: Array) -> Array:
    """Of each head of keys its queries and itself: [..., N, …], [..., K, …] → [..., K, G + …, …],
    N = K·G at ``axis``."""
    at = query.ndim + axis
    shape = *query.shape[:at], rest[0].shape[at], -1, *query.shape[at + 1 :]
    each = query.reshape(shape), *(jnp.expand_dims(x, at + 1) for x in rest)
    return jnp.concatenate(each, axis=at + 1)


def _paired(axis: int, gate: Array, up: Array) -> Array:
    """[..., F, …] twice → [..., 2, F, …], 2 at ``axis``."""
    return jnp.stack([gate, up], axis=axis)
