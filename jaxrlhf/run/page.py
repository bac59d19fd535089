"""What the pages about runs are made of: tiles, tables, sections, and how values are shown."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxrlhf.core.shown import shown
from jaxrlhf.run.charts import number_of
from jaxrlhf.run.display import number


class Tile(NamedTuple):
    """A headline number."""

    label: str
    value: str
    note: str


class Table(NamedTuple):
    """Cells of text."""

    names: Sequence[str]
    rows: Sequence[Sequence[str]]


class Turn(NamedTuple):
    """What one of a chat has said; of plain text, all of it, by nobody."""

    role: str
    text: str


class Answer(NamedTuple):
    """A completion: when or by whom it was said, and what it was found to be worth."""

    label: str
    text: str
    scores: str


class Sample(NamedTuple):
    """A prompt, and its completions side by side."""

    turns: Sequence[Turn]
    answers: Sequence[Answer]


class Section(NamedTuple):
    """A part of the page under a title."""

    title: str
    lines: Sequence[str] = ()
    charts: Sequence[Markup] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()

    @property
    def filled(self) -> bool:
        """Whether it has something to show."""
        rows = any(t.rows for t in self.tables)
        return bool(self.lines or any(self.charts) or rows or self.samples)


class Page(NamedTuple):
    """All that the template reads."""

    title: str
    lines: Sequence[str]
    tiles: Sequence[Tile]
    findings: Sequence[Mapping[str, str]] | None
    sections: Sequence[Section]
    configs: Mapping[str, str]


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a config; empty where it has none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def cell(value: Any) -> str:
    """A value of a file as the page shows it."""
    return value if isinstance(value, str) else shown(value, 1000)


def interval(record: Mapping[str, Any], name: str, ci: str = "") -> str:
    """A mean with the half width of its 95 % interval where that is known; – for no number."""
    value, half = number_of(record, name), number_of(record, ci or f"{name}_ci")
    if math.isnan(value):
        return "–"
    return number(value) + ("" if math.isnan(half) else f" ± {number(half)}")


def at(summary: Mapping[str, Any], name: str, end: str) -> str:
    """A held-out measure of summary.json ``before`` or ``after`` training, with its interval."""
    start, last = (number_of(summary, f"{name}_{x}") for x in ("before", "after"))
    # A KL of 1e-7 before training is the noise of a sum.
    if end == "before" and 0 < abs(start) < 1e-5 < abs(last):
        return "0"
    return interval(summary, f"{name}_{end}", f"{name}_ci_{end}")


def means(title: str, names: Iterable[str], rows: Sequence[Sequence[str]], what: str) -> Section:
    """A section of means, a row a measure, a column each of ``names``; ``what``: over what."""
    lines = [f"Means with 95 % intervals over {what}."] if rows else []
    return Section(title, lines, tables=[Table(("", *names), rows)])


def fields(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings and lists."""
    items: list[tuple[Any, Any]] = []
    if isinstance(config, Mapping):
        items = list(config.items())
    elif isinstance(config, list):
        items = list(enumerate(config))
    for key, value in items:
        yield from fields(value, f"{name}.{key}" if name else str(key))
    if not items and name:  # an empty mapping or list is a leaf as well
        yield name, config
