"""The page about several runs, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.run.report.page import (
    HELD_OUT,
    Page,
    Section,
    Table,
    as_yaml,
    ends,
    filled,
    held_out_curves,
    interval,
    over_optimisation,
    said,
    training_curves,
)
from jaxrlhf.run.report.reading import RunFiles

SHOWN = 8
"""Prompts whose completions are shown."""


def compare(runs: Sequence[RunFiles]) -> Page:
    """What the runs have in common, and where they differ."""
    named = dict(zip(names_of(runs), runs, strict=True))
    return Page(
        title=f"{len(runs)} runs compared",
        lines=[", ".join(named)],
        tiles=(),
        findings=None,
        sections=filled(
            [
                headlines(named),
                differences(named),
                Section("Gold against proxy", charts=over_optimisation(named)),
                Section("Held-out rows", charts=held_out_curves(named)),
                Section("Training", charts=training_curves(named)),
                completions(named),
            ]
        ),
        configs={name: as_yaml(run.config) for name, run in named.items()},
    )


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Folders' own names; whole paths where two have the same."""
    short = [Path(run.folder).name for run in runs]
    if len(set(short)) == len(short):
        return short
    return [f"{i}: {run.folder}" for i, run in enumerate(runs, 1)]


def headlines(named: Mapping[str, RunFiles]) -> Section:
    """Held-out measures of every run after training."""
    rows = [
        (title, *(_after(run.summary, metric) for run in named.values()))
        for metric, (title, _) in HELD_OUT.items()
        if any(f"{metric}_after" in run.summary for run in named.values())
    ]
    rises = [interval(run.summary, "gold_rise") for run in named.values()]
    if set(rises) != {"–"}:
        rows.insert(1, ("Rise of the gold measure", *rises))
    lines = ["Means with 95 % intervals over prompts."] if rows else []
    return Section("After training", lines, tables=[Table(("", *named), rows)])


def _after(summary: Mapping[str, Any], metric: str) -> str:
    return interval(summary, f"{metric}_after", f"{metric}_ci_after")


def differences(named: Mapping[str, RunFiles]) -> Section:
    """Fields of the configs that are not the same in all runs."""
    flat = [dict(fields(run.config)) for run in named.values()]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [
        (key, *(str(config.get(key, "–")) for config in flat))
        for key in keys
        if len({str(config.get(key, "–")) for config in flat}) > 1 and key != "output"
    ]
    table = Table(("field", *named), rows)
    return Section("Where the configs differ", tables=[table])


def fields(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings and lists."""
    items: list[tuple[Any, Any]] = []
    if isinstance(config, Mapping):
        items = list(config.items())
    elif isinstance(config, list):
        items = list(enumerate(config))
    for key, value in items:
        yield from fields(value, f"{name}.{key}" if name else str(key))
    if not items and name:
        yield name, config


def completions(named: Mapping[str, RunFiles]) -> Section:
    """The last completions of the prompts that all runs were measured on."""
    last = [{str(row.get("prompt")): row for row in ends(run.samples)[1]} for run in named.values()]
    shared = [prompt for prompt in last[0] if all(prompt in rows for rows in last)]
    rows = [(prompt, *(said(each[prompt]) for each in last)) for prompt in shared[:SHOWN]]
    table = Table(("prompt", *named), rows)
    return Section("Completions of held-out prompts", tables=[table], kind="texts")
