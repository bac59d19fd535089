"""What the command line is made of: its table of commands, and the process that it runs in."""

import codecs
import gc
import hashlib
import importlib
import io
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import tyro

from jaxrlhf.core.errors import InputError

COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {}
"""Name → (what the help says of it, a function of the words after it), as the help lists them."""


def command(name: str, text: str, raw: bool = False) -> Callable[[Callable], Callable]:
    """Enter what it decorates in COMMANDS: a function of words if ``raw``, else ``typed``."""

    def enter(function: Callable) -> Callable:
        COMMANDS[name] = (text, function if raw else typed(function))
        return function

    return enter


def typed(function: Callable[..., None]) -> Callable[[list[str]], None]:
    """A function of words that parses them by a signature and its docstring."""

    def run(words: list[str]) -> None:
        tyro.cli(function, prog=f"jaxrlhf {function.__name__}", args=words)

    return run


@contextmanager
def importable(*folders: str | Path) -> Iterator[None]:
    """Modules of these folders can be imported inside, here and in workers that are started, and
    after all others: a file of the user's hides none of a library."""
    added = [str(Path(folder).absolute()) for folder in folders]
    sys.path.extend(added)
    try:
        yield
    finally:
        for entry in added:
            # The last of it: it may have been there before, and stays.
            with suppress(ValueError):
                del sys.path[len(sys.path) - 1 - sys.path[::-1].index(entry)]


TURN = 5e-4
"""Seconds that a thread may keep the interpreter while another waits for it; Python's: 5e-3."""

YOUNG = 100_000
"""New objects before the garbage collector looks through them; Python's: 700."""


def settle() -> None:
    """Interpreter settings for a process that is this command's alone: its start is shorter."""
    # Weights are read while modules are imported and programs traced; reading gives the interpreter
    # away at each call into numpy, and would have it back 5 ms later.
    sys.setswitchinterval(TURN)
    # What is imported and traced stays: the collector would go through it again and again.
    gc.set_threshold(YOUNG, 10, 10)


ENDING = 30.0
"""Seconds that a process of the command's may take to end, once the command has."""


def end_soon(status: int) -> None:
    """See that this process ends with the status of its command, which has done all that it has to.

    The interpreter waits for every thread that is left; one of a library's may wait for ever, as
    was seen where a full disk had cut a save short. Those that are left are named on stderr.
    """

    def leave() -> None:
        left = [x.name for x in threading.enumerate() if not x.daemon and x.name != "MainThread"]
        with suppress(Exception):
            print(f"ended {ENDING:g} s after all was done; still there: {left}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(status)

    timer = threading.Timer(ENDING, leave)
    timer.daemon = True
    timer.start()


def prepare_jax() -> None:
    """Environment variables that JAX reads when it is imported; what the user has set stays."""
    defaults = {
        # Every program is kept, however small and quick to compile: a start has many of those.
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
    """Where compiled programs are kept: a folder a jaxlib version and processor."""
    # Code compiled for one processor may use instructions that another lacks.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    kind = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    text = "\n".join([platform.machine(), platform.processor(), *sorted(kind)])
    cpu = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path.home() / ".cache" / "jaxrlhf" / "xla" / f"{version('jaxlib')}-{cpu}"


def never_refuse(stream: TextIO) -> None:
    """Have a stream write ``?`` for what its encoding lacks, where it would raise."""
    if isinstance(stream, io.TextIOWrapper):
        lacking = codecs.lookup(stream.encoding).name != "utf-8"
        if lacking or stream.errors == "strict":
            stream.reconfigure(errors="replace")


def as_text(word: str) -> str:
    """A word of the command line that is no file's name, read as UTF-8 whatever the locale.

    Raises:
      InputError: it is not UTF-8.
    """
    if not any("\udc80" <= c <= "\udcff" for c in word):
        return word
    # What a locale cannot read, Python hands on as bytes in disguise (PEP 383).
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        raise InputError(f"{word!a:.80}: is not UTF-8: write it so") from None


def beyond_locale(error: UnicodeEncodeError) -> str:
    """What to say of a file's name that the locale cannot say."""
    name = ascii(error.object[-60:])  # of a path its end, where the name is
    return (
        f"{name}: the locale's encoding, {error.encoding}, has no such name of a "
        "file: set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
    )


def no_devices() -> str:
    """Why JAX has no device, if it has been imported and has none; else ""."""
    if "jax" not in sys.modules:
        return ""
    # Imported by the command that has failed, in as far as it came.
    backend = importlib.import_module("jaxrlhf.mesh.backend")
    return backend.no_devices()
