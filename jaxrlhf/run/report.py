"""``jaxrlhf report``: one page about a run, or several compared, that needs no network."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import check_file, write_atomic
from jaxrlhf.run import charts, texts
from jaxrlhf.run.charts import Point, Series, number_of
from jaxrlhf.run.comparison import compare
from jaxrlhf.run.display import clock, number
from jaxrlhf.run.folder import RunFiles, read_run, run_here
from jaxrlhf.run.metrics import COUNTS, HELD_OUT, titled
from jaxrlhf.run.page import Page, Section, Table, Tile, at, cell, interval, means, section

TEMPLATE = Path(__file__).with_name("report.html")
SCRIPT = Path(__file__).with_name("report.js")

HEADLINES = ("gold", "proxy", "accuracy", "loss", "kl_nats", "length", "distinct_2")
"""Held-out measures that become tiles."""


def write_report(folders: Sequence[str | Path], output: str | Path = "") -> str:
    """Write the page that the files of one run, or of several, make.

    Args:
      folders: output folders of runs, or their URLs; of a pipeline, whose last run it stands for.
      output: the .html file; report.html in the folder of a single run, if empty, or in its copy.

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
    path = Path(output) if output else run_here(folders[0]) / "report.html"
    check_file(path)
    write_atomic(path, render(runs))
    return str(path)


def render(runs: Sequence[RunFiles], live: bool = False) -> str:
    """The page as HTML: a pure function of what the runs have written, all of it escaped.

    Args:
      live: the page asks the server that it is from for a newer one, now and then.
    """
    page = describe(runs[0]) if len(runs) == 1 else compare(runs)
    # Strict: what the template lacks is an error, and no empty place on a page.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = SCRIPT.read_text(encoding="utf-8")
    # The page's own script, known by its digest, and no other: none that a completion brings.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        page=page, script=script, digest=digest, live=live, first=texts.FIRST
    )
    # A lone surrogate, which JSON can hold, is in no file of UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def describe(run: RunFiles) -> Page:
    """All that the files of a run say."""
    algorithm = cell(section(run.config, "algorithm").get("name", "run"))
    names = ("name", "severity", "evidence", "remedy")
    findings = run.diagnosis and [{n: cell(x.get(n, "")) for n in names} for x in run.diagnosis]
    drawn, still = charts.training_curves({algorithm: run.metrics})
    path = charts.over_optimisation({"policy": run})
    sections = [
        before_and_after(run.summary),
        Section("Gold against proxy", over_optimised(run), path),
        *evaluated(run.evaluation),
        Section("Held-out rows", charts=charts.held_out_curves({"policy": run.metrics})),
        Section("Training", still, drawn),
        calibration(run.summary),
        texts.held_out(run),
        texts.in_training(run),
        stages(run),
    ]
    return Page(
        title=f"{algorithm}: {run.folder}",
        lines=facts(run),
        tiles=tiles(run.summary, run.evaluation),
        findings=findings,
        sections=[section for section in sections if section.filled],
        configs={"Config": as_yaml(run.config)},
    )


def stages(run: RunFiles) -> Section:
    """The runs of a pipeline, and what each came to."""
    if not run.earlier:
        return Section("")
    rows = []
    for part in (*run.earlier, run):
        came = [f"{x.label} {x.value}" for x in tiles(part.summary, part.evaluation)]
        name = cell(section(part.config, "algorithm").get("name", "run"))
        rows.append((Path(part.folder).name, name, "; ".join(came) or facts(part)[0]))
    return Section("Runs of the pipeline", tables=[Table(("stage", "algorithm", "result"), rows)])


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
        start = number(summary.get(f"{name}_before")) if abs(before) > 1e-5 else "0"
        note = HELD_OUT[name].unit
        if f"{name}_rise" in summary:
            note = f"rise {interval(summary, f'{name}_rise')}"
        out.append(Tile(HELD_OUT[name].title, f"{start} → {number(after)}", note))
    wins = evaluation.get("win_rate", {})
    for judge in [name for name in ("gold", "proxy") if name in wins][:1]:
        against = f"against {evaluation['models'].get('against')}"
        out.append(Tile(f"Win rate by {judge}", interval(wins, judge), against))
    return out


def before_and_after(summary: Mapping[str, Any]) -> Section:
    """Held-out measures at both ends, with their intervals; counts, and what is 0 at both, are
    left out."""
    names = [key.removesuffix("_after") for key in summary if key.endswith("_after")]
    order = [n for n in HELD_OUT if n in names] + [n for n in names if n not in HELD_OUT]
    rows = [
        (titled(name), *(at(summary, name, end) for end in ("before", "after")))
        for name in order
        if not (name.endswith("_ci") and name.removesuffix("_ci") in names)
        and name not in (*COUNTS, "weight")
        and any(number_of(summary, f"{name}_{end}") != 0 for end in ("before", "after"))
    ]
    counts = [n for n in ("completions", "rows") if number_of(summary, f"{n}_after") > 0]
    what = f"{number_of(summary, f'{counts[0]}_after'):.0f} {counts[0]}" if counts else "prompts"
    return means("Before and after", ("before", "after"), rows, what)


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
        (titled(name), *(interval(c, name) for c in columns.values()))
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


def as_yaml(config: Mapping[str, Any]) -> str:
    """A config as it stands in config.yaml."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
