"""``jaxrlhf report``: one page about a run, or several compared, that needs no network."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import check_file, write_atomic
from jaxrlhf.core.shown import shown
from jaxrlhf.run import charts
from jaxrlhf.run.charts import HELD_OUT, Point, Series, number_of
from jaxrlhf.run.display import clock, number
from jaxrlhf.run.folder import Record, RunFiles, read_run

TEMPLATE = Path(__file__).with_name("report.html")

HEADLINES = ("gold", "proxy", "accuracy", "loss", "kl_nats", "length", "distinct_2")
"""Held-out measures that become tiles."""

SHOWN, SHOWN_COMPARED = 12, 8
"""Prompts whose completions are shown, of one run and of several."""


def write_report(folders: Sequence[str | Path], output: str | Path = "") -> str:
    """Write the page that the files of one run, or of several, make.

    Args:
      folders: output folders of runs.
      output: the .html file; report.html in the folder of a single run, if empty.

    Returns:
      The path of the page.

    Raises:
      InputError: a folder that is no run's, a file that cannot be read, no output for several, or
        one that cannot be written.
    """
    if not folders:
        raise InputError("report: RUN: missing: give the output folder of at least one run")
    if len(folders) > 1 and not output:
        raise InputError("output: missing: give an .html file for the page about several runs")
    runs = [read_run(folder) for folder in folders]
    path = Path(output) if output else Path(folders[0]) / "report.html"
    check_file(path)
    write_atomic(path, render(runs))
    return str(path)


class Tile(NamedTuple):
    """A headline number."""

    label: str
    value: str
    note: str


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
    kind: str = ""  # ``texts`` for tables of sentences

    @property
    def filled(self) -> bool:
        """Whether it has something to show."""
        return bool(self.lines or any(self.charts) or any(t.rows for t in self.tables))


class Page(NamedTuple):
    """All that the template reads."""

    title: str
    lines: Sequence[str]
    tiles: Sequence[Tile]
    findings: Sequence[Mapping[str, str]] | None
    sections: Sequence[Section]
    configs: Mapping[str, str]


def render(runs: Sequence[RunFiles]) -> str:
    """The page as HTML: a pure function of what the runs have written, all of it escaped."""
    page = describe(runs[0]) if len(runs) == 1 else compare(runs)
    # Strict: what the template lacks is an error, and no empty place on a page.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=page)
    # A lone surrogate, which JSON can hold, is in no file of UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


# The page about one run


def describe(run: RunFiles) -> Page:
    """All that the files of a run say."""
    algorithm = cell(section(run.config, "algorithm").get("name", "run"))
    texts = ("name", "severity", "evidence", "remedy")
    findings = run.diagnosis and [{n: cell(x.get(n, "")) for n in texts} for x in run.diagnosis]
    both_ends = [(prompt, *map(said, rows)) for prompt, rows in ends(run.samples).items()]
    sections = [
        before_and_after(run.summary),
        Section("Gold against proxy", over_optimised(run), over_optimisation({"policy": run})),
        *evaluated(run.evaluation),
        Section("Held-out rows", charts=charts.held_out_curves({"policy": run.metrics})),
        Section("Training", charts=charts.training_curves({algorithm: run.metrics})),
        calibration(run.summary),
        completions(("before", "after"), both_ends[:SHOWN]),
    ]
    return Page(
        title=f"{algorithm}: {run.folder}",
        lines=facts(run),
        tiles=tiles(run.summary, run.evaluation),
        findings=findings,
        sections=[section for section in sections if section.filled],
        configs={"Config": as_yaml(run.config)},
    )


def facts(run: RunFiles) -> list[str]:
    """Model and length of the run, what it took, and whether it is done."""
    model = section(run.config, "model")
    done = max((record["step"] for record in run.metrics), default=0)
    name, steps = cell(model.get("path") or "from random weights"), cell(run.config.get("steps"))
    what = f"Model {name}, {done} of {steps} iterations"
    if not run.summary:
        return [f"{what}: not finished."]
    seconds = run.summary.get("seconds") or {}
    took = [f"{clock(sum(seconds.values()))} in all"] if seconds else []
    if (memory := run.summary.get("peak_memory_gib")) is not None:
        took.append(f"{number(memory)} GiB at most")
    if (speed := run.summary.get("tokens_per_second")) is not None:
        took.append(f"{number(speed)} tokens a second")
    return [f"{what}.", f"{', '.join(took)}."] if took else [f"{what}."]


def tiles(summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[Tile]:
    """Headline numbers: held-out measures before and after, and how often the policy wins."""
    out = []
    for name in HEADLINES:
        if f"{name}_after" not in summary:
            continue
        before, after = (number_of(summary, f"{name}_{end}") for end in ("before", "after"))
        # A KL of 1e-7 before training is the noise of a sum, and is shown as 0.
        start = "0" if abs(before) < abs(after) / 1000 else number(summary.get(f"{name}_before"))
        title, note = HELD_OUT[name]
        if f"{name}_rise" in summary:
            note = f"rise {interval(summary, f'{name}_rise')}"
        out.append(Tile(title, f"{start} → {number(after)}", note))
    wins = evaluation.get("win_rate", {})
    for judge in [name for name in ("gold", "proxy") if name in wins][:1]:
        against = f"against {evaluation['models'].get('against')}"
        out.append(Tile(f"Win rate by {judge}", interval(wins, judge), against))
    return out


def before_and_after(summary: Mapping[str, Any]) -> Section:
    """Every held-out measure at both ends, with its interval."""
    names = [key.removesuffix("_after") for key in summary if key.endswith("_after")]
    order = [n for n in HELD_OUT if n in names] + [n for n in names if n not in HELD_OUT]
    rows = [
        (HELD_OUT.get(name, (name,))[0], *(at(summary, name, end) for end in ("before", "after")))
        for name in order
        if not (name.endswith("_ci") and name.removesuffix("_ci") in names)
    ]
    return _means("Before and after", ("before", "after"), rows)


def over_optimised(run: RunFiles) -> list[str]:
    """Where the gold measure was highest, and where it ended."""
    path = charts.gold_against_proxy(run.metrics)
    best = charts.peak(path)
    if best is None or len(path) < 3:
        return []
    where = f"The gold measure was highest, {number(best.gold.y)}, at iteration {best.step}"
    end = f"and ended at {number(path[-1].gold.y)}, KL {number(path[-1].gold.x)}"
    return [f"{where} and a KL of {number(best.gold.x)} nats, {end}."]


def evaluated(found: Mapping[str, Any]) -> list[Section]:
    """What evaluation.json says: the policy beside its opponent, and best-of-n."""
    if not found:
        return []
    columns = {"policy": found["policy"]}
    if found.get("against") is not None:
        columns[f"against {found['models'].get('against')}"] = found["against"]
    measures = [
        (HELD_OUT.get(name, (name,))[0], *(interval(c, name) for c in columns.values()))
        for name in found["policy"]
        if not name.endswith("_ci")
    ]
    tables = [Table(("", *columns), measures)]
    if wins := found.get("win_rate", {}):
        rows = [(f"win rate by {judge}", interval(wins, judge)) for judge in found["rewards"]]
        tables.append(Table(("", "policy wins (ties one half)"), rows))
    for name, title in {"pass_at_k": "pass@k", "maj_at_k": "maj@k"}.items():
        if curve := found.get(name):
            rows = [(number(row.get("k")), interval(row, "rate")) for row in charts.rows_of(curve)]
            tables.append(Table((f"{title}, k", "share"), rows))
    lines = [f"{found['prompts']} prompts of {found['data']}, {found['n']} completions each."]
    return [Section("Evaluation", lines, tables=tables), best_of_n_section(found)]


def best_of_n_section(found: Mapping[str, Any]) -> Section:
    """The baseline that training has to beat at equal KL."""
    judges = list(found["rewards"])
    rows = [
        (number(row.get("n")), *(interval(row, name) for name in ("kl_nats", *judges)))
        for row in charts.rows_of(found.get("best_of_n", {}))
    ]
    lines = []
    if equal := found.get("equal_kl"):
        kl = number(equal.get("kl_nats"))
        reached = ", ".join(
            f"{judge} {number(equal[judge])} (policy {interval(found['policy'], judge)})"
            for judge in judges
            if equal.get(judge) is not None
        )
        lines = [f"The curve ends before the policy's KL of {kl} nats."]
        if reached:
            lines = [f"At the policy's KL of {kl} nats, best of n reaches {reached}."]
    table = Table(("n", "KL, nats", *judges), rows)
    return Section("Best of n, without training", lines, tables=[table])


def calibration(summary: Mapping[str, Any]) -> Section:
    """Whether a reward model is as often right as it says."""
    curves = []
    if points := charts.reliability(summary):
        straight = [Point(p, p) for p in (min(q.x for q in points), 1.0)]
        curves = [Series("measured", points, 0, dots=True), Series("calibrated", straight, 1, True)]
    drawn = charts.chart(curves, "Share that came true over its probability", "probability")
    return Section("Reliability", charts=[drawn])


# The page about several runs, side by side


def compare(runs: Sequence[RunFiles]) -> Page:
    """What the runs have in common, and where they differ."""
    names = [Path(run.folder).name for run in runs]
    if len(set(names)) < len(names):  # two folders of one name
        names = [f"{i}: {run.folder}" for i, run in enumerate(runs, 1)]
    named = dict(zip(names, runs, strict=True))
    metrics = {name: run.metrics for name, run in named.items()}
    last = [{prompt: row for prompt, (_, row) in ends(run.samples).items()} for run in runs]
    shared = [prompt for prompt in last[0] if all(prompt in rows for rows in last)]
    said_last = [(p, *(said(rows[p]) for rows in last)) for p in shared[:SHOWN_COMPARED]]
    sections = [
        headlines(named),
        differences(named),
        Section("Gold against proxy", charts=over_optimisation(named)),
        Section("Held-out rows", charts=charts.held_out_curves(metrics)),
        Section("Training", charts=charts.training_curves(metrics)),
        completions(named, said_last),
    ]
    return Page(
        title=f"{len(runs)} runs compared",
        lines=[", ".join(named)],
        tiles=(),
        findings=None,
        sections=[section for section in sections if section.filled],
        configs={name: as_yaml(run.config) for name, run in named.items()},
    )


def headlines(named: Mapping[str, RunFiles]) -> Section:
    """Held-out measures of every run after training."""
    rows = [
        (title, *(at(run.summary, metric, "after") for run in named.values()))
        for metric, (title, _) in HELD_OUT.items()
        if any(f"{metric}_after" in run.summary for run in named.values())
    ]
    rises = [interval(run.summary, "gold_rise") for run in named.values()]
    if set(rises) != {"–"}:
        # Under the gold measure, which has the first row.
        rows.insert(1, ("Rise of the gold measure", *rises))
    return _means("After training", named, rows)


def differences(named: Mapping[str, RunFiles]) -> Section:
    """Fields of the configs that are not the same in all runs."""
    flat = [dict(fields(run.config)) for run in named.values()]
    keys = dict.fromkeys(key for config in flat for key in config if key != "output")
    rows = [(key, *(cell(config.get(key, "–")) for config in flat)) for key in keys]
    table = Table(("field", *named), [row for row in rows if len(set(row[1:])) > 1])
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
    if not items and name:  # an empty mapping or list is a leaf as well
        yield name, config


# What both pages have


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
    return interval(summary, f"{name}_{end}", f"{name}_ci_{end}")


def _means(title: str, names: Iterable[str], rows: Sequence[Sequence[str]]) -> Section:
    lines = ["Means with 95 % intervals over prompts."] if rows else []
    return Section(title, lines, tables=[Table(("", *names), rows)])


def over_optimisation(named: Mapping[str, RunFiles]) -> list[Markup]:
    """Proxy and gold over √KL, and best-of-n beside them where it has been measured."""
    curves: dict[str, list[Series]] = {"proxy": [], "gold": []}
    for i, (name, run) in enumerate(named.items()):
        trained = name, charts.gold_against_proxy(run.metrics, root=True), False
        drawn = f"{name}, best of n", charts.best_of_n(run.evaluation, root=True), True
        for label, policies, dashed in (trained, drawn):
            for measure, found in curves.items():
                points = [getattr(policy, measure) for policy in policies]
                found.append(Series(label, points, i, dashed, dots=True))
    x = "√KL to the reference, √nats"
    return [
        charts.chart(found, f"{HELD_OUT[measure][0]} over √KL (reward units)", x)
        for measure, found in curves.items()
    ]


def ends(samples: Sequence[Record]) -> dict[str, tuple[Record, Record]]:
    """Held-out completions by prompt, the first of it at the first and at the last evaluation."""
    rows = [row for row in samples if row.get("split") == "eval"]
    steps = [row["step"] for row in rows]
    first: dict[str, Record] = {}
    last: dict[str, Record] = {}
    for found, step in ((first, min(steps, default=0)), (last, max(steps, default=0))):
        for row in rows:
            if row["step"] == step:
                # Each draw has the same key in every evaluation, so first draws go together.
                found.setdefault(cell(row.get("prompt")), row)
    return {prompt: (row, last[prompt]) for prompt, row in first.items() if prompt in last}


def completions(names: Iterable[str], rows: Sequence[Sequence[str]]) -> Section:
    """Prompts, and a completion of each a column."""
    table = Table(("prompt", *names), rows)
    return Section("Completions of held-out prompts", tables=[table], kind="texts")


def said(row: Mapping[str, Any]) -> str:
    """A completion, and what it was found to be worth."""
    known = [name for name in ("proxy", "gold", "reward") if row.get(name) is not None]
    scores = ", ".join(f"{name} {number(row[name])}" for name in known)
    return cell(row.get("completion", "")) + (f"\n({scores})" if scores else "")


def as_yaml(config: Mapping[str, Any]) -> str:
    """A config as it stands in config.yaml."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
