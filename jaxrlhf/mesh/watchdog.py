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
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax

from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.messages import post, posted, withdraw
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


class ElsewhereError(ValueError):
    """Another process has failed; it says itself with what."""


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
        if isinstance(error, ElsewhereError):
            end(f"{_me()}: {error}")
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

USUAL = 8
"""Phases without a name after which it is known how long they take here."""

QUICK = 40.0
"""Seconds that a phase may take whose like have all been quicker, where the limit is learnt."""

SLOWER = 5
"""How many times longer than any of its like it may take there."""

LEFT = 30.0
"""Seconds that one may wait for others where one of them has left."""

COMPILES = ("compiler.py", "mlir.py", "partial_eval.py")
"""Files of jax that are at work where a program is made."""


class Watchdog:
    """``with Watchdog(seconds) as watchdog:`` ends this process when nothing calls ``feed``.

    Args:
      seconds: most time between two calls of ``feed``: LONG times that in a phase that has a name,
        and LONGER times the longest so far, if that is more; 0: there is no watchdog.
      learns: once USUAL phases without a name are seen, the next may take SLOWER times the longest
        of them, QUICK at least, if that is less: but where a process compiles a program.
    """

    def __init__(self, seconds: float, learns: bool = False):
        self.seconds = seconds
        self._learns = learns
        self._fed = time.monotonic()
        self._longest = 0.0
        self._usual: deque[float] = deque(maxlen=64)
        self._phase = ""
        self._several = jax.distributed.is_initialized()
        self._compiles = False
        self._stop = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._fed = time.monotonic()
        self._main = threading.get_ident()
        self.feed()
        self._usual.clear()
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
        spent = now - self._fed
        self._longest = max(self._longest, spent)
        if not self._phase:
            self._usual.append(spent)
        self._fed, self._phase = now, phase
        # Where C code keeps the interpreter to itself (a regex, say), our thread cannot run either.
        if self.seconds:
            faulthandler.dump_traceback_later(self.most() + GRACE, exit=True)

    def leave(self) -> None:
        """Tell the others that this process does nothing with them any more."""
        if self._several:
            with suppress(jax.errors.JaxRuntimeError):  # they have gone
                post("left", "")

    def most(self) -> float:
        """Seconds that the phase at hand may take, whatever is known of its like."""
        return max(self.seconds * (LONG if self._phase else 1), LONGER * self._longest)

    def limit(self) -> float:
        """Seconds that the phase at hand may take where nobody compiles."""
        if self._phase or not self._learns or len(self._usual) < USUAL:
            return self.most()
        return min(self.most(), max(QUICK, SLOWER * max(self._usual)))

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            self._say_compiling()
            waited = time.monotonic() - self._fed
            limit = self.limit()
            if waited > limit and limit < self.most() and self._said("compiling"):
                limit = self.most()
            gone = () if self._phase or waited < LEFT else self._said("left")
            if waited > limit or gone:
                faulthandler.dump_traceback(all_threads=True)
                during = f" in {self._phase}" if self._phase else ""
                others = f"; process {min(gone)} has left" if gone else ""
                end(
                    f"{_me()}: no progress for {round(min(waited, limit), 1):g} s{during} "
                    f"(distributed.watchdog){others}: its stacks are above; all processes end"
                )

    def _say_compiling(self) -> None:
        """Tell the others when this process begins to make a program, and when it has."""
        now = self._several and _makes_a_program(self._main)
        if now != self._compiles:
            with suppress(jax.errors.JaxRuntimeError):  # told by the error in the main thread
                post("compiling", "") if now else withdraw("compiling")
                self._compiles = now

    def _said(self, topic: str) -> Collection[int]:
        """The processes that have said it."""
        if not self._several:
            return ()
        with suppress(jax.errors.JaxRuntimeError):
            return posted(topic)
        return ()


def _makes_a_program(thread: int) -> bool:
    """Whether jax makes a program in a thread, which took minutes for some."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith(COMPILES) and f"{os.sep}jax{os.sep}_src{os.sep}" in path:
            return True
        frame = frame.f_back
    return False
