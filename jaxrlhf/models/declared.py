"""The modules of a decoder as NNX declares them, without computing a weight."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.core.types import Array, Params
from jaxrlhf.models.block import Block
from jaxrlhf.models.layers import Ends


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
    """A layer's weights with q, k, v and gate, up joined, as ``fused`` declares them."""
    attention, mlp = layer["attention"], layer["mlp"]
    if "k" not in attention:  # it shares those of another layer
        return {**layer, "mlp": _fused_mlp(mlp)}

    def every(name: str) -> Array:
        q, *rest = (attention[part][name] for part in "qkv" if part in attention)
        q = q.reshape(*q.shape[:-2], rest[0].shape[-2], -1, q.shape[-1])
        return jnp.concatenate([q, *(x[..., None, :] for x in rest)], axis=-2)

    rest = {name: x for name, x in attention.items() if name not in ("q", "k", "v")}
    return {
        **layer,
        "attention": {**rest, "qkv": {name: every(name) for name in attention["q"]}},
        "mlp": _fused_mlp(mlp),
    }


def _fused_mlp(mlp: Params) -> Params:
    if "gate" not in mlp or "router" in mlp:
        return mlp
    # A kernel [D, F] or a bias [F]: F stays last.
    both = {name: jnp.stack([mlp["gate"][name], x], axis=-2) for name, x in mlp["up"].items()}
    return {"gate_up": both, "down": mlp["down"]}
