"""``jaxrlhf`` in a process of its own, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

MAIN = "import sys; from jaxrlhf.apps.cli import main; sys.exit(main())"


def tool(name):
    """A program that pip has installed beside this interpreter, which need not be on the PATH."""
    return str(Path(sys.executable).parent / name)


def run(*words, code=MAIN, **variables):
    """Wait for its end; output and errors are apart."""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def one_device():
    """For ``XLA_FLAGS``: no fake devices, and compiled as fast as in the tests' own process."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")


def start(*words, **variables):
    """Do not wait; output and errors are one stream."""
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *words],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
