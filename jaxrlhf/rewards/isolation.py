"""Functions and verifiers as sources: called in worker processes, or in this one.

What is this package's own is called here. A user's function, and the verifiers that are other
people's packages, run code that nobody has looked at, and often text that a model has written: they
are called in a worker of the run. One that raises, exits, crashes or exceeds its deadline ends the
run with an error that names it; with ``isolate`` it costs the rows of that call.

Workers are started afresh, never forked: a fork of a process with JAX's threads can hang. What they
say is JSON (``channel``), and counted for nothing unless it has the number of the request, which is
drawn at random, and one score a row.
"""

import contextlib
import math
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxrlhf.config import IsolateConfig, RewardConfig, name_of
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.channel import ChannelError, ClosedError, receive, send
from jaxrlhf.rewards.functions import MEND, Asked, FunctionError, Scored, Source, call
from jaxrlhf.rewards.signature import signature_of
from jaxrlhf.rewards.worker import LONGEST, READ, host_function

START_SECONDS = 120.0
"""Seconds that a process may take to import the function."""

FOREIGN = ("math", "reasoning_gym")
"""The verifiers that are other packages."""

GRACE = 5.0
"""Seconds that a process may take to end."""

ROW, SAID = 64, 8 * LONGEST
"""Most bytes of an answer: of each score, and of what else is said."""


def host_source(config: RewardConfig, workers: int = 1, devices: bool = False) -> Source:
    """What asks ``host_function``, in processes of its own where it is not this package's.

    Args:
      workers: processes that take calls at once; with ``isolate``, that has its own number.
      devices: whether they may use the accelerators through JAX, which this process then does not.

    Raises:
      InputError: the function cannot be had.
    """
    if config.isolate or is_foreign(config):
        return Isolated(config, workers, devices)
    return InProcess(config)


def is_foreign(config: RewardConfig) -> bool:
    """Whether a source runs code of others, which it is not to run in this process."""
    return not config.in_process and (config.verifier in FOREIGN or is_users(config))


def is_users(config: RewardConfig) -> bool:
    """Whether it is a user's function: one that is not this package's."""
    return ":" in config.function and not config.function.startswith("jaxrlhf.")


def texts_of(config: RewardConfig, asked: Asked) -> tuple[list[Any], list[Any]]:
    """Prompts and completions as a source is given them: text, to a user's function messages."""
    if is_users(config):
        return asked.as_messages()
    return list(asked.prompts), list(asked.completions)


class InProcess:
    """A source that calls a function or verifier in this process.

    Attributes:
      needs: the columns of the data that it cannot do without.
      ids: whether it asks for token ids.

    Raises:
      InputError: the function cannot be had.
    """

    def __init__(self, config: RewardConfig):
        self._config, self._function = config, host_function(config)
        how = signature_of(self._function)
        self.needs, self.ids = how.needs, how.ids

    def __call__(self, asked: Asked) -> Scored:
        name, texts = name_of(self._config), texts_of(self._config, asked)
        return call(name, self._function, *texts, asked.columns, asked.ids)


def check_host(config: RewardConfig) -> None:
    """Refuse a function or verifier that cannot be had; an InputError says why."""
    source = host_source(config)
    if isinstance(source, Isolated):
        source.close()


class Isolated:
    """A source that calls a function or verifier in worker processes.

    With ``isolate`` a call has at most ``chunk`` rows, and one that fails costs them their score.
    Without, a call has all rows, and one that fails is an InputError that names the function.

    One process is started at once, so that a function which cannot be imported is found early, the
    others when they are needed. They end with this object, or with the process that holds it.

    Attributes:
      needs, ids: as of ``InProcess``.

    Raises:
      InputError: the function cannot be had.
    """

    def __init__(self, config: RewardConfig, workers: int = 1, devices: bool = False):
        self._config, self._devices = config, devices
        whole = IsolateConfig(workers, sys.maxsize, config.timeout, math.inf)
        self._limits = config.isolate or whole
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._workers: list[_Worker | None] = [None] * self._limits.workers
        for slot in range(self._limits.workers):
            self._free.put(slot)
        first = self._workers[0] = _Worker(config, self._limits, devices)
        self.needs, self.ids = first.needs, first.ids
        # Of the list and not of self: a finalizer that holds its object never runs.
        self.close = weakref.finalize(self, _stop, self._workers)

    def __call__(self, asked: Asked) -> Scored:
        # Calls of ``chunk`` rows, ``workers`` of them at once.
        with ThreadPoolExecutor(self._limits.workers) as threads:
            try:
                return Scored.join(list(threads.map(self._call, asked.split(self._limits.chunk))))
            except BaseException:
                # Who is interrupted here does not wait for answers that nobody wants any more.
                _stop(self._workers)
                raise

    def _call(self, asked: Asked) -> Scored:
        columns = {name: list(values) for name, values in asked.columns.items()}
        prompts, completions = texts_of(self._config, asked)
        ids = None if asked.ids is None else [[*row] for row in asked.ids]
        rows = {"prompts": prompts, "completions": completions, "columns": columns, "ids": ids}
        slot = self._free.get()
        try:
            worker = self._workers[slot]
            if worker is None or worker.process.poll() is not None:
                worker = _Worker(self._config, self._limits, self._devices)
                self._workers[slot] = worker
            scores, problem = worker.ask(rows, len(asked))
        except (InputError, OSError) as error:  # the next call tries again to start one
            scores, problem = None, f"its process could not be started: {error}"
        finally:
            self._free.put(slot)
        if scores is not None:
            return Scored.of(scores)
        problem = " ".join(problem.split())
        if not self._config.isolate:
            raise FunctionError(name_of(self._config), problem, MEND)
        return Scored(np.full(len(asked), np.nan), problem)


class _Worker:
    """One process, ready to be asked."""

    def __init__(self, config: RewardConfig, limits: IsolateConfig, devices: bool):
        self._limits = limits
        self.socket, theirs = socket.socketpair()
        # It imports from where this process does, and, by -P, from nowhere else.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "jaxrlhf.rewards.supervisor", str(theirs.fileno())],
                # The accelerators are this process's, unless it leaves them to the worker.
                env={**os.environ, "PYTHONPATH": path}
                | ({} if devices else {"JAX_PLATFORMS": "cpu"}),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.PIPE,  # never written to: that it is open says that we live
                stdout=2,  # what a function prints is no output of this process
                start_new_session=True,  # Ctrl-C is this process's to hear
            )
        source = {name: getattr(config, name) for name in READ}
        bounded = math.isfinite(limits.memory_gib)
        memory = int(limits.memory_gib * 2**30) if bounded else None
        said = self._exchange({"source": source, "memory": memory}, 0, START_SECONDS)
        if said.get("ready") is not True:
            self.stop()
            why = said.get("unusable") or f"{name_of(config)}: importing it {_problem(said)}"
            within = f" (in a process with memory_gib={limits.memory_gib:g})" if bounded else ""
            raise InputError(f"{why}{within}")
        self.needs = tuple(map(str, said.get("needs") or ()))
        self.ids = said.get("ids") is True

    def ask(self, rows: dict[str, Any], count: int) -> tuple[list[float | None] | None, str]:
        """The scores of ``count`` rows; None, and why, where there are none."""
        said = self._exchange(rows, count, self._limits.timeout)
        scores = said.get("scores")
        if scores is None:
            return None, _problem(said)
        if not isinstance(scores, list) or len(scores) != count:
            given = len(scores) if isinstance(scores, list) else "no list of"
            return None, self._refuse(f"sent {given} scores for {count} rows")
        if not all(x is None or type(x) in (int, float) for x in scores):
            return None, self._refuse("sent scores that are no numbers")
        return scores, ""

    def _exchange(self, message: dict[str, Any], count: int, seconds: float) -> dict[str, Any]:
        """Send, and wait for the answer; both together take at most this long."""
        # Drawn: who writes to the socket unasked does not know it.
        number, until = secrets.token_hex(16), time.monotonic() + seconds
        try:
            send(self.socket, {"id": number, **message}, until)
            said = receive(self.socket, SAID + ROW * count, until)
        except TimeoutError:
            self.stop()
            return {"problem": f"took more than its timeout of {seconds:g} s"}
        except ClosedError as error:
            return {"problem": self._ended(str(error))}
        except ChannelError as error:
            return {"problem": self._refuse(str(error))}
        if not isinstance(said, dict) or said.get("id") != number:
            return {"problem": self._refuse("sent what is no answer to the request")}
        return said

    def _ended(self, what: str) -> str:
        """How the process has ended; it is stopped where it has not."""
        try:
            status = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return self._refuse(what)
        self.stop()
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"ended its process ({how})"

    def _refuse(self, what: str) -> str:
        """``what``; the process is not asked again: what it will say next nobody knows."""
        self.stop()
        return what

    def stop(self) -> None:
        """End the process, with all that it has started."""
        # Whoever waits for an answer, in another thread, waits no longer.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:  # stopped by what it was to supervise
            self.process.kill()
            self.process.wait()
        self.socket.close()


def _problem(said: dict[str, Any]) -> str:
    return str(said.get("problem") or "sent no scores")[:LONGEST]


def _stop(workers: list[_Worker | None]) -> None:
    for worker in workers:
        if worker is not None:
            worker.stop()
