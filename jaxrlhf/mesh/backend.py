"""What devices JAX has found, in words; and what to do where it finds none, or not the GPU."""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.core.errors import to_install
from jaxrlhf.core.shown import one_line
from jaxrlhf.mesh.chips import GIB

DRIVER = Path("/proc/driver/nvidia/version")
"""Where Linux says which NVIDIA driver is loaded."""

CUDA_13 = 580
"""The oldest driver that runs CUDA 13; CUDA 12 runs on older ones."""

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
"""What JAX reaches NVIDIA's GPUs by, one a version of CUDA."""


def described(mesh: Mesh, dtype: str) -> str:
    """One line about where a run is: backend, devices, memory, dtype, mesh, processes."""
    devices = mesh.devices.flatten()
    first = devices[0]
    memory = _memory(first)
    if first.platform == "cpu":
        memory = f"{memory} of memory" if memory else ""
    else:
        memory = f"{memory} each" if memory else ""
    axes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
    kind = first.device_kind
    named = f"{len(devices)} device{'s' * (len(devices) > 1)}"
    parts = [
        named if kind == first.platform else f"{len(devices)} x {kind}",
        memory,
        dtype,
        f"mesh {', '.join(axes) or 'of one device'}",
        f"{jax.process_count()} processes" if jax.process_count() > 1 else "",
    ]
    return f"{first.platform}: " + "; ".join(filter(None, parts))


def _memory(device: Any) -> str:
    """How much a device has, GiB; of a CPU the machine's; "" where nobody says."""
    if device.platform == "cpu":
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        # None of devices of other processes, which answer no questions here.
        local = device.process_index == jax.process_index()
        size = ((device.memory_stats() if local else None) or {}).get("bytes_limit", 0)
    return f"{size / GIB:.1f} GiB" if size else ""


def unused_gpu(platform: str) -> str:
    """What to say of a GPU that a run on the CPU leaves alone; "" if there is none, or the user has
    asked for the CPU.

    Args:
      platform: what the run is on.
    """
    found = driver()
    if platform != "cpu" or not found or _asked():
        return ""
    if installed := plugin():
        why = f"{installed} is installed and finds no GPU (JAX has said why)"
    else:
        why = "JAX's part for CUDA is not installed"
    return (
        f"this machine has an NVIDIA driver ({found}), and the run is on the CPU: {why}: {_get()}"
    )


def no_devices() -> str:
    """Why JAX has no device at all, and the remedy, in one line; "" if it has some."""
    try:
        jax.devices()
    except Exception as error:  # of several kinds; an assertion without a word is one
        said = f" ({one_line(error)})" if str(error) else ""
        return f"JAX_PLATFORMS={_asked()}: JAX finds no such device{said}: {_remedy()}"
    return ""


def _remedy() -> str:
    alone = "or leave JAX_PLATFORMS out, to run on what there is"
    if not {"cuda", "gpu"} & set(_asked().split(",")):
        return f"mend it, {alone}"
    if not driver():
        return f"there is no NVIDIA driver ({DRIVER}): install one, and {_get()}, {alone}"
    if plugin():
        return f"{plugin()} is there, and the driver is {driver()}: again {_get()}, {alone}"
    return f"{_get()}, {alone}"


def _get() -> str:
    """How to install what the driver runs."""
    major = re.match(r"\d+", driver())
    old = major is not None and int(major[0]) < CUDA_13
    text = to_install("cuda12" if old else "cuda13")
    return text if major else f"{text} (cuda12 for a driver older than {CUDA_13})"


def driver() -> str:
    """The version of the NVIDIA driver, such as 580.65.06; "of unknown version" where only
    nvidia-smi shows that there is one; "" without one."""
    if DRIVER.exists():
        found = re.search(r"\b\d{3,}(\.\d+)+", DRIVER.read_text(encoding="utf-8", errors="replace"))
        return found[0] if found else "of unknown version"
    return "of unknown version" if shutil.which("nvidia-smi") else ""


def plugin() -> str:
    """JAX's part for CUDA that is installed; "" without one."""
    return next((name for name in PLUGINS if importlib.util.find_spec(name)), "")


def _asked() -> str:
    return str(getattr(jax.config, "jax_platforms", None) or "")
