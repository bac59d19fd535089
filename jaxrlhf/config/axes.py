"""A mesh's axes: how many devices lie along each, and what has to divide by them."""

import math
from collections.abc import Iterator
from dataclasses import replace

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.config.run import MeshConfig
from jaxrlhf.core.errors import InputError

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""The axes of every mesh, outermost first: devices that lie close exchange along the last."""


def sizes_of(mesh: MeshConfig) -> dict[str, int]:
    """Axis → devices along it, outermost first."""
    return {name: getattr(mesh, name) for name in AXES}


def resolve_mesh(mesh: MeshConfig, devices: int) -> MeshConfig:
    """``mesh`` with its -1, if any, replaced by what is left of ``devices``.

    Raises:
      InputError: if the axes do not multiply to the number of devices, or none can lie across
        slices.
    """
    sizes = sizes_of(mesh)
    named = " · ".join(f"{name}={size}" for name, size in sizes.items())
    for problem in axes_problems(mesh):
        raise InputError(problem)
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise InputError(f"mesh: {named} does not make {devices} devices: change one axis")
    mesh = replace(mesh, **sizes)
    across_slices(mesh)
    return mesh


def across_slices(mesh: MeshConfig) -> str:
    """The axis that lies across slices; of a mesh without -1.

    Raises:
      InputError: neither of those that may divides by their number.
    """
    # Slices are far apart: only the axes that exchange little may lie across them.
    for axis in ("data", "fsdp"):
        if getattr(mesh, axis) % mesh.slices == 0:
            return axis
    raise InputError(
        f"mesh.slices={mesh.slices}: neither data={mesh.data} nor fsdp={mesh.fsdp} divides by it, "
        "and one of them has to lie across the slices: change it"
    )


def check_mesh(
    mesh: MeshConfig, decoder: DecoderConfig, devices: int, rows: int, slots: int = 0
) -> MeshConfig:
    """Refuse a mesh that does not divide what is laid out on it.

    Args:
      devices: how many there are, over all hosts.
      rows: of one microbatch (``rows_at_once``).
      slots: of the sampler (``sample.slots``).

    Returns:
      The mesh, its -1 resolved.

    Raises:
      InputError: the first size that an axis does not divide, as ``heads=9 % tensor=2``.
    """
    mesh = resolve_mesh(mesh, devices)
    for axis, pieces, sizes in _laid_out(mesh, decoder):
        # What would divide is said, so that nobody has to search for it.
        whole = math.gcd(*sizes.values(), devices)
        fits = ", ".join(str(size) for size in range(1, whole + 1) if whole % size == 0)
        named = " · ".join(f"mesh.{part}" for part in axis.split("·"))
        for name, size in sizes.items():
            if size % pieces:
                raise InputError(
                    f"{name}={size} % {axis}={pieces} is not 0: "
                    f"{named} can be {fits} with this model on {devices} devices"
                )
    shards = mesh.data * mesh.fsdp * mesh.expert
    named = "data·fsdp·expert" if mesh.expert > 1 else "data·fsdp"
    if rows % shards:
        raise InputError(
            f"rows={rows} % ({named})={shards} is not 0: change mesh, data.batch_size, sample.n, "
            "minibatches or microbatches, so that the rows of a microbatch divide"
        )
    if slots % (shards * mesh.context):
        raise InputError(
            f"sample.slots={slots} % ({named}·context)={shards * mesh.context} is not 0: each "
            "device has slots of its own: give a multiple"
        )
    return mesh


def _laid_out(
    mesh: MeshConfig, decoder: DecoderConfig
) -> Iterator[tuple[str, int, dict[str, int]]]:
    """(axes, in how many pieces they split, sizes of the decoder that these have to divide)."""
    moe = decoder.moe
    split = {name: getattr(decoder, name) for name in ("heads", "kv_heads", "mlp", "vocab")}
    some = {
        "full_kv_heads": decoder.full_kv_heads,
        "moe.beside": moe.beside if moe else 0,
        "shared_mlp": decoder.shared_mlp,
    }
    yield "tensor", mesh.tensor, split | {name: size for name, size in some.items() if size}
    yield "expert", mesh.expert, {"experts": moe.experts if moe else 1}
    weights = ("fsdp", *(name for name in ("expert", "context") if getattr(mesh, name) > 1))
    embedded = {"embed": decoder.embed}
    if decoder.layer_embed:
        embedded["layers·layer_embed"] = decoder.layers * decoder.layer_embed
    yield "·".join(weights), math.prod(sizes_of(mesh)[x] for x in weights), embedded


def axes_problems(mesh: MeshConfig) -> Iterator[str]:
    """What is wrong with the numbers themselves, a line each."""
    sizes = sizes_of(mesh)
    for name, size in sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{name}={size}: must be at least 1, or -1 for the rest of the devices"
    if mesh.slices < 1:
        yield f"mesh.slices={mesh.slices}: must be at least 1"
    if list(sizes.values()).count(-1) > 1:
        named = ", ".join(f"{name}={size}" for name, size in sizes.items())
        yield f"mesh: {named}: only one axis may be -1, the rest of the devices"
