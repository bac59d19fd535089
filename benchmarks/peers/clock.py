"""What every peer shares: its task from the command line, a clock, one line of JSON at the end.

Imports the standard library alone, since each peer runs in a virtual environment of its own.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "MEASURED "
"""What the line begins with, among whatever else a trainer prints."""


@dataclass(frozen=True)
class Task:
    """What a peer is asked to do, on the same weights and prompts as all others."""

    subject: str
    """sampling, sft, grpo, ppo; or startup, which is one step of grpo."""
    folder: str
    """SmolLM2-135M as a Hugging Face folder, whose eos is a token that is never drawn, and
    prompts.json, texts of ``prompt`` tokens each."""
    rows: int
    """Of a batch, samples counted."""
    n: int
    """Samples a prompt."""
    prompt: int
    new: int
    """Tokens; every response has as many."""
    minibatches: int
    repeats: int
    """Timed calls or iterations, after those that compile."""
    began: float
    """time.time() when the process was started."""

    @property
    def learns(self) -> str:
        """The trainer that the subject is about."""
        return "grpo" if self.subject == "startup" else self.subject

    @property
    def steps(self) -> int:
        """Iterations to ask for: compiling fills the first two intervals' beginnings."""
        return 1 if self.subject == "startup" else self.repeats + 2

    def prompts(self) -> list[str]:
        """The prompts of one batch: ``rows`` of them, each for one response."""
        texts = json.loads((Path(self.folder) / "prompts.json").read_text(encoding="utf-8"))
        return [texts[i % len(texts)] for i in range(self.rows)]


def task() -> Task:
    """The task that the driver has written on the command line, as JSON."""
    return Task(**json.loads(sys.argv[1]))


class Clock:
    """Wall and processor seconds between ticks, one an iteration."""

    def __init__(self):
        self.ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        """An iteration is as far as the last one was at the last tick."""
        self.ticks.append((time.perf_counter(), time.process_time()))

    def reward(self, texts: Sequence[Any]) -> list[float]:
        """A reward for each text, which costs nothing and differs; a tick, too: every trainer asks
        once an iteration."""
        self.tick()
        return [float(i % 3) for i in range(len(texts))]


def tell(given: Task, clock: Clock, skipped: int = 1) -> None:
    """Print what was measured: the intervals between ticks, all but the first ``skipped``.

    Peak memory is that of the whole process, loading and compiling included.
    """
    pairs = list(zip(clock.ticks, clock.ticks[1:], strict=False))[skipped:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "seconds": [b[0] - a[0] for a, b in pairs],
        "processor": [b[1] - a[1] for a, b in pairs],
        "whole": time.time() - given.began,
        "whole_processor": time.process_time(),
        "peak_gib": peak / (2**30 if sys.platform == "darwin" else 2**20),
    }
    print(MARK + json.dumps(found), flush=True)
