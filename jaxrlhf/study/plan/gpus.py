"""NVIDIA GPUs as XLA's compiler wants them described, so that it compiles where there is none.

The compiler is that of jax's CUDA plugin, an extra. Does not import jax.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from jaxrlhf.mesh.chips import CHIPS, GIB


@dataclass(frozen=True)
class Gpu:
    """Facts of a device, from NVIDIA's tuning guides, white papers and data sheets."""

    name: str
    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    lanes: int
    """Float32 units of each."""
    shared: int
    """Bytes of shared memory of each; a block may have 1 KiB less."""
    cache: int
    """Bytes of the second-level cache."""
    clock: float
    """GHz, at most."""
    memory: float
    """Bytes in all."""


MIB = 2**20

GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 << 10, 40 * MIB, 1.41, 79.25 * GIB),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 << 10, 50 * MIB, 1.98, 79.1 * GIB),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 228 << 10, 50 * MIB, 1.98, 141 * GIB),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 228 << 10, 126 * MIB, 1.965, 178 * GIB),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 100 << 10, 72 * MIB, 2.52, 24 * GIB
    ),
}


def tools() -> Path | None:
    """The folder of NVIDIA's assembler, if it, cuDNN and jax's CUDA plugin are there; else None.

    cuDNN builds its attention while a program is compiled.
    """
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        return None
    # a namespace package: its parts may lie in several places
    spec = importlib.util.find_spec("nvidia")
    places = (spec and spec.submodule_search_locations) or ()
    folders = [Path(place) for place in places]
    if not any((folder / "cudnn" / "lib").is_dir() for folder in folders):
        return None
    found = (folder / "cuda_nvcc" for folder in folders)
    return next((folder for folder in found if (folder / "bin" / "ptxas").is_file()), None)


def described(chip: str) -> str:
    """A GPU as the text of XLA's ``GpuTargetConfigProto``; ``chip`` is a key of ``GPUS``."""
    gpu = GPUS[chip]
    facts = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": gpu.shared - 1024,
        "shared_memory_per_core": gpu.shared,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(CHIPS[chip].bandwidth),
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": int(gpu.memory),
    }
    inside = " ".join(f"{name}: {value}" for name, value in facts.items())
    major, minor = gpu.capability
    return (
        f"gpu_device_info {{ {inside} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
        f'device_description_str: "{gpu.name}"\n'
    )
