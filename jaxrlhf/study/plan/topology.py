"""Which devices a plan is for, by name. Does not import jax."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.chips import CHIPS, name_of


@dataclass(frozen=True)
class Topology:
    """Devices that a plan is made for."""

    name: str
    chip: str
    """A key of ``CHIPS``; "" for the devices that are here, until they are asked."""
    devices: int
    """How many; 0 for those that are here."""
    compiler: Literal["tpu", "gpu", "cpu", "here"]
    """What compiles: libtpu, XLA's for GPUs, the CPU compiler on as many fake devices, or the one
    that is here."""


def parse(name: str, gpus: bool = False) -> Topology:
    """The topology that a name describes.

    ``v5e:16x16`` (also v4, v5p, v6e: chips along each dimension of the slice's torus); ``cpu:8``,
    fake CPU devices; ``h100:8`` (also a100, h200, b200, rtx4090), GPUs; ``here``, the devices jax
    finds.

    Args:
      gpus: XLA's compiler for GPUs is installed. Without it GPUs are as many fake CPU devices with
        their memory and speeds, whose temporaries are then the CPU compiler's.

    Raises:
      InputError: the name is none of these.
    """
    if name == "here":
        return Topology(name, "", 0, "here")
    kind, _, shape = name.partition(":")
    if hint := _by_count(name):
        raise InputError(f"--topology {name}: how its chips lie is missing: give {hint}")
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
    if torus:
        return Topology(name, kind, count, "tpu")
    return Topology(name, kind, count, "gpu" if gpus and kind != "cpu" else "cpu")


def _by_count(name: str) -> str:
    """The name here of what a cloud calls v5e-256: the most compact shape; "" of another name."""
    match = re.fullmatch(r"(\w+)-([1-9]\d*)", name)
    kind = {"v5litepod": "v5e"}.get(match[1], match[1]) if match else ""
    if not match or kind not in CHIPS:
        return ""
    dims = CHIPS[kind].torus or 1
    # Slices in three dimensions are named by their cores, of which a chip has two.
    chips = int(match[2]) // (2 if dims == 3 else 1)
    if chips < 1 or chips & (chips - 1):
        return ""
    twos = chips.bit_length() - 1
    # As they are written: 2x4, and 2x2x1.
    sizes = sorted((2 ** ((twos + i) // dims) for i in range(dims)), reverse=dims == 3)
    return f"{kind}:{'x'.join(map(str, sizes))}"


WHOLE_PRODUCTS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
"""libtpu's flag, as launch/env.sh has it, for products that wait for all of a weight."""


def environment(
    topology: Topology, given: Mapping[str, str] | None = None, tools: Path | None = None
) -> dict[str, str]:
    """Variables to set before jax is imported, so that it finds such devices.

    Args:
      given: variables as they are, of which XLA_FLAGS and LIBTPU_INIT_ARGS are kept.
      tools: of GPUs, the folder of NVIDIA's assembler.
    """
    if topology.compiler == "here":
        return {}
    given = given or {}
    # whatever accelerator is here stays out of it
    variables = {"JAX_PLATFORMS": "cpu"}
    if topology.compiler == "tpu":
        flags = given.get("LIBTPU_INIT_ARGS", "")
        if WHOLE_PRODUCTS.partition("=")[0] not in flags:
            flags = f"{flags} {WHOLE_PRODUCTS}".strip()
        return variables | {
            # a plan is of what a launcher starts
            "LIBTPU_INIT_ARGS": flags,
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
    if topology.compiler == "gpu":
        # a choice among kernels by their time needs the device
        fake += f" --xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={tools}"
        variables |= {
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            # that there is no driver is no fault here
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        }
    return {**variables, "XLA_FLAGS": f"{given.get('XLA_FLAGS', '')} {fake}".strip()}


def chip_of(kind: str) -> str:
    """The name here of a device that jax calls ``kind``.

    Raises:
      InputError: it is not in the table.
    """
    if (name := name_of(kind)) is None:
        raise InputError(
            f"--topology here: nothing is known of {kind!r}; name one, such as v5e:2x4"
        )
    return name
