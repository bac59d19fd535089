"""An evaluation as a table of text."""

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrlhf.run.display import number

LABELS = {
    "proxy": "reward (proxy)",
    "gold": "gold measure",
    "kl_nats": "KL to the reference, nats",
    "length": "length, tokens",
    "ended": "ended",
    "entropy": "entropy, nats a token",
    "distinct_1": "distinct tokens",
    "distinct_2": "distinct bigrams",
    "repetition_3": "repeated 3-grams",
    "unknown": "without a score",
}
"""Figures in their order, and what they are called."""


def table(found: Mapping[str, Any], width: int = 100) -> str:
    """What ``evaluate_model`` has found, for a terminal or a log of ``width`` columns."""
    out = StringIO()
    console = Console(file=out, width=width, color_system=None)
    policy, against = found["policy"], found.get("against")
    title = f"{found['models']['policy']} on {found['prompts']} held-out prompts, {found['n']} each"
    columns = {"policy": policy}
    if against is not None:
        columns["against " + found["models"]["against"]] = against
    rows = [
        (label, *(interval(column, name) for column in columns.values()))
        for name, label in LABELS.items()
        if name in policy
    ]
    _print(console, title, ("", *columns), rows)
    if wins := found.get("win_rate"):
        rates = [(f"by {j}", interval(wins, j)) for j in found["rewards"]]
        _print(console, "Win rate (ties one half)", ("", "policy wins"), rates)
    for name, title in {"pass_at_k": "pass@k", "maj_at_k": "maj@k"}.items():
        if part := found.get(name):
            _print(console, title, ("k", "share of prompts"), _curve(part, "k", ("rate",)))
    if curve := found.get("best_of_n"):
        judges = tuple(found["rewards"])
        rows = _curve(curve, "n", ("kl_nats", *judges))
        _print(console, "Best of n, without training", ("n", "KL, nats", *judges), rows)
    if equal := found.get("equal_kl"):
        console.print(Text(beside(equal, found["rewards"])))
    return out.getvalue()


def beside(equal: Mapping[str, Any], judges: Sequence[str]) -> str:
    """What the best of n reaches at the policy's KL, in words."""
    if all(equal[judge] is None for judge in judges):
        return f"Best of n does not reach the policy's KL of {number(equal['kl_nats'])} nats."
    reached = ", ".join(f"{judge} {number(equal[judge])}" for judge in judges)
    return f"Best of n at the policy's KL of {number(equal['kl_nats'])} nats: {reached}."


def interval(figures: Mapping[str, Any], name: str) -> str:
    """A mean with the half width of its interval: 0.15 ± 0.09."""
    if name not in figures:
        return ""
    ci = figures.get(f"{name}_ci")
    return number(figures[name]) + ("" if ci is None or ci != ci else f" ± {number(ci)}")


def _curve(curve: Mapping[str, Any], over: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    return [
        (str(x), *(interval({k: v[i] for k, v in curve.items()}, name) for name in names))
        for i, x in enumerate(curve[over])
    ]


def _print(
    console: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    shown = Table(title=Text(title), title_justify="left", box=None, padding=(0, 3, 0, 0))
    for name in names:
        shown.add_column(Text(name), justify="left" if name == names[0] else "right")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    console.print()
