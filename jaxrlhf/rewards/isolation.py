"""Sources of reward that are Python on the host: functions and verifiers.

Reward functions in processes of their own, with limits on time and memory.

A call that raises, exits, never returns or takes too much memory costs the rows of that call. The
processes are started afresh, never forked: a fork of a process with JAX's threads can hang.


A process that calls one reward function under limits; ``isolation`` starts and asks it.

Over its connection it gets (source, bytes of address space, id of the process that started it),
and says ("ready", "") or ("unusable", why). Then for each batch (prompts, completions, columns) it
says ("scores", list of B floats) or ("problem", why); if it says nothing, the function has ended
the process, or never returns.
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


def host_function(config: RewardConfig) -> RewardFunction:
    """The function that a source with ``function`` or ``verifier`` names.

    Raises:
      InputError: it cannot be had.
    """
    if config.function:
        return resolve(config.function)
    return verifiers.function_of(verifiers.make(config.verifier, config.answer, config.pattern))


def make(config: RewardConfig) -> Source:
    """A source that calls the function in this process: what it raises ends the run."""
    function, name = host_function(config), name_of(config)

    def ask(asked: Asked) -> Scored:
        return Scored(call(name, function, asked.prompts, asked.completions, asked.columns))

    return ask


START_SECONDS = 120.0
"""Seconds that a process may take to import the function."""


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
        self.close = weakref.finalize(self, _stop, self._workers)

    def __call__(self, asked: Asked) -> Scored:
        """The scores of all rows, in calls of ``chunk``, ``workers`` of them at once."""
        with ThreadPoolExecutor(self._limits.workers) as threads:
            parts = list(threads.map(self._call, asked.split(self._limits.chunk)))
        problems = [part.problem for part in parts if part.problem]
        return Scored(np.concatenate([part.score_B for part in parts]), (problems or [""])[-1])

    def _call(self, asked: Asked) -> Scored:
        slot = self._free.get()
        try:
            worker = self._workers[slot]
            if worker is None or worker.process.poll() is not None:
                worker = self._workers[slot] = _Worker(self._config, self._limits)
            kind, said = worker.ask(asked, self._limits.timeout)
        except (InputError, OSError) as error:  # the next call tries again to start one
            kind, said = "problem", f"its process could not be started: {error}"
        finally:
            self._free.put(slot)
        if kind == "scores":
            return Scored(np.array(said, np.float64))
        return Scored(np.full(len(asked), np.nan), " ".join(said.split()))


class _Worker:
    """One process, ready to be asked."""

    def __init__(self, config: RewardConfig, limits: IsolateConfig):
        ours, theirs = Pipe()
        self.connection = ours
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxrlhf.rewards.isolation", str(theirs.fileno())],
            # The accelerators are this process's.
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        size = int(limits.memory_gib * 2**30)
        kind, said = self._exchange((config, size, os.getpid()), START_SECONDS)
        if kind != "ready":
            self.stop()
            what = said if kind == "unusable" else f"{name_of(config)}: importing it {said}"
            raise InputError(f"{what} (in a process with memory_gib={limits.memory_gib:g})")

    def ask(self, asked: Asked, seconds: float) -> tuple[str, Any]:
        """("scores", list of floats) or ("problem", why)."""
        columns = {name: list(values) for name, values in asked.columns.items()}
        return self._exchange((list(asked.prompts), list(asked.completions), columns), seconds)

    def _exchange(self, message: Any, seconds: float) -> tuple[str, Any]:
        """Send, and wait for the answer; both together take at most this long."""
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
            score_B = call(name_of(source), function, prompts, completions, columns)
            said = ("scores", score_B.tolist())
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
