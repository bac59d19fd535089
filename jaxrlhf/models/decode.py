"""The decoder a token at a time: weights laid out for it, prompts read once, and a step.

Every byte that a step moves should be one that it needs: each weight once, the keys and values so
far once. So the layers are unrolled over a list of their weights, products that read one input are
one product, and each layer has a cache of its own, which is written in place and then read. Under
``lax.scan`` over stacked layers XLA slices every layer's weights out into buffers, and copies the
caches whole, for every token.

A prompt is read once, and its keys and values are shared by all of its samples.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxrlhf.config import DecoderConfig, SampleConfig
from jaxrlhf.core.types import Array, Params
from jaxrlhf.mesh.sharding import DECODE, constrain, constrain_tree, map_pieces, shardings
from jaxrlhf.models.attention import attend_next, look_of
from jaxrlhf.models.block import Block
from jaxrlhf.models.cache import Kind, Layer, laid_out, store, write
from jaxrlhf.models.layers import exact
from jaxrlhf.models.quantise import whole
from jaxrlhf.models.rope import kinds, rotary_angles, windows_of
from jaxrlhf.models.transformer import Declared, Model, blocks, declare, merge


class Weights(NamedTuple):
    """Parameters as a step reads them; see ``lay_out``."""

    outer: Params
    """Embedding, last norm, projection, and head."""
    layers: tuple[Params, ...]
    """Those of each layer, with its adapters; fused where there are none."""


class Prompts(NamedTuple):
    """What the samples of prompts share."""

    layers: tuple[Layer, ...]
    mask_QP: Array
    """1 on real tokens."""


@functools.lru_cache(maxsize=64)
def fused(decoder: DecoderConfig) -> Declared:
    """A layer whose products that read one input are one: q, k and v; gate and up."""
    return declare(lambda rngs: Block(decoder, rngs, fused=True))


def lay_out(model: Model, params: Params, lora: Params | None = None) -> Weights:
    """The weights as the decode loop reads them: compute dtype, whole but for ``tensor``, a tree a
    layer.

    They are gathered over fsdp and context here, once. The last norm and the scalar head, which
    compute in float32, stay so. Costs one copy of the weights, split over ``tensor`` alone.
    """
    outer = {name: x for name, x in params.items() if name != "layers"}
    outer = {name: x if name in ("norm", "head") else model.cast(x) for name, x in outer.items()}
    stacked = params["layers"] if lora is None else merge(params["layers"], lora)
    layers = []
    for index in range(model.decoder.layers):
        layer = jax.tree.map(lambda x, index=index: x[index], stacked)
        layer = whole(layer, model.dtype)
        layers.append(_fuse(layer) if lora is None else layer)
    found = Weights(outer, tuple(layers))
    return constrain_tree(found, axes(model, "head" in params, lora is not None), DECODE)


def axes(model: Model, head: bool, adapted: bool) -> Weights:
    """The logical axes of ``Weights``: the same tree with tuples of names."""
    outer = {name: x for name, x in model.axes(head).items() if name != "layers"}
    layer = fused(model.decoder).axes
    if adapted:
        stacked = blocks(model.decoder, model.lora).axes
        layer = jax.tree.map(lambda names: names[1:], stacked, is_leaf=lambda x: type(x) is tuple)
    return Weights(outer, (layer,) * model.decoder.layers)


def decode_layout(model: Model, mesh: Mesh, head: bool, adapted: bool) -> Weights:
    """Where each array of ``Weights`` lies on a mesh."""
    names = axes(model, head, adapted)

    def place(tree: Any) -> Any:
        return shardings(tree, mesh, DECODE)

    return Weights(place(names.outer), tuple(place(layer) for layer in names.layers))


def _fuse(layer: Params) -> Params:
    """A layer's weights with q, k, v and gate, up joined, as ``fused`` declares them."""
    attention, mlp = layer["attention"], layer["mlp"]

    def every(name: str) -> Array:
        q, k, v = (attention[part][name] for part in "qkv")
        q = q.reshape(*q.shape[:-2], k.shape[-2], -1, q.shape[-1])
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

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


def kind_of(model: Model, config: SampleConfig) -> Kind:
    """What a sampler keeps keys and values in."""
    return model.dtype if config.cache == "model" else config.cache


def read_prompts(
    model: Model,
    params: Params,
    token_QP: Array,
    mask_QP: Array,
    lora: Params | None = None,
    pieces: int = 1,
    kind: Kind | None = None,
) -> tuple[Array, Prompts]:
    """Hidden states [Q, D] of the last tokens of left-padded prompts, and what their samples share.

    This is the forward pass of scoring and updating, over stacked layers; of so many pieces of each
    device's prompts one after the other. ``kind`` is what keys and values are kept in; None: the
    model's dtype.
    """

    def read(rows: tuple[Array, Array]) -> tuple[Array, tuple[Layer, ...]]:
        hidden, kept = model.apply(params, *rows, lora, keep=True)
        assert kept is not None
        both = [jax.tree.map(lambda x, i=i: x[i], kept) for i in range(model.decoder.layers)]
        # Of a layer with a window the last tokens are all that will be looked at.
        windows = windows_of(model.decoder)
        both = [
            jax.tree.map(lambda x, w=w: x[:, :, -w:], x) for x, w in zip(both, windows, strict=True)
        ]
        layers = tuple((store(key, dtype), store(value, dtype)) for key, value in both)
        return hidden[:, -1], laid_out(layers)

    dtype = kind or model.dtype

    hidden, layers = map_pieces(read, (token_QP, mask_QP), pieces, DECODE)
    return hidden, Prompts(layers, mask_QP)


def step(
    model: Model,
    weights: Weights,
    prompts: Prompts,
    cache: tuple[Layer, ...],
    token_B: Array,
    at: Array,
) -> tuple[Array, tuple[Layer, ...]]:
    """Hidden states [B, D] of each row's new token number ``at``, and the caches with it.

    ``at`` is one number, or one for each row, [B].
    """
    adapted = "qkv" not in weights.layers[0]["attention"]
    graph = (blocks(model.decoder, model.lora) if adapted else fused(model.decoder)).graph
    outer = model.outer(weights.outer)
    samples = token_B.shape[0] // prompts.mask_QP.shape[0]
    position_B = jnp.repeat(prompts.mask_QP.sum(1), samples) + at
    found, look = kinds(model.decoder), look_of(model.decoder)
    angles = [rotary_angles(position_B[:, None], model.decoder, kind) for kind in found.all]
    x = outer.embed(token_B[:, None], position_B[:, None], model.dtype)
    x = constrain(x, ("batch", "length", "activation"), DECODE)
    written = []
    for layer, which, *caches in zip(
        weights.layers, found.of_layer, prompts.layers, cache, strict=True
    ):

        def attend(
            query: Array,
            key: Array,
            value: Array,
            sink_N: Array | None,
            caches: list[Layer] = caches,
            window: int = found.all[which].window,
        ) -> tuple[Array, Any]:
            prompt, before = caches
            # Written, in place, before it is read: else XLA would read a copy, and write another.
            keys, values = before
            since = (
                write(keys, jnp.swapaxes(key, 1, 2), at),
                write(values, jnp.swapaxes(value, 1, 2), at),
            )
            there = prompt, prompts.mask_QP, since, at
            return attend_next(query[:, 0], *there, window, look, sink_N)[:, None], since

        with exact(model.dtype):
            x, both = nnx.merge(graph, layer)(x, angles[which], DECODE, attend)
        written.append(both)
    return outer.norm(x[:, 0]), tuple(written)
