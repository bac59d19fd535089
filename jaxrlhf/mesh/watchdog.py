"""A process of several ends, and ends the others, when it fails or makes no progress.

A process that fails leaves the others waiting in a collective. So it ends at once, without the
tidying up that would wait for them; they hear no heartbeat from it any more, and end too.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax

from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.signals import Stop

FAILED = 13
"""Exit status of a process that ends because the run cannot go on."""

PATIENCE = 60
"""Seconds until a process says that it still waits for the others."""

FAREWELL = 1.0
"""Seconds that process 0 waits before it ends of bad input, which others may have too."""

CUT = (jax.errors.JaxRuntimeError, ValueError)
"""What JAX raises for an exchange that was cut: ValueError where a program is called with arrays
that were to come of one."""

LOST = ("Gloo", "NCCL", "UNAVAILABLE", "oordination")
"""What is in the error of a process whose exchange with another was cut."""

GRACE = 5
"""Seconds after which what is meant to end a process ends it in a rougher way."""


def end(message: str, status: int = FAILED) -> NoReturn:
    """Say why, and end this process without waiting for any other."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: jax's own handlers at exit would wait for the others.
    os._exit(status)


def _me() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


@contextmanager
def guarded() -> Iterator[None]:
    """End this process at once when what is inside raises, where others would wait for it."""
    try:
        yield
    except BaseException as error:
        # What was asked for: all processes have agreed on it.
        done = isinstance(error, Stop) or (isinstance(error, SystemExit) and not error.code)
        if done or not jax.distributed.is_initialized():
            raise
        if isinstance(error, InputError):
            # JAX aborts the others once it has gone, and those that fail alike say so themselves.
            if jax.process_index() == 0:
                time.sleep(FAREWELL)
            end(f"error: {_me()}: {error}", 2)
        if isinstance(error, CUT) and any(x in str(error) for x in LOST):
            reason = " ".join(str(error).split())[:200]
            end(f"{_me()}: another process has gone or is late ({reason}); see what it said")
        if isinstance(error, KeyboardInterrupt):
            end(f"{_me()}: interrupted; all processes end", 130)
        traceback.print_exc()
        end(f"{_me()}: failed; all processes end")


@contextmanager
def deadline(seconds: float, named: str, late: str) -> Iterator[None]:
    """End this process if what is inside takes longer.

    Args:
      seconds: most time that it may take.
      named: who waits.
      late: what may be wrong, told at the end.
    """
    wait = min(PATIENCE, seconds / 2)
    text = f"{named}: still waiting for the others: did you start every worker?"
    # Timers, not signals: the main thread is inside C++, where no Python handler runs.
    timers = [
        threading.Timer(wait, print, (text,), {"file": sys.stderr, "flush": True}),
        threading.Timer(seconds, end, (f"error: {named}: after {seconds:g} s {late}", 2)),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


LONG = 6
"""How many times longer a phase may take that is known to take long."""

LONGER = 2
"""How many times longer a phase may take than any before it has."""


class Watchdog:
    """``with Watchdog(seconds) as watchdog:`` ends this process when nothing calls ``feed``.

    Args:
      seconds: most time between two calls of ``feed``: LONG times that in a phase that has a name,
        and LONGER times the longest so far, if that is more; 0: there is no watchdog.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._fed = time.monotonic()
        self._longest = 0.0
        self._phase = ""
        self._stop = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._fed = time.monotonic()
        self.feed()
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def feed(self, phase: str = "") -> None:
        """The run goes on, with a phase that may take long if it has a name, such as evaluation."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._fed)
        self._fed, self._phase = now, phase
        # Where C code keeps the interpreter to itself (a regex, say), our thread cannot run either.
        if self.seconds:
            faulthandler.dump_traceback_later(self.limit() + GRACE, exit=True)

    def limit(self) -> float:
        """Seconds that the phase at hand may take."""
        return max(self.seconds * (LONG if self._phase else 1), LONGER * self._longest)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._fed > (limit := self.limit()):
                faulthandler.dump_traceback(all_threads=True)
                during = f" in {self._phase}" if self._phase else ""
                end(
                    f"{_me()}: no progress for {limit:g} s{during} (distributed.watchdog): "
                    "its stacks are above; all processes end"
                )
