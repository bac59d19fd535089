"""The page about several runs side by side: what differs between them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from jaxrlhf.config import AlgorithmConfig, Config, PPOConfig, RewardConfig
from jaxrlhf.run import charts, texts
from jaxrlhf.run.charts import number_of
from jaxrlhf.run.folder import RunFiles
from jaxrlhf.run.metrics import HELD_OUT
from jaxrlhf.run.page import Page, Section, Table, at, cell, fields, interval, means, section


def compare(runs: Sequence[RunFiles]) -> Page:
    """Where the runs differ: in what they reached, what they were told, and what they say."""
    names = [Path(run.folder).name for run in runs]
    if len(set(names)) < len(names):  # two folders of one name
        names = [f"{i}: {run.folder}" for i, run in enumerate(runs, 1)]
    named = dict(zip(names, runs, strict=True))
    metrics = {name: run.metrics for name, run in named.items()}
    drawn, still = charts.training_curves(metrics)
    sections = [
        headlines(named),
        differences(named),
        Section("Gold against proxy", charts=charts.over_optimisation(named)),
        Section("Held-out rows", charts=charts.held_out_curves(metrics)),
        Section("Training", still, drawn),
        texts.compared(named),
    ]
    return Page(
        title=f"{len(runs)} runs compared",
        lines=[", ".join(named)],
        tiles=(),
        findings=None,
        sections=[part for part in sections if part.filled],
        configs={},
    )


def headlines(named: Mapping[str, RunFiles]) -> Section:
    """Held-out measures after training, of which at least two runs have different ones."""
    rows = [
        (metric.title, *(at(run.summary, name, "after") for run in named.values()))
        for name, metric in HELD_OUT.items()
        if any(f"{name}_after" in run.summary for run in named.values())
    ]
    rises = [interval(run.summary, "gold_rise") for run in named.values()]
    if set(rises) != {"–"}:
        # Under the gold measure, which has the first row.
        rows.insert(1, ("Rise of the gold measure", *rises))
    seconds = [_minutes(run) for run in named.values()]
    rows.append(("Time, minutes", *seconds))
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return means("After training", named, differing, "prompts")


def _minutes(run: RunFiles) -> str:
    seconds = run.summary.get("seconds") or {}
    total = sum(number_of(seconds, name) for name in seconds)
    return f"{total / 60:.1f}" if seconds else "–"


def differences(named: Mapping[str, RunFiles]) -> Section:
    """Fields of the configs that are not the same in all runs; of what only some runs have, such as
    an algorithm's own fields, those that are not at their defaults."""
    flat = [dict(fields(run.config)) for run in named.values()]
    usual = [defaults(run.config) for run in named.values()]
    keys = dict.fromkeys(key for config in flat for key in config if key != "output")
    rows = []
    for key in keys:
        cells = [cell(config.get(key, "–")) for config in flat]
        lacking = any(key not in config for config in flat)
        told = any(x[key] != y.get(key) for x, y in zip(flat, usual, strict=True) if key in x)
        if len(set(cells)) > 1 and (told or not lacking):
            rows.append((key, *cells))
    lines = ["All other fields are the same, or at their defaults where only some runs have them."]
    return Section("Where the configs differ", lines, tables=[Table(("field", *named), rows)])


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """(dotted name, default) of the fields of a config of this algorithm, with so many rewards."""
    name = section(config, "algorithm").get("name")
    kind = next((kind for kind in get_args(AlgorithmConfig) if kind.name == name), PPOConfig)
    # Through JSON: tuples become lists, as in a file.
    found = dict(fields(json.loads(json.dumps(asdict(Config(algorithm=kind()))))))
    reward = dict(fields(json.loads(json.dumps(asdict(RewardConfig())))))
    for place, rewards in {
        "rewards": config.get("rewards"),
        "eval.gold": section(config, "eval").get("gold"),
    }.items():
        for i in range(len(rewards) if isinstance(rewards, list) else 0):
            found |= {f"{place}.{i}.{field}": value for field, value in reward.items()}
    return found
