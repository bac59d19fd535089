"""From drawn completions to the figures of evaluation.json."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from jaxrlhf.core.stats import (
    best_of_n,
    best_of_n_nats,
    maj_at_k,
    n_at_kl,
    pass_at_k,
    powers_of_two,
    repetition,
    win_rate,
)
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.run.held_out import over_prompts
from jaxrlhf.run.record import distinct_n, mean_interval, share_interval
from jaxrlhf.study.evaluate.drawing import Columns

Figures = dict[str, Any]


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
    first["repetition_3"] = np.array([repetition(ids) for ids in tokens]).reshape(-1, n)
    figures: Figures = {}
    for name in (*judges, "kl_nats", "length", "ended", "repetition_3"):
        if name in first:
            interval = share_interval if name == "ended" else mean_interval
            figures[name], figures[f"{name}_ci"] = over_prompts(first[name], n, interval)
    scores = [np.isnan(first[judge]) for judge in judges]
    return {
        **figures,
        "entropy": float(-first["logp"].sum() / first["length"].sum()),
        "distinct_1": distinct_n(tokens, 1),
        "distinct_2": distinct_n(tokens, 2),
        **({"unknown": float(np.any(scores, axis=0).mean())} if scores else {}),
    }


def compare(ours: Columns, theirs: Columns, n: int, judges: Sequence[str]) -> Figures:
    """Win rate of ``ours`` by each judge, with ``_ci``: see ``measures.win_rate``."""
    figures: Figures = {}
    for judge in judges:
        won_Q = win_rate(ours[judge][:, :n], theirs[judge])
        figures[judge], figures[f"{judge}_ci"] = over_prompts(won_Q, 1, share_interval)
    return figures


def solved(
    drawn: Columns,
    n: int,
    judges: Sequence[str],
    correct_at: float | None,
    extract: Callable[[str], Hashable | None],
) -> Figures:
    """``pass_at_k`` and ``maj_at_k`` for k = 1, 2, 4, … n; nothing where nothing is correct or not.

    For every k over the same ``solved_prompts``: those whose n completions are all known. Nothing
    either where there is none.

    Args:
      correct_at: the least score, by the last of the judges, of a correct completion. None: 1 if
        its known scores are all 0 or 1, and no measure else.
      extract: completion → its answer.
    """
    if not judges:
        return {}
    score_QN = drawn[judges[-1]][:, :n]
    known_QN = ~np.isnan(score_QN)
    whole_Q = known_QN.all(axis=1)
    if not whole_Q.any():
        return {}
    if correct_at is None:
        if not np.isin(score_QN[known_QN], (0, 1)).all():
            return {}
        correct_at = 1.0
    correct_QN = np.where(known_QN, score_QN >= correct_at, np.nan)
    correct_QN = correct_QN[whole_Q]
    answers = [[extract(text) for text in row] for row in drawn["text"][whole_Q, :n]]
    ks = powers_of_two(n)
    solved_KQ = {
        "pass_at_k": [pass_at_k(correct_QN, k) for k in ks],
        "maj_at_k": [maj_at_k(answers, correct_QN, k) for k in ks],
    }
    rates = {
        name: [over_prompts(x_Q, 1, share_interval) for x_Q in x_KQ]
        for name, x_KQ in solved_KQ.items()
    }
    return {
        name: {"k": ks, "rate": [mean for mean, _ in rate], "rate_ci": [ci for _, ci in rate]}
        for name, rate in rates.items()
    } | {"correct_at": correct_at, "solved_prompts": int(whole_Q.sum())}


def best_of_n_curve(drawn: Columns, most: int, judges: Sequence[str], policy: Figures) -> Figures:
    """``best_of_n``: what the best of n by the first judge is worth to each, n = 1, 2, 4, … most.

    The same samples serve every n (see ``measures.best_of_n``), at the prompts' mean KL (see
    ``measures.best_of_n_nats``). And ``equal_kl``, the best of the n, whole or not, whose KL is the
    policy's own: what training has to beat. None in it where the policy is further from its
    reference than the curve reaches. All of the curve is over the same ``best_of_n_prompts``:
    those with enough known samples for all n. Nothing where there is none.
    """
    counts = powers_of_two(most)
    score_QN = drawn[judges[0]][:, :most]
    values = {
        judge: np.stack([best_of_n(score_QN, n, drawn[judge][:, :most]) for n in counts])
        for judge in judges
    }
    whole_Q = np.all([np.isfinite(value_KQ[-1]) for value_KQ in values.values()], axis=0)
    if not whole_Q.any():
        return {}
    score_PN = score_QN[whole_Q]
    nats = [over_prompts(best_of_n_nats(score_PN, n), 1)[0] for n in counts]
    curve: Figures = {"n": counts, "kl_nats": nats}
    for judge, value_KQ in values.items():
        both = [over_prompts(value_Q, 1) for value_Q in value_KQ[:, whole_Q]]
        curve[judge], curve[f"{judge}_ci"] = [mean for mean, _ in both], [ci for _, ci in both]
    found = {"best_of_n": curve, "best_of_n_prompts": int(whole_Q.sum())}
    if "kl_nats" not in policy:
        return found
    kl = policy["kl_nats"]
    n = n_at_kl(score_PN, kl, most)
    equal: Figures = dict.fromkeys(judges)
    if n is not None:
        for judge in judges:
            best_P = best_of_n(score_PN, n, drawn[judge][whole_Q, :most])
            equal[judge], _ = over_prompts(best_P, 1)
    return found | {"equal_kl": {"kl_nats": kl, **equal}}


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
