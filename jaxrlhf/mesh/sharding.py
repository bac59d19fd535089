"""One mesh, and one table that says which logical axis lies along which of its axes.

A weight, a batch and a KV cache name their logical axes where their shape is stated; ``RULES`` maps
the names to mesh axes, and everything else follows from it: where arrays lie between the steps, and
where inside them. Frozen weights may lie in the hosts' memory, each host with the pieces of its own
devices, and on the devices only while a step reads them.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrlhf.config import AXES, MeshConfig, across_slices, resolve_mesh, sizes_of
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, Params, TrainState
from jaxrlhf.mesh.chips import CHIPS, name_of

Rules = Mapping[str, str | tuple[str, ...] | None]


RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp", "expert", "context"),
    "experts": "expert",
    "expert_embed": ("fsdp", "context"),
    "router": None,
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "group": None,
    "pair": None,
    "vocab": "tensor",
    "positions": None,
    "head_dim": None,
    "layer_embed": None,
    "layers": None,
    "rank": None,
    "length": "context",
    "slots": None,
    "activation": None,
}
"""Logical axis → mesh axes. ``activation`` is the embed axis of hidden states, whose rows are
already split over fsdp; ``experts`` that of a mixture, whose own embed axis is ``expert_embed``;
``length`` that of tokens, ``slots`` that of the keys and values which they
look at: each device has those of all tokens of its rows."""


DECODE: Rules = {
    **RULES,
    "batch": ("data", "fsdp", "expert", "context"),
    "embed": None,
    "expert_embed": None,
    "length": None,
}
"""For sampling. Weights are gathered over fsdp and context once a rollout instead of once a token;
a token at a time there is no length to split, so context splits the rows, and with them the cache,
further."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh data × fsdp × expert × context × tensor over ``devices`` (default: all).

    Raises:
      InputError: if the axes do not multiply to the number of devices, or the devices do not lie in
        ``config.slices`` groups of one size.
    """
    devices = jax.devices() if devices is None else list(devices)
    laid = lay_out(resolve_mesh(config, len(devices)), devices)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def lay_out(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Devices in the mesh's order: each slice a block of it, neighbours along the last axes.

    Args:
      config: resolved.
    """
    by_process = _check_slices(config.slices, devices)
    # One axis alone crosses slices, whose network is the slow one; all others stay inside.
    outer = dict.fromkeys(AXES, 1) | {across_slices(config): config.slices}
    inner = tuple(size // outer[name] for name, size in sizes_of(config).items())
    # A torus may have fewer axes than the mesh.
    split = {"allow_split_physical_axes": True}
    if config.slices == 1:
        return mesh_utils.create_device_mesh(inner, devices, **split)
    return mesh_utils.create_hybrid_device_mesh(
        inner, tuple(outer.values()), devices, process_is_granule=by_process, **split
    )


def _check_slices(slices: int, devices: Sequence[Any]) -> bool:
    """Whether ``slices`` groups of devices are processes rather than what they call slices."""
    if slices == 1 and (count := tpu_slices(devices)) > 1:
        raise InputError(f"mesh.slices=1: the devices lie in {count} TPU slices: set it to {count}")
    named = Counter(getattr(device, "slice_index", 0) for device in devices)
    hosts = Counter(device.process_index for device in devices)
    if slices > 1 and slices not in (len(named), len(hosts)):
        raise InputError(
            f"mesh.slices={slices}: the devices lie in {len(named)} slices and {len(hosts)} "
            "processes: give the number of one of them, or 1"
        )
    by_process = slices != len(named)
    counts = sorted((hosts if by_process else named).values())
    if slices > 1 and counts[0] != counts[-1]:
        raise InputError(
            f"mesh.slices={slices}: the slices have {counts[0]} to {counts[-1]} devices: "
            "they must have equally many"
        )
    return by_process


def tpu_slices(devices: Sequence[Any]) -> int:
    """How many TPU slices devices lie in; 1 if they are not TPUs."""
    tpus = (device for device in devices if device.platform == "tpu")
    return len({getattr(device, "slice_index", 0) for device in tpus}) or 1


def config_of(mesh: Mesh) -> MeshConfig:
    """The config that a mesh is of."""
    return MeshConfig(**{name: mesh.shape[name] for name in AXES})


def spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """The partition of an array with these logical axes; an unknown name raises KeyError."""
    return PartitionSpec(*(None if name is None else rules[name] for name in axes))


def shardings(axes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A tree of axis-name tuples → the same tree of NamedShardings."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(names, rules)),
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def constrain(x: Array, axes: Sequence[str | None], rules: Rules = RULES) -> Array:
    """Lay ``x`` out by its logical axes; the identity where no mesh is set (``jax.set_mesh``)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, rules))


def shards(axis: str, rules: Rules = RULES) -> int:
    """Pieces that this axis is split into, by RULES or those given, under the mesh in force; 1
    without one."""
    mesh, along = jax.sharding.get_abstract_mesh(), rules[axis] or ()
    names = (along,) if isinstance(along, str) else along
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in names)


row_shards, length_shards, vocab_shards = (
    partial(shards, axis) for axis in ("batch", "length", "vocab")
)
"""``shards`` of these."""


def map_pieces(f: Callable[[Any], Any], rows: Any, pieces: int, rules: Rules = RULES) -> Any:
    """``f`` of a part of the rows at a time, one after the other, and its results joined.

    ``rows`` and what ``f`` returns are trees of arrays [B, …]. A piece has equally many rows of
    each device, so that none moves; ``pieces`` × ``row_shards`` must divide B.
    """
    if pieces == 1:
        return f(rows)
    devices = row_shards(rules)

    def hold(x: Array, at: int) -> Array:
        """Rows split over the devices along axis ``at``; the others as they come."""
        if jax.sharding.get_abstract_mesh().empty:
            return x
        free: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
        free[at] = rules["batch"]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*free))

    def cut(x: Array) -> Array:
        x = hold(x.reshape(devices, pieces, -1, *x.shape[1:]), 0)
        return hold(jnp.moveaxis(x, 1, 0).reshape(pieces, -1, *x.shape[3:]), 1)

    def joined(x: Array) -> Array:
        x = hold(x.reshape(pieces, devices, -1, *x.shape[2:]), 1)
        return hold(jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:]), 0)

    return jax.tree.map(joined, jax.lax.map(f, jax.tree.map(cut, rows)))


def take_rows(x: Array, row_M: Array) -> Array:
    """x[row_M] of rows [B, ...] over the mesh, whichever devices they lie on."""
    if x.ndim < 3:  # a number a token or less: small, were each device to have all of it
        return x[row_M]
    taken = split_last(x)[row_M]
    return split_rows(taken, x.shape[-1], ("batch", *(None,) * (x.ndim - 1)))


def split_last(x: Array) -> Array:
    """[..., M] with its last axis over the devices of rows, with zeros added until it divides.

    So rows can go to other devices, and tokens to other rows, and no device has all of them.
    """
    lacks = -x.shape[-1] % row_shards()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lacks)])
    return constrain(x, (*(None,) * (x.ndim - 1), "batch"))


def split_rows(x: Array, size: int, axes: Sequence[str | None]) -> Array:
    """What was ``split_last``, and its rows mixed, → laid out by ``axes``, of ``size`` numbers."""
    x = constrain(x, (*(None,) * (x.ndim - 1), "batch"))
    return constrain(x, axes)[..., :size]


def devices_in_mesh() -> int:
    """Devices of the mesh in force; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def device_kind() -> str:
    """What the devices of the mesh in force are, those to compile for; of jax's own without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def budget(least: int, share: float) -> int:
    """Float32 numbers that may exist at once on a device: ``least``, or more where they take no
    more than this share of its memory. What is computed in pieces within it is the same."""
    name = name_of(device_kind())
    return least if name in (None, "cpu") else max(least, int(CHIPS[name].memory * share / 4))


def platform() -> str:
    """What the devices of the mesh in force are ("cpu", "gpu", "tpu"); jax's default without one.

    Of programs for devices that are not here: those that they are compiled for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def row_layout(mesh: Mesh) -> NamedSharding:
    """Where arrays with a leading row axis lie between the steps: rows over data·fsdp."""
    return NamedSharding(mesh, spec(("batch",)))


def few_rows_layout(mesh: Mesh, rows: int) -> NamedSharding:
    """``row_layout`` if the rows divide over it; else, as few prompts may, all everywhere."""
    split = rows % math.prod(mesh.shape[name] for name in RULES["batch"] or ()) == 0
    return row_layout(mesh) if split else NamedSharding(mesh, PartitionSpec())


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, the same on every process, → global arrays laid out by ``few_rows_layout``."""
    return put(tree, jax.tree.map(lambda x: few_rows_layout(mesh, x.shape[0]), tree))


def fetch(tree: Any) -> Any:
    """Arrays, wherever on the mesh they lie → numpy arrays of the same shapes, on every process.

    A collective: every process calls it, in the same order.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_replicated or x.is_fully_addressable:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def put(tree: Any, layout: Any) -> Any:
    """Host arrays → global arrays, each with its sharding of the tree ``layout``."""
    # By callback: a process makes the pieces of its own devices, and none is sent.
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i]),
        tree,
        layout,
    )


def put_parts(shape: tuple[int, ...], layout: NamedSharding, read: Callable[..., Any]) -> Array:
    """An array on the mesh, of which a process reads the parts of its own devices alone.

    Args:
      read: of a list of indices into the array → its parts there, as host arrays.
    """

    def key(index: Any) -> Any:
        return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

    indices = {
        key(index): index for index in layout.addressable_devices_indices_map(shape).values()
    }
    parts = dict(zip(indices, read(list(indices.values())), strict=True))
    return jax.make_array_from_callback(shape, layout, lambda index: parts[key(index)])


def train_state_shardings(tx: Any, params: Any, layout: Any, mesh: Mesh) -> TrainState:
    """Shardings of a TrainState: optimizer moments lie where their parameters do.

    Args:
      params: the parameters' shapes (ShapeDtypeStruct or arrays).
      layout: their shardings, the same tree.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    # Left to itself, jit would replicate the moments: Adam's are twice the size of the weights.
    moments = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        layout,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(params=layout, opt_state=moments, step=replicated, skipped=replicated)  # type: ignore[arg-type]


def with_layout(tree: Any, layout: Any) -> Any:
    """Shapes, with the shardings of a matching tree."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), tree, layout
    )


HOST, DEVICE = "pinned_host", "device"


"""What jax calls the two memories of a device that take part."""


def to_host(params: Params, mesh: Mesh, field: str) -> Params:
    """Arrays on the mesh → the same arrays in host memory; shapes with layouts likewise.

    Args:
      field: who asks for it, for the error.

    Raises:
      InputError: the mesh's devices have no such memory.
    """
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise InputError(
            f"{field}: {device.device_kind} devices have no {HOST} memory, only "
            f"{', '.join(kinds)}: leave it out"
        )
    return jax.tree.map(lambda x: _move(x, HOST), params)


def at_hand(params: Params) -> Params:
    """The arrays on their devices: those in host memory are copied for as long as the result is
    held, all others are as they are."""
    return jax.tree.map(lambda x: _move(x, DEVICE) if on_host(x) else x, params)


def on_host(x: Any) -> bool:
    """Whether an array, or its shape with a layout, is in host memory."""
    return x.sharding.memory_kind == HOST


def _move(x: Any, kind: str) -> Any:
    layout = x.sharding.with_memory_kind(kind)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
    return jax.device_put(x, layout)
