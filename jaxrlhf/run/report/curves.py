"""From records to curves: plain lists of points, NaN where a number is missing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.run.record import wilson

MOST_POINTS = 240
"""Points of a curve in a report; more are averaged in equal stretches."""


class Point(NamedTuple):
    """A mean, and the half width of its 95 % interval (NaN: not known)."""

    x: float
    y: float
    ci: float = math.nan


class Policy(NamedTuple):
    """A policy on its way from the reference: how far it is, and what it is worth."""

    step: int
    """Iteration; the n of a best-of-n policy."""
    x: float
    """KL(π‖π_ref) a sequence in nats, or its square root."""
    proxy: float
    proxy_ci: float
    gold: float
    gold_ci: float


def series(records: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """A metric over the iterations: every record that has it, at most ``MOST_POINTS`` means."""
    found = [
        Point(record["step"], number_of(record, name), number_of(record, f"{name}_ci"))
        for record in records
        if math.isfinite(number_of(record, name))
    ]
    return thin(found)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points, each the mean of an equal stretch; intervals are then left out."""
    count = len(points)
    if count <= most:
        return list(points)
    stretches = [points[i * count // most : (i + 1) * count // most] for i in range(most)]
    return [
        Point(sum(p.x for p in part) / len(part), sum(p.y for p in part) / len(part))
        for part in stretches
    ]


def gold_against_proxy(records: Sequence[Mapping[str, Any]], root: bool = False) -> list[Policy]:
    """Proxy and gold reward over the KL to the reference, at every evaluation in a run.

    As a policy moves away from the reference, the reward that it is trained on goes on rising while
    the gold measure turns: over-optimisation. Over √KL both curves are nearly straight at first,
    and gold is d·(α − β·d) for best-of-n, d·(α − β·log d) for RL, with d = √KL (arXiv:2210.10760).

    Args:
      records: lines of metrics.jsonl; those with ``eval/kl_nats`` and either measure are read.
      root: take √KL.

    Returns:
      The evaluations in their order; a measure that is not there is NaN.
    """
    policies = []
    for record in records:
        proxy, gold = number_of(record, "eval/proxy"), number_of(record, "eval/gold")
        kl = number_of(record, "eval/kl_nats")
        if math.isfinite(kl) and not (math.isnan(proxy) and math.isnan(gold)):
            cis = (number_of(record, f"eval/{name}_ci") for name in ("proxy", "gold"))
            policies.append(_policy(record["step"], kl, root, (proxy, gold), tuple(cis)))
    return policies


def best_of_n(evaluation: Mapping[str, Any], root: bool = False) -> list[Policy]:
    """The best-of-n curve of evaluation.json, in the same form; empty if it has none."""
    curve = evaluation.get("best_of_n", {})
    policies = []
    for i, n in enumerate(curve.get("n", ())):
        at = {name: values[i] for name, values in curve.items()}
        means = (number_of(at, "proxy"), number_of(at, "gold"))
        cis = (number_of(at, "proxy_ci"), number_of(at, "gold_ci"))
        policies.append(_policy(n, number_of(at, "kl_nats"), root, means, cis))
    return policies


def peak(policies: Sequence[Policy]) -> Policy | None:
    """Where the gold measure is highest; None if nothing has one."""
    known = [policy for policy in policies if math.isfinite(policy.gold)]
    return max(known, key=lambda policy: policy.gold, default=None)


def reliability(summary: Mapping[str, Any]) -> list[Point]:
    """What came true over what a reward model predicted, from ``reliability`` of summary.json.

    With the distance from each share to the farther end of its 95 % interval (``wilson``).
    """
    curve = summary.get("reliability") or {}
    names = ("predicted", "observed", "count")
    points = []
    for predicted, share, count in zip(*(curve.get(name, ()) for name in names), strict=True):
        low, high = wilson(share, count)
        points.append(Point(predicted, share, max(high - share, share - low)))
    return points


def number_of(record: Mapping[str, Any], name: str) -> float:
    """A number of a record; NaN where it has none by that name."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _policy(
    step: int, kl: float, root: bool, means: tuple[float, float], cis: tuple[float, ...]
) -> Policy:
    x = math.sqrt(max(kl, 0.0)) if root else kl  # an estimate of 0 may fall below it
    return Policy(step, x, means[0], cis[0], means[1], cis[1])
