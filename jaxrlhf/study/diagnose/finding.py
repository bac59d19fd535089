"""What a detector says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxrlhf.study.diagnose.history import History


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


Detector = Callable[[History], list[Finding]]
"""A pure function. Where the figures it reads are not logged, or too few, it finds nothing."""
