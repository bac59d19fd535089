"""Which devices a plan is for, by name, and what they can do. Does not import jax."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from jaxrlhf.core.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A device, as far as a roofline sees it; a link's direction counts once."""

    kind: str
    """What jax calls it: the start of its ``device_kind``."""
    torus: int
    """Dimensions of a slice of TPUs; 0 for other devices."""
    memory: float
    """Bytes that a program may use: what is left of its HBM after the compiler's reserve."""
    flops: float
    """Peak FLOP/s, dense bfloat16."""
    bandwidth: float
    """Bytes/s to and from its memory."""
    link: float
    """Bytes/s that one device sends during a collective along one mesh axis."""
    source: str
    """Where the numbers are from."""


TPU = "cloud.google.com/tpu/docs; memory as XLA reports it; link: one torus dimension, both ways"
GPU = "NVIDIA data sheet, SXM; memory less 6 % for the runtime; link: NVLink, one way"
HOST = "nominal, to compare layouts with; not a measurement"

CHIPS = {
    "v4": Chip("TPU v4", 3, 30.75 * GIB, 275e12, 1228e9, 100e9, TPU),
    # before v5p, whose kind ("TPU v5" or "TPU v5p") is the start of this one
    "v5e": Chip("TPU v5 lite", 2, 15.75 * GIB, 197e12, 819e9, 100e9, TPU),
    "v5p": Chip("TPU v5", 3, 95.74 * GIB, 459e12, 2765e9, 200e9, TPU),
    "v6e": Chip("TPU v6 lite", 2, 31.25 * GIB, 918e12, 1638e9, 200e9, TPU),
    "a100": Chip("NVIDIA A100", 0, 0.94 * 80e9, 312e12, 2039e9, 300e9, GPU),
    "h100": Chip("NVIDIA H100", 0, 0.94 * 80e9, 989e12, 3350e9, 450e9, GPU),
    "h200": Chip("NVIDIA H200", 0, 0.94 * 141e9, 989e12, 4800e9, 450e9, GPU),
    "cpu": Chip("cpu", 0, 16 * GIB, 1e11, 2e10, 1e10, HOST),
}
"""Name → facts. Published peaks are not reached: a roofline is a lower bound of the time."""


@dataclass(frozen=True)
class Topology:
    """Devices that a plan is made for."""

    name: str
    chip: str
    """A key of ``CHIPS``; "" for the devices that are here, until they are asked."""
    devices: int
    """How many; 0 for those that are here."""
    compiler: Literal["tpu", "cpu", "here"]
    """What compiles: libtpu, the CPU compiler on as many fake devices, or the one that is here."""


def parse(name: str) -> Topology:
    """The topology that a name describes.

    ``v5e:16x16`` (also v4, v5p, v6e: chips along each dimension of the slice's torus); ``cpu:8``,
    fake CPU devices; ``h100:8`` (also a100, h200), as many fake CPU devices with that GPU's memory
    and speeds, whose temporaries are then the CPU compiler's; ``here``, the devices jax finds.

    Raises:
      InputError: the name is none of these.
    """
    if name == "here":
        return Topology(name, "", 0, "here")
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--topology {name}: unknown device; give {', '.join(CHIPS)} or here")
    torus = CHIPS[kind].torus
    dims = torus or 1
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dims), shape):
        example = {1: "8", 2: "16x16", 3: "8x8x4"}[dims]
        raise InputError(
            f"--topology {name}: {kind} takes {dims} size{'s' * (dims > 1)}, as in {kind}:{example}"
        )
    count = math.prod(int(size) for size in shape.split("x"))
    return Topology(name, kind, count, "tpu" if torus else "cpu")


def environment(topology: Topology, xla_flags: str = "") -> dict[str, str]:
    """Variables to set before jax is imported, so that it finds such devices.

    Args:
      xla_flags: XLA_FLAGS as they are.
    """
    if topology.compiler == "here":
        return {}
    # whatever accelerator is here stays out of it
    variables = {"JAX_PLATFORMS": "cpu"}
    if topology.compiler == "tpu":
        return variables | {
            # the cache would read programs back onto devices, and there are none
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            # several plan at once: none of them has a TPU
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            # what libtpu would ask a metadata server
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": f"{topology.chip}-{topology.devices}",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    fake = f"--xla_force_host_platform_device_count={topology.devices}"
    return {**variables, "XLA_FLAGS": f"{xla_flags} {fake}".strip()}


def chip_of(kind: str) -> str:
    """The name here of a device that jax calls ``kind``.

    Raises:
      InputError: it is not in the table.
    """
    for name, chip in CHIPS.items():
        if kind.startswith(chip.kind):
            return name
    raise InputError(f"--topology here: nothing is known of {kind!r}; name one, such as v5e:2x4")
