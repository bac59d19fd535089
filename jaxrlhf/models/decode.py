"""The decoder a token at a time: weights laid out for it, prompts read once, and a step.

Every byte that a step moves should be one that it needs: each weight once, the keys and values so
far once. So the layers are unrolled over a list of their weights, products that read one input are
one product, and each layer has a cache of its own, which is written in place and then read. Under
``lax.scan`` over stacked layers XLA slices every layer's weights out into buffers, and copies the
caches whole, for every token.

A prompt is read once, and its keys and values are shared by all of its samples.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxrlhf.config import SampleConfig
from jaxrlhf.core.types import Array, Params
from jaxrlhf.mesh.sharding import DECODE, constrain, devices_in_mesh, map_pieces, spec
from jaxrlhf.models.attention import Look, attend_next, look_of
from jaxrlhf.models.cache import Kind, Layer, laid_out, opened, store, write
from jaxrlhf.models.declared import Declared, blocks, fuse, fused
from jaxrlhf.models.layers import adapters_of, exact
from jaxrlhf.models.nibbles import Nibbles, maker, packed
from jaxrlhf.models.quantise import KERNELS, any_quantised, in_dtype, is_quantised, laid
from jaxrlhf.models.replay import compact, joined, where_known
from jaxrlhf.models.rope import Angles, kinds, layers_of, rotary_angles
from jaxrlhf.models.stacks import Stack, apart, caches, own_caches, places, stacks
from jaxrlhf.models.transformer import WIDE, Model, merge
from jaxrlhf.models.turned import Turned, turn, turned, turns


class Weights(NamedTuple):
    """Parameters as a step reads them; see ``lay_out``."""

    outer: Params
    """Embedding, last norm, projection, and head."""
    layers: tuple[Params, ...]
    """Those of each layer, with its adapters; fused where it has none and nothing is quantised; on
    CPUs linear maps are ``Turned``."""


class Prompts(NamedTuple):
    """What the samples of prompts share."""

    layers: tuple[Layer, ...]
    """Of each that has keys and values of its own."""
    mask_QP: Array
    """1 on real tokens."""
    expert_QPM: Array | None = None
    """The experts that a mixture's tokens took, where they are asked for; see ``replay``."""


def lay_out(model: Model, params: Params, lora: Params | None = None) -> Weights:
    """The weights as the decode loop reads them: compute dtype, whole but for ``tensor``, a tree a
    layer.

    They are gathered over fsdp and context here, once. The last norm and the scalar head, which
    compute in float32, stay so, and what is quantised stays in as many bits; nf4 is put as its
    kernel reads it, where the devices have one. On CPUs linear maps and the output projection have
    their outputs first. Costs one copy of the weights, split over ``tensor`` alone.
    """
    stacked = params["layers"] if lora is None else merge(params["layers"], lora)
    each = apart(model.decoder, stacked)
    layers = tuple(_layer(model, stack, each[stack.name], i) for stack, i in places(model.decoder))
    found, mesh = Weights(_outer(model, params), layers), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return found
    return jax.lax.with_sharding_constraint(found, decode_layout(model, mesh, found))


def lay_out_soon(model: Model, params: Params) -> Weights:
    """``lay_out`` for who waits for a first token, compiled: on one device a layer a call.

    A program of all layers takes XLA seconds to compile, one of a layer a moment.
    """
    if devices_in_mesh() > 1:
        return _all_layers(model, params)
    each = apart(model.decoder, params["layers"])
    layers = tuple(
        _one_layer(model, stack, each[stack.name], i) for stack, i in places(model.decoder)
    )
    return Weights(_all_others(model, params), layers)


def _outer(model: Model, params: Params) -> Params:
    found = {name: x for name, x in params.items() if name != "layers"}
    found = {name: x if name in WIDE else model.cast(x) for name, x in found.items()}
    if "unembed" in found and turns():
        found["unembed"] = {"kernel": turn(1, found["unembed"]["kernel"])}
    return found


def _layer(model: Model, stack: Stack, stacked: Params, index: int | Array) -> Params:
    """One of the layers of a stack, of which some may be adapted."""
    layer = jax.tree.map(lambda x: x[index], stacked)
    layer = model.with_gains(in_dtype(layer, model.dtype))
    if any_quantised(layer):
        return _in_nibbles(model, stack, layer)
    if turns():
        layer = _with_kernels(layer, lambda part, name, x: turn(1 + (name == "o"), x))
    return layer if adapters_of(layer) else fuse(layer)


def _in_nibbles(model: Model, stack: Stack, layer: Params) -> Params:
    """A layer's quantised maps as a kernel of the devices reads them, where there is one."""
    by, declared = maker(model.nf4_product), blocks(stack.decoder, None).axes
    if by is None:
        return layer

    def kernel(part: str, name: str, x: Any) -> Any:
        return packed(1 + (name == "o"), x, declared[part][name]["kernel"][1:], by)

    return _with_kernels(layer, kernel)


def _with_kernels(layer: Params, change: Callable[[str, str, Any], Any]) -> Params:
    """A layer with another kernel for each linear map of attention and MLP: ``change(part, name,
    kernel)``. Experts have products of their own."""

    def module(part: str) -> Params:
        mapped = KERNELS if "router" not in layer[part] else ()
        return {
            name: {**x, "kernel": change(part, name, x["kernel"])} if name in mapped else x
            for name, x in layer[part].items()
        }

    return {**layer, "attention": module("attention"), "mlp": module("mlp")}


_all_layers = jax.jit(lay_out, static_argnums=0)
_one_layer = jax.jit(_layer, static_argnums=(0, 1))
_all_others = jax.jit(_outer, static_argnums=0)


def axes(model: Model, weights: Weights) -> Weights:
    """The logical axes of such ``Weights``, arrays or shapes: the same tree with tuples of names,
    one for all arrays of what is quantised."""
    outer = model.axes("head" in weights.outer)

    def layer(stack: Stack) -> Any:
        found = _declared(model, stack, weights).axes
        if _is_fused(weights):
            return found
        return jax.tree.map(lambda names: names[1:], found, is_leaf=lambda x: type(x) is tuple)

    each = {stack.name: layer(stack) for stack in stacks(model.decoder)}
    found = Weights(
        {name: x for name, x in outer.items() if name != "layers"},
        tuple(each[stack.name] for stack, _ in places(model.decoder)),
    )

    def named(x: Any, names: tuple[str | None, ...]) -> Any:
        return Turned(turned(names, x.contract), x.contract) if isinstance(x, Turned) else names

    def whole(x: Any) -> bool:
        return isinstance(x, Turned) or is_quantised(x)

    return jax.tree.map(named, weights, found, is_leaf=whole)


def decode_layout(model: Model, mesh: Mesh | AbstractMesh, weights: Weights) -> Weights:
    """Where each array of such ``Weights``, arrays or shapes, lies on a mesh."""

    def place(x: Any, names: tuple[str | None, ...]) -> Any:
        names = x.axes if isinstance(x, Nibbles) else names
        return laid(NamedSharding(mesh, spec(names, DECODE)), x)

    return jax.tree.map(place, weights, axes(model, weights), is_leaf=is_quantised)


def _is_fused(weights: Weights) -> bool:
    return "qkv" in weights.layers[0]["attention"]


def _declared(model: Model, stack: Stack, weights: Weights) -> Declared:
    """Any layer of a stack of such weights, as it is declared."""
    if _is_fused(weights):
        return fused(stack.decoder)
    return blocks(stack.decoder, model.lora if adapters_of(weights.layers[0]) else None)


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
    record: bool = False,
) -> tuple[Array, Prompts]:
    """Hidden states [Q, D] of the last tokens of left-padded prompts, and what their samples share.

    This is the forward pass of scoring and updating, over stacked layers; of so many pieces of each
    device's prompts one after the other. ``kind`` is what keys and values are kept in; None: the
    model's dtype. ``record``: a mixture's experts are kept too.
    """

    def read(rows: tuple[Array, Array]) -> tuple[Array, tuple[Layer, ...], Array | None]:
        hidden, kept = model.apply(params, *rows, lora, keep=True)
        keys, values = (apart(model.decoder, x) for x in (kept.key, kept.value))
        own = own_caches(model.decoder)
        both = [(keys[s.name][i], values[s.name][i]) for s, i in places(model.decoder)[:own]]
        # Of a layer with a window the last tokens are all that will be looked at.
        both = [
            jax.tree.map(lambda x, w=kind.window: x[:, :, -w:], x)
            for x, kind in zip(both, layers_of(model.decoder)[:own], strict=True)
        ]
        layers = tuple((store(key, dtype), store(value, dtype)) for key, value in both)
        expert = where_known(rows[1], joined(kept.expert)) if record else None
        return hidden[:, -1], laid_out(layers), expert

    dtype = kind or model.dtype

    hidden, layers, expert = map_pieces(read, (token_QP, mask_QP), pieces, DECODE)
    return hidden, Prompts(layers, mask_QP, expert)


def _attend(
    prompt: Layer,
    mask_QP: Array,
    cache: Layer,
    at: Array,
    window: int,
    look: Look,
    query: Array,
    key: Array | None,
    value: Array | None,
    sink_N: Array | None,
) -> tuple[Array, Layer]:
    """What new tokens see, [B, 1, N, H], and the cache with them; it is another layer's, and they
    are in it already, where there is no key and value."""
    if key is not None and value is not None:
        # Written, in place, before it is read: else XLA would read a copy, and write another.
        keys, values = cache
        cache = (
            write(keys, jnp.swapaxes(key, 1, 2), at),
            write(values, jnp.swapaxes(value, 1, 2), at),
        )
    since = opened(cache, prompt[0].x.shape[1])
    seen = attend_next(query[:, 0], prompt, mask_QP, since, at, window, look, sink_N)
    return seen[:, None], cache


def step(
    model: Model,
    weights: Weights,
    prompts: Prompts,
    cache: tuple[Layer, ...],
    token_B: Array,
    at: Array,
    tables: tuple[Angles, ...] | None = None,
) -> tuple[Array, tuple[Layer, ...], Array | None]:
    """Hidden states [B, D] of each row's new token number ``at``, the caches with it, and the
    experts [B, M] that it took in a mixture; see ``replay``.

    ``at`` is one number, or one for each row, [B]. ``tables`` are ``angle_tables`` of at least as
    many positions as rows have with this token; None: angles are computed here, which in a loop
    CPUs do anew for each layer.
    """
    few_bits = any_quantised(weights.layers[0])
    outer = model.outer(weights.outer)
    samples = token_B.shape[0] // prompts.mask_QP.shape[0]
    position_B = jnp.repeat(prompts.mask_QP.sum(1).astype(jnp.int32), samples) + at
    found, look = kinds(model.decoder), look_of(model.decoder)
    if tables is None:
        angles = [rotary_angles(position_B[:, None], model.decoder, kind) for kind in found.all]
    else:
        angles = jax.tree.map(lambda x: jnp.take(x, position_B, axis=0, mode="clip"), tables)
    x = outer.embed(token_B[:, None], position_B[:, None], model.dtype)
    own = outer.beside(x, token_B[:, None])
    if own is not None:
        own = constrain(own, ("batch", "length", None, None), DECODE)
    x = constrain(x, ("batch", "length", "activation"), DECODE)
    written: list[Layer] = []
    taken: list[Array] = []
    of_layer = zip(
        weights.layers, places(model.decoder), found.of_layer, caches(model.decoder), strict=True
    )
    for number, (layer, (stack, _), which, source) in enumerate(of_layer):
        before = cache[number] if source == number else written[source]
        there = prompts.layers[source], prompts.mask_QP, before, at
        attend = functools.partial(_attend, *there, found.all[which].window, look)
        if few_bits:
            # Else XLA may make what is quantised before the loop, of all layers at once.
            x, layer = jax.lax.optimization_barrier((x, layer))
        graph = _declared(model, stack, weights).graph
        with exact(model.dtype):
            beside = None if own is None else own[:, :, number]
            module = nnx.merge(graph, layer)
            x, since, routed = module(x, angles[which], DECODE, attend, own=beside)
        written += [since] if source == number else []
        taken += [] if routed is None else [compact(model.decoder, routed.expert[:, 0])]
    expert_BM = joined(jnp.stack(taken)) if taken else None
    return outer.norm(x[:, 0]), tuple(written), expert_BM
