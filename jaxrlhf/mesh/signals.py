"""SIGTERM and Ctrl-C: a run that is asked to stop saves what it has, and ends with status 0.

The main thread hears of a signal where it runs Python. ``poll`` raises ``Stop`` between two pieces
of work, and inside ``listening``, a wait for rewards, it is raised at once. Where the main thread
cannot hear (XLA compiles, a device computes) or does not get out, another thread ends the run in
its place after ``GRACE`` seconds, as soon as nothing is lost by it. A second signal ends the
process at once.

Of several processes, one that hears a signal tells the others, which take it for their own.
"""

import itertools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax

from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.messages import exchange, post, posted

GRACE = 3.0
"""Seconds after a signal until the run is ended for a main thread that has not ended it."""

ECHO = 1.0
"""Seconds within which signals count as one: a terminal and a launcher both pass on a Ctrl-C."""

TICK = 0.25
"""Seconds between two looks at what the other processes say."""

AGAIN = "the same command goes on from there"
"""What a run that has stopped says of how to resume."""


class Stop(BaseException):
    """The run has been asked to stop; no Exception, so that nobody takes it for a failed call."""


class Signals:
    """``with Signals() as signals:`` listens, and turns a ``Stop`` into the end of the process.

    Only the main thread can; elsewhere, or inside of another, it does nothing.

    Args:
      leave: exit status with which the process may be ended where its main thread does not hear;
        None: it is not ours to end (a notebook's, a test's), and a stop waits until it is heard.

    Attributes:
      asked: the name of the signal that has come, such as SIGTERM; empty as long as none has.
      turn: held by the main thread while nobody else may save the states or end the process. Whom
        another thread is about to end waits here.
      last_resort: saves what is not saved yet, out of another thread than the main one, and returns
        what to say; None where that cannot be done now.
      nothing_to_lose: whether the process may be ended without further ado.

    Raises:
      SystemExit: with status 0, in place of ``Stop``.
    """

    _count = itertools.count()

    def __init__(self, leave: int | None = None):
        self.asked = ""
        self.turn = threading.RLock()
        self.last_resort: Callable[[], str | None] = lambda: None
        self.nothing_to_lose = True
        self.waits = 0
        self._leave = leave
        self._first = 0.0
        self._several = jax.process_count() > 1
        self._topic = f"stop/{next(Signals._count)}"
        self._over = threading.Event()
        self._waking = threading.Lock()
        self._woken = False
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> "Signals":
        global _listener
        main = threading.current_thread() is threading.main_thread()
        if main and _listener is None:
            _listener = self
            self._restore = self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _listener
        if self._restore is None:
            return
        with self.turn, self._waking:
            self._over.set()
        # What the other thread has sent would find the handlers of before, and end the process.
        while self._woken and not self.asked:
            time.sleep(0.001)
        self._restore()
        _listener = None
        if kind is not None and issubclass(kind, Stop):
            others = [x for x in threading.enumerate() if x is not threading.current_thread()]
            # The interpreter would wait for a program that is being compiled, or for a reward.
            if self._leave is not None and not all(x.daemon for x in others):
                _end(self._leave)
            raise SystemExit(0) from None

    def _listen(self) -> Callable[[], None]:
        """Install handlers and thread; what takes them away again."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            # As with nohup: whoever started us wants it ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                handlers[number] = signal.signal(number, self._hear)
        thread = threading.Thread(target=self._watch, args=(ours,), name="signals", daemon=True)
        thread.start()

        def restore() -> None:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            thread.join()
            ours.close()
            theirs.close()

        return restore

    def _hear(self, number: int, _: Any) -> None:
        """The handler, in the main thread."""
        with self.turn:  # for ever, where the other thread is about to end the process
            again = self._note(number)
        if again and self._leave is None:
            raise KeyboardInterrupt
        if self.waits:
            raise Stop(self.asked)

    def _note(self, number: int) -> bool:
        """Whether it is another signal than the first one and its echo."""
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first = signal.Signals(number).name, now
        return now - self._first > ECHO

    def _watch(self, heard: socket.socket) -> None:
        """Hear what the main thread cannot, and see to it that it has an effect."""
        told = not self._several
        rescue: threading.Thread | None = None
        while not self._over.is_set():
            ready, _, _ = select.select([heard], [], [], TICK)
            for number in heard.recv(64) if ready else ():
                if self._note(number) and self._leave is not None:
                    name = signal.Signals(number).name
                    print(f"{name} again: ends at once", file=sys.stderr)
                    _end(128 + number)
            if not told and self.asked:
                post(self._topic, self.asked)
                told = True
            elif not told and self._said(self._topic):
                self._wake()
            late = self.asked and time.monotonic() - self._first > GRACE
            # In a thread of its own, as another signal may come while it saves.
            if late and self._leave is not None and not (rescue and rescue.is_alive()):
                rescue = threading.Thread(target=self._take_over, args=(self._leave,), daemon=True)
                rescue.start()

    def _wake(self) -> None:
        """Let the main thread hear what another process was told, unless it has gone by now."""
        with self._waking:
            if not self._over.is_set():
                self._woken = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _said(self, topic: str) -> dict[int, str]:
        """What was posted; nothing from a coordinator that has gone."""
        with suppress(jax.errors.JaxRuntimeError):
            return posted(topic)
        return {}

    def _take_over(self, status: int) -> None:
        """End the process in the main thread's place, unless something would be lost."""
        said: str | None = f"stopped by {self.asked}: nothing new was done; {AGAIN}"
        if not self.nothing_to_lose:
            if not self.turn.acquire(timeout=TICK):
                return
            try:
                said = None if self._over.is_set() else self.last_resort()
            except InputError as error:
                said, status = f"error: {error}", 2
            if said is None:
                self.turn.release()
                return
        if jax.process_index() == 0:
            print(said, file=sys.stderr)
        if self._several:
            self._go_last()
        _end(status)

    def _go_last(self) -> None:
        """Tell that this process goes; the first, whose end is the end of all, waits for them."""
        topic = f"{self._topic}/left"
        with suppress(jax.errors.JaxRuntimeError):
            post(topic, "")
        until = time.monotonic() + GRACE
        while jax.process_index() == 0 and time.monotonic() < until:
            if len(self._said(topic)) == jax.process_count():
                return time.sleep(TICK)
            time.sleep(0.05)


_listener: Signals | None = None
"""The one in use: signals are the process's, and so is this."""


@contextmanager
def listening() -> Iterator[None]:
    """A wait on the host in the main thread that a signal ends at once, by ``Stop``.

    Of several processes, the others must be told of it: see ``processes.all_or_none``.
    """
    here = _listener
    if here is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    here.waits += 1
    try:
        if here.asked:
            raise Stop(here.asked)
        yield
    finally:
        here.waits -= 1


def poll() -> None:
    """Raise ``Stop`` if this process, or another, has been asked to stop; all call it together."""
    for asked in exchange(_listener.asked if _listener is not None else ""):
        if asked:
            raise Stop(asked)


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
