"""A run's figures in the trackers that people watch: TensorBoard, Weights & Biases, trackio.

Each is a process of its own (``tracking``) with a queue before it: a tracker that is slow, waits
for a network, fails or crashes costs its own figures and an alarm, never the run. What it is given
is what stands in metrics.jsonl and samples.jsonl, under the same names.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxrlhf.config import Config
from jaxrlhf.core.errors import InputError, to_install
from jaxrlhf.core.files import write_atomic, writing
from jaxrlhf.core.remote import scratch
from jaxrlhf.core.shown import one_line
from jaxrlhf.mesh.processes import is_first
from jaxrlhf.mesh.signals import Stop

log = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
"""The package that each tracker is, which the extra of the tracker's name installs."""

WAITING = 10_000
"""Records that may wait for a tracker; of more, the newest are left out."""

TABLE_SECONDS = 60.0
"""Least time between two tables of completions in training; those of evaluations all go."""

TABLE_ROWS = 100
"""Most completions of a table."""

END_SECONDS, CUT_SECONDS = 30.0, 3.0
"""How long a run waits for its trackers at its end, and where an error or a signal ends it."""

Row = Mapping[str, Any]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed, on the process that writes.

    Raises:
      InputError: which, and the extra that installs it.
    """
    for name in names if is_first() else ():
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"trackers={name}: the package {PACKAGES[name]} is not installed: "
                f"{to_install(name)}"
            )


def trackers_of(config: Config, resumed: int | None, say: Callable[[str], None]) -> "Trackers":
    """The trackers of a run, on the process that writes; none on the others.

    Args:
      resumed, say: as of ``Trackers``.
    """
    names = config.trackers if is_first() else ()
    return Trackers(names, scratch(config.output), resumed, dataclasses.asdict(config), say)


class Trackers:
    """All trackers of a run. No method waits, but ``close``, for some seconds.

    Args:
      names: of ``PACKAGES``.
      output: the run's folder. Its trackers.json keeps the run's id, its trackers.log what the
        libraries print.
      resumed: the step that this launch goes on from; None: it begins, with an id of its own.
      config: what the trackers are told of the run's settings.
      say: is told where the figures are.

    Raises:
      InputError: the folder cannot be written.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        output: str | Path = "",
        resumed: int | None = None,
        config: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = log.info,
    ):
        self._workers: list[_Worker] = []
        self._tabled = -math.inf
        if not names:
            return
        path = Path(output)
        run = [str(path.absolute()), _id_of(path, resumed), resumed, dict(config or {})]
        with writing(path / "trackers.log"):
            noise = open(path / "trackers.log", "ab", buffering=0)  # noqa: SIM115
        with noise:  # each worker has it from here on
            self._workers = [_Worker(name, run, noise, say) for name in dict.fromkeys(names)]

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics.jsonl."""
        known = {name: x for name, x in values.items() if _is_number(x)}
        self._put("metrics", step, known)

    def samples(self, step: int, rows: Iterable[Row]) -> None:
        """Lines of samples.jsonl, as a table."""
        if not (self._workers and (listed := list(rows))):
            return
        now = time.monotonic()
        name = "eval/samples" if listed[0].get("split") == "eval" else "samples"
        if name == "samples":
            if now - self._tabled < TABLE_SECONDS:
                return
            self._tabled = now
        self._put("table", step, name, listed[:TABLE_ROWS])

    def close(self, error: type[BaseException] | None = None) -> None:
        """Have each finish, and wait for it a while.

        Args:
          error: what the run ends by, if not by having done all; one that has been asked to stop
            has not failed.
        """
        until = time.monotonic() + (END_SECONDS if error is None else CUT_SECONDS)
        failed = error is not None and not issubclass(error, Stop | SystemExit)
        self._put("finish", failed)
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.leave(until)

    def _put(self, *record: Any) -> None:
        for worker in self._workers:
            worker.put(record)


class _Worker:
    """One tracker's process, the queue before it, and its alarm."""

    def __init__(self, name: str, run: list[Any], noise: IO[bytes], say: Callable[[str], None]):
        self._name, self._say, self._alarmed = name, say, False
        self._log = noise.name
        self._queue: queue.Queue[Any] = queue.Queue(WAITING)
        # It imports from where this process does, and, by -P, from nowhere else.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxrlhf.run.tracking", name],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            start_new_session=True,  # Ctrl-C is this process's to hear
        )
        self._left = False
        self.put(run)
        writer, self._listener = (
            threading.Thread(target=work, name=f"tracker {name}", daemon=True)
            for work in (self._write, self._listen)
        )
        writer.start()
        self._listener.start()

    def put(self, record: Any) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._alarm(f"has {WAITING} records to send, and gets no more until some are sent")

    def _write(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as file:
                while True:
                    record = self._queue.get()
                    file.write((json.dumps(record) + "\n").encode())
                    file.flush()
                    if record[0] == "finish":
                        return
        except OSError:  # it has ended, of which its listener tells
            return
        except (TypeError, ValueError) as error:
            self._alarm(f"cannot be told of this run ({one_line(error)})")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "where" in told:
                self._say(f"{self._name}: {told['where']}")
            elif "unusable" in told:
                self._alarm(f"cannot be used ({told['unusable']})")
            else:
                self._alarm(f"has failed ({told['failed']})")
        if (status := self._process.wait()) and not self._left:
            self._alarm(f"has ended by itself (status {status})")

    def leave(self, until: float) -> None:
        """Wait for its end until then, and end it."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._alarmed = False  # a second alarm, for what is lost only now
            self._alarm(
                "does not come to its end, and has been ended: it may lack the last records"
            )

    def _alarm(self, what: str) -> None:
        """Say once what is wrong."""
        if not self._alarmed:
            self._alarmed = True
            log.warning(
                "trackers: %s %s; metrics.jsonl has all, %s may say more",
                self._name,
                what,
                self._log,
            )


def _id_of(output: Path, resumed: int | None) -> str:
    """The id of a run: a new one for a new run, else the one that was noted."""
    path = output / "trackers.json"
    if resumed is not None and path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["id"]
            if isinstance(found, str) and found.isalnum():
                return found
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            log.warning("%s: cannot be read: the trackers begin another run", path)
    made = uuid.uuid4().hex[:12]
    write_atomic(path, json.dumps({"id": made}) + "\n")
    return made


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)
