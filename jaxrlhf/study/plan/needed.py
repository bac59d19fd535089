"""Bytes that a step of a run must move at least, from the shapes of its model and its rows.

Each weight is read once for each pass that uses it, each activation that one product hands to the
next is written once and read once, the filled cache is read once for each token. No scores of
attention, no logits and no copies: kernels exist that keep them on the chip.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxrlhf.core.types import TrainState
from jaxrlhf.models.decode import kind_of
from jaxrlhf.models.rope import Kind, layers_of
from jaxrlhf.models.stacks import places
from jaxrlhf.run.setup import Run
from jaxrlhf.study.plan.calls import Call, arguments_by_kind, kinds_of, on_device, rows_at_a_time


class Needed(NamedTuple):
    """Bytes on each device."""

    call: float
    """Of a whole call."""
    token: float = 0.0
    """Of one trip of a decode loop, on average over its trips."""


def needed(run: Run, call: Call, jaxpr: Any, results: float, trips: int | None) -> Needed:
    """What a call must move.

    W: bytes in compute dtype of the weights that it multiplies by, whole over fsdp and context; A:
    bytes of the activations of its tokens, ``activations``; args, results: of the program.

    - a forward pass: args + results + W + 2·A
    - an update of m microbatches: args + results + m·p·W + 2·p·A + 3·A + m·2·G, with p passes
      forward (2 with ``model.remat: full``; W is read once more by the pass backward) and G the
      float32 gradients of a device, summed up over microbatches
    - a sampler: a forward pass over its prompts, and for each trip W, the prompts' keys and values,
      and of the others the half that is filled on average
    - anything else: args + results

    W stands only beside arguments that are laid out or stored in another form; where a device's
    own arguments are these weights, or are quantised ones, they are counted there.

    Args:
      results: bytes on each device.
      trips: of the decode loop.
    """
    kinds = arguments_by_kind(call.args, jaxpr)
    least = sum(kinds.values()) + results
    weights, tokens = _weights(run, call), _tokens(call)
    if not weights or not tokens:
        return Needed(least)
    passes = weights + 2 * activations(run, tokens)
    if call.responses:
        token = _token(run, call, kinds["weights_copy"], trips or 0)
        return Needed(least - kinds["weights_copy"] + passes + (trips or 0) * token, token)
    if not kinds["optimizer"]:
        return Needed(least + passes)
    pieces, forward = run.config.optim.microbatches, 1 + (run.config.model.remat == "full")
    gradients = 2.0 * _gradients(call) * pieces
    inside = (2 * forward + 3) * activations(run, tokens)
    return Needed(least + pieces * (forward + 1) * weights + inside + gradients)


def activations(run: Run, tokens: float) -> float:
    """Bytes on each device of what the products of all layers hand on, for so many tokens.

    Of a layer and token: what attention and MLP add up to, 2·D; queries, keys, values and what
    attention makes of them, (2·N + 2·K)·H, and gate and up, 2·F (without a gate F), these split
    over tensor.
    """
    c = run.model.decoder
    split = 0
    for stack, _ in places(c):
        d = stack.decoder
        keys = 0 if d.shared_kv_layers else d.kv_heads
        wide = d.mlp + (d.moe.beside if d.moe else 0)
        split += 2 * (d.heads + keys) * d.head_dim + (1 + d.gated) * wide
    every = 2 * c.layers * c.embed + split / run.mesh.shape["tensor"]
    return tokens * every * np.dtype(run.model.dtype).itemsize


def _token(run: Run, call: Call, copy: float, trips: int) -> float:
    """Bytes of a trip: the weights in decode layout but for what is looked up, and the cache as far
    as it is filled."""
    c, sample = run.model.decoder, run.config.sample
    shards = run.mesh.size // run.mesh.shape["tensor"]
    rows = rows_at_a_time(run.config, call.responses)
    # each prompt once where they divide over the devices; slots have one each
    shared = rows == call.responses and rows // sample.n % shards == 0
    prompts = rows // sample.n if shared else rows
    length = min(trips + 1, sample.max_new_tokens)
    width = run.config.data.max_prompt_tokens

    kind, size = kind_of(run.model, sample), np.dtype(run.model.dtype).itemsize

    def filled(layer: Kind) -> float:
        """Bytes of a layer's keys, on average."""
        most = layer.window or max(width, length)
        slots = prompts * min(width, most) + rows * min(length / 2, most)
        # of int8 also a float32 a vector
        vector = layer.head_dim * np.dtype(kind).itemsize + (4 if kind == "int8" else 0)
        return slots * layer.kv_heads * vector

    cache = 2 * sum(map(filled, layers_of(c))) / shards / run.mesh.shape["tensor"]
    looked_up = c.layers * c.layer_embed + (0 if c.tied else c.embed)
    table = c.vocab * looked_up * size / run.mesh.shape["tensor"]
    return copy - table + cache


def _weights(run: Run, call: Call) -> float:
    """Bytes in compute dtype of the layers and the projection that a call is given."""
    total = 0.0
    leaves = jax.tree_util.tree_leaves_with_path(call.args)
    for (path, x), kind in zip(leaves, kinds_of(call.args), strict=True):
        names = jax.tree_util.keystr(path)
        # a table is looked up, not multiplied by, unless it is the projection too
        looked_up = "['embed']" in names and not run.model.decoder.tied
        looked_up |= "['each_layer']['table']" in names
        quantised = names.endswith((".qvalue", ".scale"))
        if kind == "parameters" and not looked_up and not quantised:
            total += math.prod(np.shape(x)) / _split(x, "tensor")
    return total * np.dtype(run.model.dtype).itemsize


def _split(x: Any, axis: str) -> int:
    """Pieces that an array is split into along a mesh axis."""
    where = getattr(x, "sharding", None)
    if not isinstance(where, NamedSharding):
        return 1
    names = [n for part in where.spec for n in (part if isinstance(part, tuple) else (part,))]
    return where.mesh.shape[axis] if axis in names else 1


def _tokens(call: Call) -> float:
    """Tokens on each device of the rows that a call is given."""
    leaves = zip(jax.tree.leaves(call.args), kinds_of(call.args), strict=True)
    sizes = [
        on_device(x) / x.dtype.itemsize
        for x, kind in leaves
        # ids of experts, several a token, have no sign
        if kind == "rows" and len(np.shape(x)) > 1 and np.issubdtype(x.dtype, np.signedinteger)
    ]
    return max(sizes, default=0.0)


def _gradients(call: Call) -> float:
    """Bytes on each device of the float32 gradients."""
    trained = [arg.params for arg in call.args if isinstance(arg, TrainState)]
    return sum(4 * on_device(x) / x.dtype.itemsize for x in jax.tree.leaves(trained))
