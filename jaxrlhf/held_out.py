"""What rows say of a network that learns from rows: its loss, and how good a reward model is."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import aggregate_steps
from jaxrlhf.calibration import (
    Reliability,
    accuracy_by_gap,
    correlation,
    distribution,
    pair_reliability,
    rank_correlation,
    reliability,
    sigmoid,
)
from jaxrlhf.config import ProcessRewardModelConfig
from jaxrlhf.data.batches import held_out_batches
from jaxrlhf.data.packing import answers_batch
from jaxrlhf.data.tokens import Encoded, imitated
from jaxrlhf.errors import InputError
from jaxrlhf.processes import fetch
from jaxrlhf.setup import Run, pack
from jaxrlhf.sharding import put_rows, row_shards
from jaxrlhf.types import Params, TokenBatch

LARGE_GAP = 0.5
"""Pairs whose ``gap`` is at least this are also counted apart."""

Curve = dict[str, list[float]]
"""A reliability curve: ``predicted``, ``observed`` and ``count`` of each bin; ``gap_edges``, the
lower edges of the bins of ``accuracy_gap_1`` and on."""

Scored = list[tuple[Encoded, np.ndarray]]
"""Rows, and the scores of their answers [C], or of the tokens of a stepwise one [T]."""


def batches(run: Run, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """All of ``count`` rows in batches that divide among the devices; see ``held_out_batches``."""
    return held_out_batches(count, run.config.eval.batch_size, row_shards())


def measure(
    run: Run, params: Params, rows: Sequence[Encoded]
) -> tuple[dict[str, float], Curve | None]:
    """Loss and metrics of the training objective; of reward models also ``judge_scores``."""
    totals: dict[str, float] = {}
    frozen = run.frozen["policy"]
    scored: Scored = []
    tokens_R = np.array([imitated(row).sum() for row in rows])
    for row_B, real_B in batches(run, len(rows)):
        picked = [rows[i] for i in row_B]
        batch = pack(run, picked, real_B)
        if "scores" in run.programs:
            score = run.programs["scores"](params, frozen, batch)
            loss, metrics = run.programs["loss_of_scores"](score, batch)
            scored += list(zip(picked, fetch(score), strict=True))[: int(real_B.sum())]
        else:
            loss, metrics = run.programs["loss"](params, frozen, batch)
        share = real_B.sum() / len(rows)
        if isinstance(batch, TokenBatch):  # its mean is over tokens
            share = np.dot(tokens_R[row_B], real_B) / tokens_R.sum()
        for name, x in {"loss": loss, **metrics}.items():
            totals[name] = totals.get(name, 0.0) + share * float(x)
    curve = None
    if scored:
        judged, curve = judge_scores(run.config.algorithm, scored)
        if judged.get("pairs") == 0:
            del totals["accuracy"]  # of nothing but ties
        totals |= judged
    return totals | {"rows": float(len(rows))}, curve


def judge_scores(algorithm: Any, scored: Scored) -> tuple[dict[str, float], Curve | None]:
    """How good a reward model's scores are.

    Of pairs, and of all pairs of unequal rank in rankings: ``accuracy`` (a tie counts one half),
    ``ece`` of σ(Δ), ``pairs``. Where rows say by how much one answer is better (``gap``,
    ``margin``, or the ``scores`` of a ranking's responses) also ``accuracy_gap_1`` to ``_4``, over
    quarters of the pairs from the closest to the clearest, and ``accuracy_large_gap`` over the
    ``pairs_large_gap`` that are at least 0.5 apart. Where all ranks tie, ``pairs`` is 0, and there
    is no accuracy.

    Of scored answers: ``correlation`` (Pearson) and ``rank_correlation`` (Spearman) with the score;
    of labels, and of steps one by one: ``accuracy`` and ``ece``.

    Of all: ``score_mean``, ``score_std``, percentiles, and ``length_correlation`` with the tokens
    of the answer.

    Returns:
      Metrics, and the reliability curve where there are probabilities.
    """
    lengths = [len(answer) for row, _ in scored for answer in row.answers]
    metrics: dict[str, float] = {}
    if algorithm.rows == "steps":
        values, metrics, found = _steps(algorithm, scored)
    else:
        values = np.array([s for row, x in scored for s in x[: len(row.answers)]], float)
        if algorithm.rows == "scored":
            metrics, found = _answers(algorithm.kind == "binary", scored, values)
        else:
            metrics, found, edges = _comparisons(scored)
    metrics |= distribution(values)
    metrics["length_correlation"] = correlation(values, np.array(lengths))
    if found is None:
        return metrics, None
    curve: Curve = {
        "predicted": found.predicted,
        "observed": found.observed,
        "count": [float(n) for n in found.count],
    }
    if algorithm.rows in ("pairs", "ranked") and edges:
        curve["gap_edges"] = edges
    return metrics | {"ece": found.ece}, curve


def measure_normalisation(run: Run, params: Params) -> dict[str, float]:
    """``mean`` and ``std`` (ddof 0) of the scores of the rows of ``normalise_on``, reward units.

    Raises:
      InputError: scores that are all alike, or not finite.
    """
    assert run.normalise_rows is not None
    rows = run.normalise_rows.items
    seen = []
    for row_B, real_B in batches(run, len(rows)):
        picked = [rows[i] for i in row_B]
        batch = answers_batch(picked, run.width, run.config.sample.pad, real_B)
        score_BC = run.programs["scores"](params, run.frozen["policy"], put_rows(batch, run.mesh))
        seen.append(np.asarray(fetch(score_BC), np.float64)[real_B, 0])
    score_N = np.concatenate(seen)
    mean, std = float(score_N.mean()), float(score_N.std())
    if not (np.isfinite(std) and std > 1e-6 * max(1.0, abs(mean))):
        path = run.normalise_rows.path
        raise InputError(
            f"algorithm.normalise_on={path}: its {len(rows)} answers score {mean:.4g} ± {std:.2g}, "
            "which is no spread to divide by: put answers there that differ, and start the run "
            "again: all of its training is saved"
        )
    return {"mean": mean, "std": std}


def _comparisons(scored: Scored) -> tuple[dict[str, float], Reliability | None, list[float]]:
    """Of pairs and rankings."""
    found = [pair for row, score_C in scored for pair in _pairs(row, score_C)]
    if not found:
        return {"pairs": 0.0}, None, []
    difference_N, gap_N = np.array(found, float).T
    right_N, known_N = (1 + np.sign(difference_N)) / 2, np.isfinite(gap_N)
    metrics = {"accuracy": float(right_N.mean()), "pairs": float(len(found))}
    edges: list[float] = []
    if known_N.any():
        accuracy, edges = accuracy_by_gap(difference_N[known_N], gap_N[known_N])
        metrics |= {f"accuracy_gap_{i}": x for i, x in enumerate(accuracy, 1)}
        large_N = known_N & (gap_N >= LARGE_GAP)
        if large_N.any():
            metrics["accuracy_large_gap"] = float(right_N[large_N].mean())
            metrics["pairs_large_gap"] = float(large_N.sum())
    return metrics, pair_reliability(difference_N), edges


def _pairs(row: Encoded, score_C: np.ndarray) -> Iterator[tuple[float, float]]:
    """(score of the better − of the worse, by how much it is better) of a row's unequal answers."""
    ranks = getattr(row.source, "ranks", (1, 2))
    for i, better in enumerate(ranks):
        for j, worse in enumerate(ranks):
            if better < worse:
                yield float(score_C[i] - score_C[j]), _gap(row.source, i, j, len(ranks))


def _gap(source: Any, better: int, worse: int, count: int) -> float:
    """By how much one answer is better than another; NaN where the row does not say."""
    scores, gap = source.columns.get("scores"), source.columns.get("gap")
    if count == 2:
        margin = getattr(source, "margin", 0.0)
        given = gap if gap is not None else margin or None
        if given is not None:
            return _number(given)
    if isinstance(scores, list) and len(scores) == count:
        return _number(scores[better]) - _number(scores[worse])
    return np.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _answers(
    binary: bool, scored: Scored, score_N: np.ndarray
) -> tuple[dict[str, float], Reliability | None]:
    """Of answers with a score each."""
    target_N = np.array([row.source.columns["score"] for row, _ in scored], float)
    metrics = {
        "correlation": correlation(score_N, target_N),
        "rank_correlation": rank_correlation(score_N, target_N),
    }
    if not binary:
        return metrics, None
    metrics["accuracy"] = float(np.mean((score_N > 0) == (target_N > 0.5)))
    return metrics, reliability(sigmoid(score_N), target_N)


def _steps(
    algorithm: ProcessRewardModelConfig, scored: Scored
) -> tuple[np.ndarray, dict[str, float], Reliability]:
    """Of answers in steps; the first result is each answer's reward."""
    score_NT = np.stack([score_CT[0] for _, score_CT in scored])
    end_NT = np.zeros(score_NT.shape, np.float32)
    scores, labels = [], []
    for index, (row, _) in enumerate(scored):
        at = len(row.prompt) + np.array(row.ends)
        end_NT[index, at] = 1
        scores.append(score_NT[index, at])
        labels.append(row.source.labels)  # type: ignore[union-attr]
    score_N, label_N = np.concatenate(scores), np.concatenate(labels)
    metrics = {
        "accuracy": float(np.mean((score_N > 0) == (label_N > 0.5))),
        "steps": len(score_N) / len(scored),
    }
    aggregate = aggregate_steps(jnp.asarray(score_NT), jnp.asarray(end_NT), algorithm.aggregate)
    rewards = np.asarray(aggregate)
    return rewards, metrics, reliability(sigmoid(score_N), label_N)
