"""Functions and verifiers as sources: called in this process, or in others under limits.

A call that raises, exits, never returns or takes too much memory costs the rows of that call. The
processes are started afresh, never forked: a fork of a process with JAX's threads can hang. Each
runs ``main`` of this file, which imports neither jax nor transformers: it is ready soon.

Over its connection a worker gets (source, bytes of address space, id of the process that started
it), and says ("ready", "") or ("unusable", why). Then for each batch (prompts, completions,
columns) it says ("scores", list of B floats, NaN where it failed and None where it does not apply)
or ("problem", why); if it says nothing, the function has ended the process, or never returns.
"""

import contextlib
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from jaxrlhf.config import IsolateConfig, RewardConfig, name_of
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards import verifiers
from jaxrlhf.rewards.functions import Asked, RewardFunction, Scored, Source, call, describe, resolve

START_SECONDS = 120.0
"""Seconds that a process may take to import the function."""


def host_source(config: RewardConfig) -> Source:
    """What asks ``host_function``; without ``isolate``, what the function raises ends the run."""
    if config.isolate:
        return Isolated(config)
    function, name = host_function(config), name_of(config)

    def ask(asked: Asked) -> Scored:
        return call(name, function, asked.prompts, asked.completions, asked.columns)

    return ask


def host_function(config: RewardConfig) -> RewardFunction:
    """The function that a config names, or its verifier as one; an InputError if it is not to be
    had."""
    if config.function:
        return resolve(config.function)
    verifier = verifiers.make(config.verifier, config.answer, config.pattern)
    return lambda prompts, completions, **columns: verifiers.verify(verifier, completions, columns)


class Isolated:
    """A source that calls a function or verifier in worker processes.

    One process is started at once, so that a function which cannot be imported is found early, the
    others when they are needed; one that cannot be started then costs the rows of the call. They
    end with this object, or with the process that holds it.

    Raises:
      InputError: the function cannot be had.
    """

    def __init__(self, config: RewardConfig):
        assert config.isolate is not None
        self._config, self._limits = config, config.isolate
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._workers: list[_Worker | None] = [None] * self._limits.workers
        for slot in range(self._limits.workers):
            self._free.put(slot)
        self._workers[0] = _Worker(config, self._limits)
        # Of the list and not of self: a finalizer that holds its object never runs.
        self.close = weakref.finalize(self, _stop, self._workers)

    def __call__(self, asked: Asked) -> Scored:
        # Calls of ``chunk`` rows, ``workers`` of them at once.
        with ThreadPoolExecutor(self._limits.workers) as threads:
            return Scored.join(list(threads.map(self._call, asked.split(self._limits.chunk))))

    def _call(self, asked: Asked) -> Scored:
        columns = {name: list(values) for name, values in asked.columns.items()}
        rows = (list(asked.prompts), list(asked.completions), columns)
        slot = self._free.get()
        try:
            worker = self._workers[slot]
            if worker is None or worker.process.poll() is not None:
                worker = self._workers[slot] = _Worker(self._config, self._limits)
            kind, said = worker.exchange(rows, self._limits.timeout)
        except (InputError, OSError) as error:  # the next call tries again to start one
            kind, said = "problem", f"its process could not be started: {error}"
        finally:
            self._free.put(slot)
        if kind == "scores":
            return Scored.of(said)
        return Scored(np.full(len(asked), np.nan), " ".join(said.split()))


class _Worker:
    """One process, ready to be asked."""

    def __init__(self, config: RewardConfig, limits: IsolateConfig):
        ours, theirs = Pipe()
        self.connection = ours
        # It imports from where this process does, and, by -P, from nowhere else.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxrlhf.rewards.isolation", str(theirs.fileno())],
            # The accelerators are this process's.
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a function prints is no output of this process
            start_new_session=True,  # so that one kill reaches all that it starts
        )
        theirs.close()  # only then is the end of the process the end of the connection
        size = int(limits.memory_gib * 2**30)
        kind, said = self.exchange((config, size, os.getpid()), START_SECONDS)
        if kind != "ready":
            self.stop()
            what = said if kind == "unusable" else f"{name_of(config)}: importing it {said}"
            raise InputError(f"{what} (in a process with memory_gib={limits.memory_gib:g})")

    def exchange(self, message: Any, seconds: float) -> tuple[str, Any]:
        """Send, and wait for what it says; both together take at most this long."""
        late = threading.Event()

        def cut() -> None:
            """End the exchange, wherever it waits: a process that has stopped reads nothing."""
            late.set()
            ours = socket.socket(fileno=os.dup(self.connection.fileno()))
            with ours, contextlib.suppress(OSError):  # the other end is closed already
                ours.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(seconds, cut)
        timer.start()
        try:
            self.connection.send(message)
            said = self.connection.recv()
        except (EOFError, OSError):
            said = None
        finally:
            timer.cancel()
            timer.join()
        if late.is_set():
            self.stop()
            return said or ("problem", f"took more than {seconds:g} s")
        return said or self._ended()

    def _ended(self) -> tuple[str, Any]:
        try:
            status = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.stop()
            return "problem", "closed its connection"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return "problem", f"ended its process ({how})"

    def stop(self) -> None:
        """Kill the process, with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


def _stop(workers: list[_Worker | None]) -> None:
    for worker in workers:
        if worker is not None:
            worker.stop()


def main(handle: int) -> None:
    """Serve the connection until it is closed."""
    connection = Connection(handle)
    source, size, parent = connection.recv()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # The function's import counts too, and runs under the limit.
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        function = host_function(source)
    except InputError as error:
        connection.send(("unusable", str(error)))
        return
    connection.send(("ready", ""))
    while True:
        try:
            prompts, completions, columns = connection.recv()
        except EOFError:
            return
        try:
            scored = call(name_of(source), function, prompts, completions, columns)
            rows = zip(scored.score_B.tolist(), scored.applies(), strict=True)
            said = ("scores", [score if applies else None for score, applies in rows])
        except InputError as error:
            cause = error.__cause__
            said = ("problem", f"raised {describe(cause)}" if cause else str(error))
        connection.send(said)


def _end_with(parent: int) -> None:
    """End this process once its parent has, even in the midst of a call."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
