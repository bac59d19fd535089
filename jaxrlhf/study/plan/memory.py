"""Bytes on one device: of arguments by kind, and of what a program keeps beside them."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from jaxrlhf.core.types import TrainState
from jaxrlhf.mesh.sharding import DECODE, on_host, spec
from jaxrlhf.models.transformer import CACHE_AXES, Model
from jaxrlhf.run.setup import Run

Kinds = dict[str, float]
"""Kind → bytes on one device."""

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def on_device(x: Any) -> float:
    """Bytes of an array on each device, by its sharding; whole where it has none."""
    shape, where = tuple(np.shape(x)), getattr(x, "sharding", None)
    if where is not None:
        shape = where.shard_shape(shape)
    return math.prod(shape) * _itemsize(x.dtype)


def _itemsize(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        return data.size * data.dtype.itemsize
    return np.dtype(dtype).itemsize


def kinds_of(args: tuple[Any, ...]) -> list[str]:
    """The kind of each leaf of a program's arguments."""

    def alike(tree: Any, kind: str) -> list[str]:
        return [kind] * len(jax.tree.leaves(tree))

    kinds: list[str] = []
    for arg in args:
        if isinstance(arg, TrainState):
            kinds += alike(arg.params, "parameters")
            kinds += alike((arg.opt_state, arg.step, arg.skipped), "optimizer")
        else:
            network = isinstance(arg, dict) and bool({"layers", "lora"} & arg.keys())
            kinds += alike(arg, "parameters" if network else "rows")
    return kinds


def arguments_by_kind(args: tuple[Any, ...], jaxpr: Any) -> Kinds:
    """Bytes of the arguments that a traced program reads; jit leaves the others out."""
    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    out: Kinds = {"parameters": 0.0, "optimizer": 0.0, "rows": 0.0}
    leaves = jax.tree.leaves(args)
    for x, kind, kept in zip(leaves, kinds_of(args), used, strict=True):
        out[kind] += on_device(x) * kept
    return out


def resident(run: Run) -> float:
    """Bytes of all networks and optimizers that a run holds from its start to its end, without
    those that lie in host memory."""
    networks = [run.reference] if run.reference else []
    for judge in filter(None, (run.judge, run.gold)):
        networks += [x.network for scorer in judge.scorers if scorer for x in scorer.members]
    held = [run.states, run.frozen, *((network.params, network.lora) for network in networks)]
    unique = {id(x): x for x in jax.tree.leaves(held)}
    return sum(on_device(x) for x in unique.values() if not on_host(x))


def fetched(params: Any) -> float:
    """Bytes of the parameters that come from host memory when a step needs them."""
    return sum(on_device(x) for x in jax.tree.leaves(params) if on_host(x))


def cache_bytes(run: Run, rows: int) -> float:
    """The KV cache of a sampler's rows."""
    model, config = run.model, run.config
    slots = config.data.max_prompt_tokens + config.sample.max_new_tokens
    cache = jax.eval_shape(lambda: model.init_cache(rows, slots))
    axes: Any = CACHE_AXES.key_LBSKH
    layout = jax.sharding.NamedSharding(run.mesh, spec(axes, DECODE))
    one = math.prod(layout.shard_shape(cache.key_LBSKH.shape)) * cache.key_LBSKH.dtype.itemsize
    return 2.0 * one


def decode_copy(run: Run, model: Model) -> float:
    """The weights as the decode loop reads them: compute dtype, whole over fsdp and context."""
    total, size = 0.0, np.dtype(model.dtype).itemsize
    axes = jax.tree.leaves(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    for shape, names in zip(jax.tree.leaves(model.shapes()), axes, strict=True):
        layout = jax.sharding.NamedSharding(run.mesh, spec(names, DECODE))
        total += math.prod(layout.shard_shape(shape.shape)) * size
    return total


def refused(message: str) -> float | None:
    """Bytes that a program would take, out of a compiler's refusal; None if it says something else.

    A TPU compiler does not compile what exceeds a chip: ``Used 21.30G of 15.75G hbm``.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return float(found[1]) * UNITS[found[2]] if found else None
