"""Frozen weights that lie in the hosts' memory, and on the devices only while a step reads them.

A host keeps the pieces of its own devices, each split as it was, so nothing is sent between hosts.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.errors import InputError
from jaxrlhf.types import Params

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
