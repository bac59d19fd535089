"""What a run writes down: one JSON object a line, and a summary."""

import io
import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import unwritable, write_atomic, writing
from jaxrlhf.core.reading import record_of
from jaxrlhf.run.trackers import Trackers

log = logging.getLogger(__name__)


class Recorder:
    """Appends to ``metrics.jsonl`` and ``samples.jsonl`` of a run's folder, one object a line.

    Each line is handed to the system at once, so a killed process loses none (a machine that
    loses power may). On resume, lines of later steps than the restored one are dropped, as is a
    line that a kill has torn: no step stands twice. With a full disk, lines wait in memory, and are
    tried again with the next. A file that somebody removes is written anew, with all its lines.

    Numbers may be Python's, numpy's or jax's; NaN and infinities, which JSON has not, become null.

    Args:
      output: the run's folder; made if it is not there.
      resume_step: the restored step; None starts the files anew.
      active: False makes every method do nothing, for all but process 0 of a multi-host run.
      unmeasured: steps whose evaluation was not completed: of those, its lines are dropped too.
      trackers: are given the same, and closed with it.

    Raises:
      InputError: the files cannot be read or written at the start; by ``close``, lines still wait.
    """

    def __init__(
        self,
        output: str | Path,
        resume_step: int | None = None,
        active: bool = True,
        unmeasured: Collection[int] = (),
        trackers: Trackers | None = None,
    ):
        self._output = Path(output)
        self._files: list[_Lines] = []
        self._active = active
        for name in ("metrics.jsonl", "samples.jsonl") if active else ():
            with writing(self._output / name):
                self._output.mkdir(parents=True, exist_ok=True)
                _drop_later(self._output / name, resume_step, unmeasured)
                self._files.append(_Lines(self._output / name))
        self._trackers = trackers or Trackers()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._trackers.close(error)
        try:
            self.close()
        except InputError as lost:
            # Else the run's own error is the one to be seen.
            if error is None:
                raise
            log.warning("%s", lost)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Write ``{"step": step, **values}`` to metrics.jsonl."""
        if self._active:
            self._files[0].write([_line(step, values)])
            self._trackers.metrics(step, plain(values))

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write each row (prompt, completion, reward, …) with its step to samples.jsonl."""
        if self._active:
            listed = [plain(row) for row in rows]
            self._files[1].write([_line(step, row) for row in listed])
            self._trackers.samples(step, listed)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Replace summary.json, which is whole at any time."""
        if self._active:
            text = json.dumps(plain(values), indent=2, allow_nan=False)
            write_atomic(self._output / "summary.json", text + "\n")

    def close(self) -> None:
        files, self._files, self._active = self._files, [], False
        lost = [problem for file in files if (problem := file.close())]
        if lost:
            raise InputError("; ".join(lost))


class _Lines:
    """A file that takes whole lines, and what the disk refuses of them when it has room again."""

    def __init__(self, path: Path):
        self._path = path
        self._file = _open(path)
        self._waiting = b""
        self._problem = ""

    def write(self, lines: Sequence[str]) -> None:
        # A line stays here until the system has taken all of it: none is torn, none lost.
        self._waiting += "".join(line + "\n" for line in lines).encode()
        try:
            self._find_again()
            while self._waiting:
                written = self._file.write(self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            problem = unwritable(self._path, error)
            if not self._problem:
                log.warning("%s; its lines wait in memory, and are tried again", problem)
            lost = self._waiting.count(b"\n")
            self._problem = f"{problem}: {lost} lines are lost"
        else:
            if self._problem:
                log.warning("%s: can be written again, and has all its lines", self._path)
            self._problem = ""

    def _find_again(self) -> None:
        """See that the open file is the one at the path, which people remove, move and edit."""
        here = os.fstat(self._file.fileno())
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        if there is not None and (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            return
        before, self._file = self._file, _open(self._path)
        with before:
            if there is not None:
                log.warning("%s: is another file now: its lines are kept, more follow", self._path)
                return
            # Its lines are there as long as it is open.
            before.seek(0)
            self._waiting = before.read() + self._waiting
            log.warning("%s: was removed, and is written anew", self._path)

    def close(self) -> str:
        """Try a last time; what is wrong where lines are lost, else nothing."""
        self.write([])
        self._file.close()
        return self._problem


def _open(path: Path) -> io.FileIO:
    return open(path, "a+b", buffering=0)  # closed by the ``close`` of its owner


def _drop_later(path: Path, resume_step: int | None, unmeasured: Collection[int]) -> None:
    """Keep the lines of ``path`` up to ``resume_step`` (None: none of them)."""
    if not path.exists():
        return
    content = path.read_bytes()
    lines = (line for line in content.split(b"\n") if line)
    kept = [line + b"\n" for line in lines if _is_kept(line, resume_step, unmeasured)]
    # Lines of steps after the restored one will be written again.
    if b"".join(kept) != content:
        write_atomic(path, b"".join(kept).decode())


def _is_kept(line: bytes, resume_step: int | None, unmeasured: Collection[int]) -> bool:
    row = record_of(line)
    if row is None:
        log.warning("dropped a line that is no record: %r", line[:80])
        return False
    held_out = row.get("split") == "eval" or any(name.startswith("eval/") for name in row)
    again = held_out and row["step"] in unmeasured
    return resume_step is not None and row["step"] <= resume_step and not again


def _line(step: int, values: Mapping[str, Any]) -> str:
    return json.dumps({"step": step, **plain(values)}, allow_nan=False)


def plain(value: Any) -> Any:
    """``value`` as JSON has it: arrays as numbers or lists, NaN and infinities as None.

    Raises:
      TypeError: something in it is no number, text, bool, None, mapping or sequence of them.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case np.ndarray() | np.generic() | jax.Array():
            return plain(np.asarray(value).tolist())
    raise TypeError(f"{value!r} of {type(value).__name__} cannot be written as JSON")


OF_PAIRS = ("gap", "accuracy", "margin", "chosen_reward", "rejected_reward", "nll")
"""What is said of pairs that the policy's own samples make (online_dpo)."""


def known(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """``metrics``, with NaN for what is said of pairs where a rollout made none (``pairs`` is 0).

    Their sums over no rows are 0, which would be read as figures.
    """
    unknown = OF_PAIRS if metrics.get("pairs") == 0 else ()
    return {name: math.nan if name in unknown else x for name, x in metrics.items()}
