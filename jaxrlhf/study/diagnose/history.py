"""The records of a run's folder as arrays, finished or still writing, and what is said of them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrlhf.config import Config, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.reading import read_bytes, record_of
from jaxrlhf.core.shown import shown
from jaxrlhf.run.folder import MOST_LINES

Sample = dict[str, Any]
"""A line of samples.jsonl: step, prompt, completion, reward (or proxy and gold)."""

MIN_POINTS = 10  # fewer iterations have no trend: a fifth of them would be a single one


class Part(NamedTuple):
    """The first or last fifth of a series."""

    value_I: np.ndarray
    step_I: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.value_I.mean())

    @property
    def median(self) -> float:
        return float(np.median(self.value_I))

    @property
    def steps(self) -> str:
        first, last = self.step_I[0], self.step_I[-1]
        return f"step {last}" if first == last else f"steps {first}-{last}"


class Change(NamedTuple):
    """How a series went from its first fifth to its last."""

    before: float
    after: float
    error: float
    """Standard error of ``after − before``: √(s₁²/n + s₂²/n), s the scatter within a fifth."""
    text: str

    @property
    def rise(self) -> float:
        return self.after - self.before

    @property
    def rose(self) -> bool:
        """Further than scatter explains (two standard errors)."""
        return self.rise > 2 * self.error

    def __str__(self) -> str:
        return self.text


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

    def early(self, name: str) -> Part | None:
        """The first fifth of the steps with this name; None if there is no such step."""
        known = self.known(name)
        n = fifth(len(known.step_I))
        return Part(known[name][:n], known.step_I[:n]) if n else None

    def late(self, name: str) -> Part | None:
        """The last fifth of the steps with this name; None if there is no such step."""
        known = self.known(name)
        n = fifth(len(known.step_I))
        return Part(known[name][-n:], known.step_I[-n:]) if n else None

    def change(self, name: str) -> Change | None:
        """From the first fifth of the steps with this name to the last; None if they are few."""
        early, late = self.early(name), self.late(name)
        if not early or not late or len(self.known(name).step_I) < MIN_POINTS:
            return None
        n = len(late.value_I)
        error = math.sqrt(early.value_I.var(ddof=1) / n + late.value_I.var(ddof=1) / n)
        text = f"{early.mean:.3g} ({early.steps}) → {late.mean:.3g} ({late.steps})"
        return Change(early.mean, late.mean, error, text)


Samples = Mapping[int, Sequence[Sample]]
"""Rows by step, in the order of the steps."""


@dataclass(frozen=True)
class History:
    """All that a run has written down."""

    config: Config
    training: Series
    """One entry an iteration, under the names of metrics.jsonl."""
    evaluation: Series
    """One entry an evaluation, without the ``eval/`` before its names."""
    samples: Samples = field(default_factory=dict)
    """A few completions of each iteration."""
    eval_samples: Samples = field(default_factory=dict)
    """All completions of each evaluation."""

    def ends(self) -> tuple[list[Sample], list[Sample]]:
        """The samples of the first and of the last fifth of iterations."""
        steps = list(self.samples.values())
        n = fifth(len(steps))
        first, last = (
            [row for rows in part for row in rows]
            for part in (steps[:n], steps[len(steps) - n :])  # [-n:] would be all for n = 0
        )
        return first, last


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run, or may be."""

    name: str
    """What it is called: the key of its detector in DETECTORS."""
    severity: Literal["warning", "problem"]
    """A warning may be as it should be; with a problem the run is not worth going on as it is."""
    evidence: str
    """The numbers, with their units and steps."""
    remedy: str
    """What to do, by the names of config fields."""


Said = tuple[bool, str | list[str], str] | None
"""Whether it is a problem (else a warning), the evidence, the remedy; no evidence, no finding."""


@dataclass(frozen=True)
class Detector:
    """Makes a finding, named as the pure function ``look``, of what that says of a history.

    Where the figures it reads are not logged, or too few, it finds nothing.
    """

    look: Callable[[History], Said]

    def __call__(self, history: History) -> Finding | None:
        problem, evidence, remedy = self.look(history) or (False, "", "")
        if not evidence:
            return None
        evidence = evidence if isinstance(evidence, str) else "; ".join(evidence)
        severity = "problem" if problem else "warning"
        return Finding(self.look.__name__, severity, evidence, remedy)


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
    training, evaluations = [], []
    for line in read_lines(folder / "metrics.jsonl"):
        if any(name.startswith("eval/") for name in line):
            evaluations.append({name.removeprefix("eval/"): x for name, x in line.items()})
        else:
            training.append(line)
    if not training:
        raise InputError(f"{folder}: metrics.jsonl has no iteration yet: wait for the first")
    samples: dict[int, list[Sample]] = {}
    eval_samples: dict[int, list[Sample]] = {}
    for row in sorted(read_lines(folder / "samples.jsonl"), key=lambda row: row["step"]):
        kind = eval_samples if row.get("split") == "eval" else samples
        kind.setdefault(row["step"], []).append(row)
    config = load(folder / "config.yaml")
    return History(config, series(training), series(evaluations), samples, eval_samples)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, but for a torn last line; none if there is no such file.

    Raises:
      InputError: the file cannot be read, or another line is no record with a step.
    """
    if not path.exists():
        return []
    content = read_bytes(path, MOST_LINES, "give a folder that can be read")
    # what stands after the last line feed is still being written
    *whole, _ = content.split(b"\n")
    records = []
    for number, line in enumerate(whole, 1):
        record = record_of(line)
        if record is None:
            raise InputError(
                f"{path}:{number}: {shown(line, 80)} is no record with a step: "
                "remove the line, or resume the run, which drops it"
            )
        records.append(record)
    return records


def series(records: Iterable[dict[str, Any]]) -> Series:
    """Records as arrays, in the order of their steps; of two of one step the later counts.

    NaN for null (which is how a run writes what is not finite), and for what is no number.
    """
    by_step = {record["step"]: record for record in records}
    steps = sorted(by_step)
    names = {name for record in by_step.values() for name in record} - {"step"}
    rows = {name: [by_step[step].get(name) for step in steps] for name in names}
    values = {
        name: np.array([float(x) if isinstance(x, int | float) else math.nan for x in row])
        for name, row in rows.items()
    }
    return Series(np.array(steps, int), values)
