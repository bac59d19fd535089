"""What a plan holds: plain records of numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ARGUMENTS = ("parameters", "optimizer", "rows")
"""Kinds of bytes that come as arguments; their sum is what the compiler calls arguments."""

KINDS = (*ARGUMENTS, "weights_copy", "kv_cache", "temporaries", "outputs", "elsewhere")
"""Kinds of bytes on a device while a step runs: its arguments; what a sampler keeps, the weights in
decode layout and the KV cache; all other temporaries, activations most of them; results that do not
take an argument's place; and what the run holds besides, for other steps."""


@dataclass(frozen=True)
class Step:
    """One program of a run, compiled."""

    name: str
    calls: int
    """Times an iteration; 0 for what stands outside of it."""
    bytes: dict[str, float]
    """On each device, by kind (``KINDS``)."""
    flops: float
    """Of matrix products, on each device, a call."""
    moved: float
    """Bytes to and from memory, on each device, a call: arguments, results, matrix products."""
    collectives: dict[str, tuple[int, float]]
    """Kind → (how many, bytes that each device sends), a call."""
    seconds: dict[str, float]
    """A call by the roofline: compute, memory, links. It takes the longest of them at least."""
    trips: int | None = None
    """Of its decode loop."""
    arguments: float = 0.0
    """Bytes of its arguments on each device as the compiler has them, padding included."""
    refused: bool = False
    """The compiler refused it for its size: what it sends and moves is not known."""

    @property
    def peak(self) -> float:
        """Bytes on each device while it runs."""
        return sum(self.bytes.values())

    @property
    def time(self) -> float:
        """Seconds of a call, at least."""
        return max(self.seconds.values())

    @property
    def sent(self) -> float:
        """Bytes that each device sends, a call."""
        return sum(sent for _, sent in self.collectives.values())


@dataclass(frozen=True)
class Plan:
    """All steps of a run on some devices."""

    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    memory: float
    """Bytes that fit on a device."""
    steps: tuple[Step, ...]
    remarks: tuple[str, ...] = ()
    """What was assumed."""

    @property
    def peak(self) -> float:
        """Most bytes on a device over the steps."""
        return max(step.peak for step in self.steps)

    @property
    def fits(self) -> bool:
        """Whether every step does."""
        return self.peak <= self.memory and not any(step.refused for step in self.steps)

    @property
    def time(self) -> float:
        """Seconds of an iteration, at least."""
        return sum(step.calls * step.time for step in self.steps)

    @property
    def too_large(self) -> tuple[Step, ...]:
        """The steps that do not fit."""
        return tuple(s for s in self.steps if s.refused or s.peak > self.memory)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain lists, dicts and numbers, with what is derived of them."""
    out = asdict(plan)
    for step, row in zip(plan.steps, out["steps"], strict=True):
        share = step.calls * step.time / plan.time if plan.time else 0.0
        row |= {"peak": step.peak, "time": step.time, "sent": step.sent, "share": share}
    return {**out, "peak": plan.peak, "fits": plan.fits, "time": plan.time}


def from_json(found: Mapping[str, Any]) -> Plan:
    """The plan that ``as_json`` has written; what is derived is derived again."""
    steps = []
    for row in found["steps"]:
        values = {field.name: row[field.name] for field in fields(Step)}
        sent = {kind: tuple(pair) for kind, pair in row["collectives"].items()}
        steps.append(Step(**{**values, "collectives": sent}))
    values = {field.name: found[field.name] for field in fields(Plan)}
    return Plan(**{**values, "steps": tuple(steps), "remarks": tuple(found["remarks"])})
