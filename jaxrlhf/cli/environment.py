"""What has to be set before anything is imported, and what there is."""

import gc
import os
import sys
from pathlib import Path

TURN = 5e-4
"""Seconds that a thread may keep the interpreter while another waits for it; Python's: 5e-3."""

YOUNG = 100_000
"""New objects before the garbage collector looks through them; Python's: 700."""


def settle() -> None:
    """Interpreter settings for a process that is this command's alone: its start is shorter.

    Weights are read while modules are imported and programs traced; reading gives the interpreter
    away at each call into numpy, and would have it back 5 ms later. What is imported and traced
    stays, and the collector would go through all of it again and again.
    """
    sys.setswitchinterval(TURN)
    gc.set_threshold(YOUNG, 10, 10)


def prepare_jax() -> None:
    """Environment variables that JAX reads when it is imported; what the user has set stays."""
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(compile_cache()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # that torch is missing is no news
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def compile_cache() -> Path:
    """Where compiled programs are kept: a folder a jaxlib version and processor.

    Code compiled for one processor may use instructions that another lacks.
    """
    import hashlib
    import platform
    from importlib.metadata import version

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kind = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    text = "\n".join([platform.machine(), platform.processor(), *sorted(kind)])
    cpu = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path.home() / ".cache" / "jaxrlhf" / "xla" / f"{version('jaxlib')}-{cpu}"


def env() -> None:
    """Print the versions that matter in a bug report, and the devices."""
    prepare_jax()
    import platform
    from importlib.metadata import version

    import jax

    print(f"{'python':<18}{platform.python_version()}")
    for name in (
        "jaxrlhf", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
    ):  # fmt: skip
        print(f"{name:<18}{version(name)}")
    kinds = [device.device_kind for device in jax.devices()]
    count = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    print(f"{'devices':<18}{count} ({jax.default_backend()}, {jax.process_count()} process)")
