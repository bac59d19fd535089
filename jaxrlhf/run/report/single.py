"""The page about one run."""

from collections.abc import Mapping
from typing import Any

from jaxrlhf.run.display import clock, number
from jaxrlhf.run.report.curves import Point, gold_against_proxy, number_of, peak, reliability
from jaxrlhf.run.report.page import (
    HELD_OUT,
    Page,
    Section,
    Table,
    Tile,
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
from jaxrlhf.run.report.svg import Series, chart

HEADLINES = ("gold", "proxy", "accuracy", "loss", "kl_nats", "length", "distinct_2")
"""Held-out measures that become tiles."""

SHOWN = 12
"""Held-out prompts whose completions are shown."""


def describe(run: RunFiles) -> Page:
    """All that the files of a run say."""
    named = {"policy": run}
    return Page(
        title=f"{algorithm(run)}: {run.folder}",
        lines=facts(run),
        tiles=[*tiles(run.summary), *win_tiles(run.evaluation)],
        findings=findings(run),
        sections=filled(
            [
                before_and_after(run.summary),
                Section("Gold against proxy", over_optimised(run), over_optimisation(named)),
                *evaluated(run.evaluation),
                Section("Held-out rows", charts=held_out_curves(named)),
                Section("Training", charts=training_curves({algorithm(run): run})),
                calibration(run.summary),
                completions(run),
            ]
        ),
        configs={"Config": as_yaml(run.config)},
    )


def algorithm(run: RunFiles) -> str:
    return str(dict(run.config.get("algorithm") or {}).get("name", "run"))


def facts(run: RunFiles) -> list[str]:
    """Model and length of the run, what it took, and whether it is done."""
    model = dict(run.config.get("model") or {})
    done = max((record["step"] for record in run.metrics), default=0)
    steps = run.config.get("steps")
    what = f"Model {model.get('path') or 'from random weights'}, {done} of {steps} iterations"
    if not run.summary:
        return [f"{what}: not finished."]
    seconds = dict(run.summary.get("seconds") or {})
    took = [f"{clock(sum(seconds.values()))} in all"] if seconds else []
    if (memory := run.summary.get("peak_memory_gib")) is not None:
        took.append(f"{number(memory)} GiB at most")
    if (speed := run.summary.get("tokens_per_second")) is not None:
        took.append(f"{number(speed)} tokens a second")
    return [f"{what}.", f"{', '.join(took)}."] if took else [f"{what}."]


def tiles(summary: Mapping[str, Any]) -> list[Tile]:
    """Headline numbers: what held-out rows said before and after."""
    out = []
    for name in HEADLINES:
        if f"{name}_after" not in summary:
            continue
        before, after = (number_of(summary, f"{name}_{end}") for end in ("before", "after"))
        start = "0" if abs(before) < abs(after) / 1000 else number(summary.get(f"{name}_before"))
        note = HELD_OUT[name][1]
        if f"{name}_rise" in summary:
            note = f"rise {interval(summary, f'{name}_rise')}"
        out.append(Tile(HELD_OUT[name][0], f"{start} → {number(after)}", note))
    return out


def win_tiles(found: Mapping[str, Any]) -> list[Tile]:
    """How often the policy beats its opponent, by the gold measure where there is one."""
    wins = found.get("win_rate", {})
    judge = [name for name in ("gold", "proxy") if name in wins][:1]
    return [
        Tile(f"Win rate by {name}", interval(wins, name), f"against {found['models']['against']}")
        for name in judge
    ]


def before_and_after(summary: Mapping[str, Any]) -> Section:
    """Every held-out measure at both ends, with its interval."""
    names = [key.removesuffix("_after") for key in summary if key.endswith("_after")]
    order = [n for n in HELD_OUT if n in names] + [n for n in names if n not in HELD_OUT]
    rows = [
        (HELD_OUT.get(name, (name,))[0], *(_at(summary, name, end) for end in ("before", "after")))
        for name in order
        if not (name.endswith("_ci") and name.removesuffix("_ci") in names)
    ]
    lines = ["Means with 95 % intervals over prompts."] if rows else []
    return Section("Before and after", lines, tables=[Table(("", "before", "after"), rows)])


def _at(summary: Mapping[str, Any], name: str, end: str) -> str:
    return interval(summary, f"{name}_{end}", f"{name}_ci_{end}")


def over_optimised(run: RunFiles) -> list[str]:
    """Where the gold measure was highest, and where it ended."""
    path = gold_against_proxy(run.metrics)
    best = peak(path)
    if best is None or len(path) < 3:
        return []
    where = f"The gold measure was highest, {number(best.gold)}, at iteration {best.step}"
    end = f"and ended at {number(path[-1].gold)}, KL {number(path[-1].x)}"
    return [f"{where} and a KL of {number(best.x)} nats, {end}."]


def evaluated(found: Mapping[str, Any]) -> list[Section]:
    """What evaluation.json says: the policy beside its opponent, and best-of-n."""
    if not found:
        return []
    policy, against = found["policy"], found.get("against")
    columns = [policy] if against is None else [policy, against]
    measures = [name for name in policy if not name.endswith("_ci")]
    tables = [
        Table(
            ("", "policy", *([f"against {found['models']['against']}"] if against else [])),
            [(HELD_OUT.get(n, (n,))[0], *(interval(c, n) for c in columns)) for n in measures],
        )
    ]
    wins = found.get("win_rate", {})
    rows = [(f"win rate by {judge}", interval(wins, judge)) for judge in found["rewards"]]
    lines = [f"{found['prompts']} prompts of {found['data']}, {found['n']} completions each."]
    if wins:
        tables.append(Table(("", "policy wins (ties one half)"), rows))
    for name, title in {"pass_at_k": "pass@k", "maj_at_k": "maj@k"}.items():
        if curve := found.get(name):
            cells = [(str(at["k"]), interval(at, "rate")) for at in _turned(curve)]
            tables.append(Table((f"{title}, k", "share"), cells))
    return [Section("Evaluation", lines, tables=tables), best_of_n_section(found)]


def best_of_n_section(found: Mapping[str, Any]) -> Section:
    """The baseline that training has to beat at equal KL."""
    judges = list(found["rewards"])
    names = ("n", "KL, nats", *judges)
    rows = [
        (str(at["n"]), interval(at, "kl_nats"), *(interval(at, judge) for judge in judges))
        for at in _turned(found.get("best_of_n", {}))
    ]
    lines = []
    if equal := found.get("equal_kl"):
        kl = number(equal["kl_nats"])
        reached = {j: equal[j] for j in judges if equal.get(j) is not None}
        lines = [f"The curve ends before the policy's KL of {kl} nats."]
        if reached:
            parts = (f"{j} {number(x)} (policy {interval(found['policy'], j)})"
                     for j, x in reached.items())  # fmt: skip
            lines = [f"At the policy's KL of {kl} nats, best of n reaches {', '.join(parts)}."]
    return Section("Best of n, without training", lines, tables=[Table(names, rows)])


def _turned(curve: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns → rows."""
    return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]


def calibration(summary: Mapping[str, Any]) -> Section:
    """Whether a reward model is as often right as it says."""
    points = reliability(summary)
    straight = [Point(p, p) for p in ((min(q.x for q in points), 1.0) if points else ())]
    curves = [Series("measured", points, 0, dots=True), Series("calibrated", straight, 1, True)]
    drawn = chart(
        curves if points else [], "Share that came true over its probability", "probability"
    )
    return Section("Reliability", charts=[drawn])


def completions(run: RunFiles) -> Section:
    """The same held-out prompts at both ends of the run."""
    first, last = ends(run.samples)
    after = {str(row.get("prompt")): row for row in last}
    rows = [
        (str(row.get("prompt")), said(row), said(after[str(row.get("prompt"))]))
        for row in first
        if str(row.get("prompt")) in after
    ]
    table = Table(("prompt", "before", "after"), rows[:SHOWN])
    return Section("Completions of held-out prompts", tables=[table], kind="texts")


def findings(run: RunFiles) -> list[dict[str, str]] | None:
    """What the diagnosis has found; None if nobody has looked."""
    if run.diagnosis is None:
        return None
    names = ("name", "severity", "evidence", "remedy")
    return [{name: str(found.get(name, "")) for name in names} for found in run.diagnosis]
