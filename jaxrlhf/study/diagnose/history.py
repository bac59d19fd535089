"""The records of a run's folder as arrays, whether the run is finished or still writing."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.config import Config, load
from jaxrlhf.core.errors import InputError

Sample = dict[str, Any]
"""A line of samples.jsonl: step, prompt, completion, reward (or proxy and gold)."""

MIN_POINTS = 10
"""Fewer iterations than this have no trend: a fifth of them would be a single one."""


class Change(NamedTuple):
    """How a series went from its first fifth to its last."""

    before: float
    after: float
    error: float
    """Standard error of ``after − before``, from the scatter within the two fifths."""
    where: tuple[int, int, int, int]
    """First and last step of either fifth."""

    @property
    def rise(self) -> float:
        return self.after - self.before

    @property
    def rose(self) -> bool:
        """Further than scatter explains (two standard errors)."""
        return self.rise > 2 * self.error

    def __str__(self) -> str:
        a, b, c, d = self.where
        return f"{self.before:.3g} (steps {a}-{b}) → {self.after:.3g} (steps {c}-{d})"


@dataclass(frozen=True)
class Series:
    """Numbers by name over the same steps; NaN where a step has none."""

    step_I: np.ndarray
    values: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """The numbers called ``name``, float64 [I]; all NaN if there are none."""
        return self.values.get(name, np.full(len(self.step_I), math.nan))

    def known(self, *names: str) -> "Series":
        """The steps that have all of these names."""
        there = np.all([np.isfinite(self[name]) for name in names], axis=0)
        return Series(self.step_I, {name: self[name] for name in names}).where(there)

    def where(self, chosen_I: np.ndarray) -> "Series":
        """The steps at which ``chosen_I`` is true."""
        return Series(self.step_I[chosen_I], {name: x[chosen_I] for name, x in self.values.items()})

    def after(self, step: int) -> "Series":
        """The steps later than ``step``."""
        return self.where(self.step_I > step)

    def with_ratio(self, name: str, over: str) -> "Series":
        """``name`` divided by ``over``: a sum under weights becomes the mean under them."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self[name] / self[over]
        return Series(self.step_I, self.values | {name: np.where(self[over] != 0, ratio, math.nan)})

    def change(self, name: str) -> Change | None:
        """From the first fifth of the steps with this name to the last; None if they are few."""
        known = self.known(name)
        x_I, step_I = known[name], known.step_I
        n = fifth(len(x_I))
        if len(x_I) < MIN_POINTS:
            return None
        head, tail = x_I[:n], x_I[-n:]
        error = math.sqrt(head.var(ddof=1) / n + tail.var(ddof=1) / n)
        where = (int(step_I[0]), int(step_I[n - 1]), int(step_I[-n]), int(step_I[-1]))
        return Change(float(head.mean()), float(tail.mean()), error, where)

    def late(self, name: str) -> "Late | None":
        """The last fifth of the steps with this name; None if there is no such step."""
        known = self.known(name)
        n = fifth(len(known.step_I))
        if not n:
            return None
        return Late(known[name][-n:], int(known.step_I[-n]), int(known.step_I[-1]))


class Late(NamedTuple):
    """The end of a series."""

    value_I: np.ndarray
    first: int
    last: int

    @property
    def mean(self) -> float:
        return float(self.value_I.mean())

    @property
    def median(self) -> float:
        return float(np.median(self.value_I))

    @property
    def steps(self) -> str:
        return f"step {self.last}" if self.first == self.last else f"steps {self.first}-{self.last}"


@dataclass(frozen=True)
class History:
    """All that a run has written down."""

    config: Config
    training: Series
    """One entry an iteration, under the names of metrics.jsonl."""
    evaluation: Series
    """One entry an evaluation, without the ``eval/`` before its names."""
    samples: dict[int, tuple[Sample, ...]] = field(default_factory=dict)
    """A few completions of each iteration, by step."""
    eval_samples: dict[int, tuple[Sample, ...]] = field(default_factory=dict)
    """All completions of each evaluation, by step."""


def fifth(count: int) -> int:
    """A fifth of ``count``, at least 1 of any."""
    return max(count // 5, min(count, 1))


def read_history(folder: str | Path) -> History:
    """Read config.yaml, metrics.jsonl and samples.jsonl of a run's folder.

    A last line that is not whole, because the run is writing it or was killed at it, is left out.

    Raises:
      InputError: not the folder of a run, no iteration recorded yet, a line that is no record.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: not the output folder of a run (it holds no config.yaml)")
    lines = read_lines(folder / "metrics.jsonl")
    evaluations = [line for line in lines if _is_evaluation(line)]
    training = [line for line in lines if not _is_evaluation(line)]
    if not training:
        raise InputError(f"{folder}: metrics.jsonl has no iteration yet: wait for the first")
    samples = read_lines(folder / "samples.jsonl")
    return History(
        load(folder / "config.yaml"),
        series(training),
        series([{key.removeprefix("eval/"): x for key, x in line.items()} for line in evaluations]),
        _by_step(samples, lambda row: row.get("split") != "eval"),
        _by_step(samples, lambda row: row.get("split") == "eval"),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, but for a torn last line; none if there is no such file.

    Raises:
      InputError: the file cannot be read, or another line is no record with a step.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a folder that can be read") from None
    *whole, _ = content.split(b"\n")
    records = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{path}:{number}: {line[:80]!r} is no record with a step: "
                "remove the line, or resume the run, which drops it"
            ) from None
        records.append(record)
    return records


def series(records: Iterable[dict[str, Any]]) -> Series:
    """Records as arrays, in the order of their steps; of two of one step the later counts."""
    by_step = {int(record["step"]): record for record in records}
    steps = sorted(by_step)
    names = {name for record in by_step.values() for name in record} - {"step"}
    values = {name: np.array([_number(by_step[s].get(name)) for s in steps]) for name in names}
    return Series(np.array(steps, int), values)


def _number(x: Any) -> float:
    """NaN for null (which is how a run writes what is not finite), and for what is no number."""
    return float(x) if isinstance(x, int | float) else math.nan


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)


def _by_step(rows: list[Sample], wanted: Callable[[Sample], bool]) -> dict[int, tuple[Sample, ...]]:
    found: dict[int, list[Sample]] = {}
    for row in rows:
        if wanted(row):
            found.setdefault(int(row["step"]), []).append(row)
    return {step: tuple(found[step]) for step in sorted(found)}
