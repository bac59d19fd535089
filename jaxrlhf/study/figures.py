"""From drawn completions to the figures of evaluation.json, and to a table of them for a reader."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrlhf.core import stats
from jaxrlhf.core.shown import visible
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.run.display import number

Columns = dict[str, np.ndarray]
"""What is known of N completions of each of Q prompts: arrays [Q, N].

``token`` (lists of ids), ``text``, and ``text_special``, which keeps special tokens; ``length``
(tokens) and ``ended``; ``logp``, the sum of the log-probs at T = 1 (nats); ``kl_nats``, the sum of
log π − log π_ref, where there is a reference; and the score of each judge, NaN where it had
none."""

Extract = Callable[[str], Hashable | None]
"""Completion → its answer, or None."""

Figures = dict[str, Any]

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
"""Figures in their order in the table, and what they are called there."""


def describe(drawn: Columns, n: int, judges: Sequence[str]) -> Figures:
    """The figures of one network, from the first ``n`` completions of each prompt.

    ``proxy`` and ``gold`` (the mean score of each judge), ``kl_nats`` (the mean over completions of
    Σ_t log π − log π_ref, where there is a reference), ``length`` (tokens), ``ended`` (share),
    ``repetition_3`` (share of a completion's 3-grams that occurred in it before), each with
    ``_ci``; ``entropy`` (−log π, nats a token); ``distinct_1`` and ``distinct_2``, over all of the
    completions; ``unknown``, the share of completions that lack a score.
    """
    first = {name: x_QN[:, :n] for name, x_QN in drawn.items()}
    tokens = first["token"].ravel().tolist()
    first["repetition_3"] = np.array([stats.repetition(ids) for ids in tokens]).reshape(-1, n)
    figures: Figures = {}
    for name in (*judges, "kl_nats", "length", "ended", "repetition_3"):
        if name in first:
            interval = stats.share_interval if name == "ended" else stats.mean_interval
            figures[name], figures[f"{name}_ci"] = stats.over_prompts(first[name], n, interval)
    # Over all tokens, so that a long completion counts by its length.
    figures["entropy"] = float(-first["logp"].sum() / first["length"].sum())
    figures |= {f"distinct_{k}": stats.distinct_n(tokens, k) for k in (1, 2)}
    if judges:
        unknown_QN = np.any([np.isnan(first[judge]) for judge in judges], axis=0)
        figures["unknown"] = float(unknown_QN.mean())
    return figures


def compare(ours: Columns, theirs: Columns, n: int, judges: Sequence[str]) -> Figures:
    """Win rate of ``ours`` by each judge, with ``_ci``: see ``stats.win_rate``."""
    figures: Figures = {}
    for judge in judges:
        won_Q = stats.win_rate(ours[judge][:, :n], theirs[judge])
        figures[judge], figures[f"{judge}_ci"] = stats.over_prompts(won_Q, 1, stats.share_interval)
    return figures


def solved(
    drawn: Columns,
    n: int,
    judges: Sequence[str],
    correct_at: float | None,
    extract: Extract,
    texts: str = "text",
) -> Figures:
    """``pass_at_k`` and ``maj_at_k`` for k = 1, 2, 4, … n; nothing where nothing is correct or not.

    Args:
      correct_at: the least score, by the last of the judges, of a correct completion. None: 1 if
        its known scores are all 0 or 1, and no measure else.
      extract: completion → its answer.
      texts: the column of completions that it reads.
    """
    if not judges:
        return {}
    score_QN = drawn[judges[-1]][:, :n]
    known_QN = ~np.isnan(score_QN)
    # A prompt with an unknown completion would drop out at k = n alone: every k is over the same.
    whole_Q = known_QN.all(axis=1)
    if not whole_Q.any():
        return {}
    if correct_at is None:
        if not np.isin(score_QN[known_QN], (0, 1)).all():
            return {}
        correct_at = 1.0
    correct_QN = (score_QN[whole_Q] >= correct_at).astype(np.float64)
    answers = [[extract(text) for text in row] for row in drawn[texts][whole_Q, :n]]
    ks = stats.powers_of_two(n)
    solved_KQ = {
        "pass_at_k": [stats.pass_at_k(correct_QN, k) for k in ks],
        "maj_at_k": [stats.maj_at_k(answers, correct_QN, k) for k in ks],
    }
    curves = {
        name: {"k": ks, **_curve("rate", x_KQ, stats.share_interval)}
        for name, x_KQ in solved_KQ.items()
    }
    return {**curves, "correct_at": correct_at, "solved_prompts": int(whole_Q.sum())}


def best_of_n_curve(drawn: Columns, most: int, judges: Sequence[str], policy: Figures) -> Figures:
    """``best_of_n``: what the best of n by the first judge is worth to each, n = 1, 2, 4, … most.

    The same samples serve every n (see ``stats.best_of_n``), at the prompts' mean KL (see
    ``stats.best_of_n_nats``). And ``equal_kl``, the best of the n, whole or not, whose KL is the
    policy's own: what training has to beat. None in it where the policy is further from its
    reference than the curve reaches. All of the curve is over the same ``best_of_n_prompts``:
    those with enough known samples for all n. Nothing where there is none.
    """
    counts = stats.powers_of_two(most)
    score_QN = drawn[judges[0]][:, :most]
    values = {
        judge: np.stack([stats.best_of_n(score_QN, n, drawn[judge][:, :most]) for n in counts])
        for judge in judges
    }
    # The largest n wants the most known samples: who has it has all n.
    whole_Q = np.all([np.isfinite(value_KQ[-1]) for value_KQ in values.values()], axis=0)
    if not whole_Q.any():
        return {}
    score_PN = score_QN[whole_Q]
    nats = [stats.over_prompts(stats.best_of_n_nats(score_PN, n), 1)[0] for n in counts]
    curve: Figures = {"n": counts, "kl_nats": nats}
    for judge, value_KQ in values.items():
        curve |= _curve(judge, value_KQ[:, whole_Q], stats.mean_interval)
    found = {"best_of_n": curve, "best_of_n_prompts": int(whole_Q.sum())}
    if "kl_nats" not in policy:
        return found
    kl = policy["kl_nats"]
    n = stats.n_at_kl(score_PN, kl, most)
    # n is real: between two whole n the curve bends, and a straight line would lie below it.
    equal: Figures = {"kl_nats": kl, **dict.fromkeys(judges)}
    if n is not None:
        for judge in judges:
            best_P = stats.best_of_n(score_PN, n, drawn[judge][whole_Q, :most])
            equal[judge], _ = stats.over_prompts(best_P, 1)
    return found | {"equal_kl": equal}


def _curve(
    name: str, x_KQ: Iterable[np.ndarray], interval: Callable[..., tuple[float, float]]
) -> dict[str, list[float]]:
    both = [stats.over_prompts(x_Q, 1, interval) for x_Q in x_KQ]
    return {name: [mean for mean, _ in both], f"{name}_ci": [ci for _, ci in both]}


def completions(
    drawn: Columns, n: int, prompts: Sequence[Encoded], judges: Sequence[str]
) -> list[Figures]:
    """The first ``n`` completions of each prompt, with what is known of each."""
    names = [name for name in ("length", "kl_nats", *judges) if name in drawn]
    return [
        {
            "prompt": row.source.text,  # type: ignore[union-attr]
            "completion": drawn["text"][q, i],
            **{name: float(drawn[name][q, i]) for name in names},
        }
        for q, row in enumerate(prompts)
        for i in range(n)
    ]


def table(found: Mapping[str, Any], width: int = 100) -> str:
    """What ``evaluate_model`` has found, for a terminal or a log of ``width`` columns."""
    out = StringIO()
    console = Console(file=out, width=width, color_system=None)
    columns, judges = {"policy": found["policy"]}, found["rewards"]
    title = f"{found['models']['policy']} on {found['prompts']} held-out prompts, {found['n']} each"
    if found.get("against") is not None:
        columns["against " + found["models"]["against"]] = found["against"]
    rows = [
        (label, *(mean_text(column, name) for column in columns.values()))
        for name, label in LABELS.items()
        if name in found["policy"]
    ]
    print_table(console, title, ("", *columns), rows)
    if wins := found.get("win_rate"):
        rates = [(f"by {j}", mean_text(wins, j)) for j in judges]
        print_table(console, "Win rate (ties one half)", ("", "policy wins"), rates)
    for name, title in {"pass_at_k": "pass@k", "maj_at_k": "maj@k"}.items():
        if curve := found.get(name):
            print_table(console, title, ("k", "share of prompts"), _rows(curve, "k", ("rate",)))
    if curve := found.get("best_of_n"):
        rows = _rows(curve, "n", ("kl_nats", *judges))
        print_table(console, "Best of n, without training", ("n", "KL, nats", *judges), rows)
    if equal := found.get("equal_kl"):
        kl = f"the policy's KL of {number(equal['kl_nats'])} nats"
        reached = ", ".join(f"{judge} {number(equal[judge])}" for judge in judges)
        known = any(equal[judge] is not None for judge in judges)
        text = f"Best of n at {kl}: {reached}." if known else f"Best of n does not reach {kl}."
        console.print(Text(visible(text)))
    return out.getvalue()


def _rows(curve: Mapping[str, Any], over: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    return [
        (str(x), *(mean_text({k: v[i] for k, v in curve.items()}, name) for name in names))
        for i, x in enumerate(curve[over])
    ]


def mean_text(figures: Mapping[str, Any], name: str) -> str:
    """A mean with the half width of its interval: 0.15 ± 0.09."""
    if name not in figures:
        return ""
    ci = figures.get(f"{name}_ci")
    return number(figures[name]) + ("" if ci is None or ci != ci else f" ± {number(ci)}")


def print_table(
    console: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    shown = Table(title=Text(visible(title)), title_justify="left", box=None, padding=(0, 3, 0, 0))
    for name in names:
        shown.add_column(Text(visible(name)), justify="left" if name == names[0] else "right")
    for row in rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    console.print(shown)
    console.print()
