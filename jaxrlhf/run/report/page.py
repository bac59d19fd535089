"""What a page consists of, and the parts that one run and several have in common."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from jaxrlhf.run.display import number
from jaxrlhf.run.report.curves import (
    Point,
    Policy,
    best_of_n,
    gold_against_proxy,
    number_of,
    series,
)
from jaxrlhf.run.report.reading import Record, RunFiles
from jaxrlhf.run.report.svg import Series, chart

TRAINING = {
    "reward": ("Reward, in training", "reward units"),
    "kl": ("KL to the reference, in training", "nats a sequence"),
    "length": ("Length, in training", "tokens"),
    "entropy_estimate": ("Entropy, in training", "nats a token"),
    "loss": ("Loss", ""),
    "accuracy": ("Accuracy, in training", "share"),
    "explained_variance": ("Explained variance of the value function", "share"),
    "clip_fraction": ("Clipped ratios", "share"),
    "grad_norm": ("Gradient norm", ""),
}
"""Metrics of the iterations that are drawn, their titles and units."""

HELD_OUT = {
    "gold": ("Gold measure", "reward units"),
    "proxy": ("Reward (proxy)", "reward units"),
    "kl_nats": ("KL to the reference", "nats a sequence"),
    "length": ("Length", "tokens"),
    "ended": ("Ended", "share"),
    "entropy": ("Entropy", "nats a token"),
    "distinct_1": ("Distinct tokens", "share"),
    "distinct_2": ("Distinct bigrams", "share"),
    "repetition_3": ("Repeated 3-grams", "share"),
    "unknown": ("Without a score", "share"),
    "accuracy": ("Accuracy", "share"),
    "accuracy_large_gap": ("Accuracy, large gap", "share"),
    "loss": ("Loss", ""),
    "completions": ("Completions", ""),
    "rows": ("Rows", ""),
}
"""Metrics of held-out rows in their order, what they are called, and their units."""


COUNTS = ("completions", "rows")
"""Those that say how much was measured, which are not drawn."""


class Tile(NamedTuple):
    """A headline number."""

    label: str
    value: str
    note: str = ""


class Table(NamedTuple):
    """Cells of text."""

    names: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A part of the page under a title."""

    title: str
    lines: Sequence[str] = ()
    charts: Sequence[Markup] = ()
    tables: Sequence[Table] = ()
    kind: str = ""
    """``texts`` for tables of sentences."""


class Page(NamedTuple):
    """All that the template reads."""

    title: str
    lines: Sequence[str]
    tiles: Sequence[Tile]
    findings: Sequence[Mapping[str, str]] | None
    sections: Sequence[Section]
    configs: Mapping[str, str]


def filled(sections: Sequence[Section]) -> list[Section]:
    """The sections that have something to show."""
    return [s for s in sections if any((s.lines, any(s.charts), any(t.rows for t in s.tables)))]


def interval(record: Mapping[str, Any], name: str, ci: str = "") -> str:
    """A mean with the half width of its 95 % interval where that is known; – for no number."""
    value, half = number_of(record, name), number_of(record, ci or f"{name}_ci")
    if math.isnan(value):
        return "–"
    return number(value) + ("" if math.isnan(half) else f" ± {number(half)}")


def training_curves(named: Mapping[str, RunFiles]) -> list[Markup]:
    """The iterations' metrics, a chart each, a curve a run."""
    return [
        chart(
            [
                Series(name, series(run.metrics, metric), i)
                for i, (name, run) in enumerate(named.items())
            ],
            titled(title, unit),
            "iteration",
        )
        for metric, (title, unit) in TRAINING.items()
    ]


def titled(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title


def held_out_curves(named: Mapping[str, RunFiles]) -> list[Markup]:
    """Held-out measures over the iterations, for runs that were measured more than twice."""
    out = []
    for metric, (title, unit) in HELD_OUT.items():
        curves = [
            Series(name, series(run.metrics, f"eval/{metric}"), i, dots=True)
            for i, (name, run) in enumerate(named.items())
        ]
        if metric not in COUNTS and any(len(curve.points) > 2 for curve in curves):
            out.append(chart(curves, titled(f"{title}, held out", unit), "iteration"))
    return out


def over_optimisation(named: Mapping[str, RunFiles]) -> list[Markup]:
    """Proxy and gold over √KL, and best-of-n beside them where it has been measured."""
    curves: dict[str, list[Series]] = {"proxy": [], "gold": []}
    for i, (name, run) in enumerate(named.items()):
        ways = {
            name: gold_against_proxy(run.metrics, root=True),
            f"{name}, best of n": best_of_n(run.evaluation, root=True),
        }
        for (label, policies), dashed in zip(ways.items(), (False, True), strict=True):
            for measure, found in curves.items():
                points = [_point(policy, measure) for policy in policies]
                found.append(Series(label, points, i, dashed, dots=True))
    titles = {"proxy": "Reward (proxy)", "gold": "Gold measure"}
    return [
        chart(found, f"{titles[measure]} over √KL (reward units)", "√KL to the reference, √nats")
        for measure, found in curves.items()
    ]


def _point(policy: Policy, measure: str) -> Point:
    if measure == "proxy":
        return Point(policy.x, policy.proxy, policy.proxy_ci)
    return Point(policy.x, policy.gold, policy.gold_ci)


def ends(samples: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Held-out completions of the first and of the last evaluation, the first of each prompt."""
    rows = [row for row in samples if row.get("split") == "eval"]
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return [], []
    first, last = (_first_each(rows, step) for step in (steps[0], steps[-1]))
    return list(first.values()), [last[prompt] for prompt in first if prompt in last]


def _first_each(rows: Sequence[Record], step: int) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for row in rows:
        if row["step"] == step:
            found.setdefault(str(row.get("prompt")), row)
    return found


def said(row: Mapping[str, Any]) -> str:
    """A completion, and what it was found to be worth."""
    scores = [
        f"{n} {number(row[n])}" for n in ("proxy", "gold", "reward") if row.get(n) is not None
    ]
    text = str(row.get("completion", ""))
    return f"{text}\n({', '.join(scores)})" if scores else text


def as_yaml(config: Mapping[str, Any]) -> str:
    """A config as it stands in config.yaml."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
