"""``jaxrlhf env``: what matters in a bug report, on a machine that is not set up right too."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import jax

from jaxrlhf.mesh.backend import driver, no_devices, unused_gpu

NEEDED = ("jaxrlhf", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
"""Packages that are always named."""

OTHERS = ("jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "tensorboardX", "wandb", "trackio")
"""Those that are named where they are installed."""


def lines() -> Iterator[str]:
    """Versions, then devices, or why there are none."""
    yield _line("python", platform.python_version())
    for name in NEEDED:
        yield _line(name, _version(name) or "not installed")
    yield from (_line(name, found) for name in OTHERS if (found := _version(name)))
    if found := driver():
        yield _line("NVIDIA driver", found)
    if problem := no_devices():
        yield _line("devices", f"none: {problem}")
        return
    kinds = [device.device_kind for device in jax.devices()]
    count = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    yield _line("devices", f"{count} ({jax.default_backend()}, {jax.process_count()} process)")
    if unused := unused_gpu(jax.default_backend()):
        yield _line("", unused)


def _line(name: str, text: str) -> str:
    return f"{name:<20}{text}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
