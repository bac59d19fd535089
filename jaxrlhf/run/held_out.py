"""What held-out rows say of a network, before, during and after training, with the same draws.

A policy completes prompts and is judged. A network that learns from rows has the loss of its
objective, and a reward model the accuracy and calibration of its scores.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import aggregate_steps
from jaxrlhf.config import ProcessRewardModelConfig, is_on_policy
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.stats import (
    Reliability,
    accuracy_by_gap,
    correlation,
    distinct_n,
    distribution,
    over_prompts,
    pair_reliability,
    rank_correlation,
    reliability,
    sigmoid,
)
from jaxrlhf.core.types import Params, Rollout, TokenBatch
from jaxrlhf.data.batches import held_out_batches, preference_batch
from jaxrlhf.data.formats import prompt_of
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.tokens import Encoded, imitated, prompt_arrays
from jaxrlhf.mesh.sharding import at_hand, fetch, put_rows, row_shards
from jaxrlhf.mesh.signals import poll
from jaxrlhf.rewards.judge import Judge
from jaxrlhf.run.feed import pack
from jaxrlhf.run.setup import Run

log = logging.getLogger(__name__)


EVALUATION = 0x7FFFFFFF
"""Stream of the draws of evaluation, beside those of the steps: the same at every evaluation."""


LARGE_GAP = 0.5
"""Pairs whose ``gap`` is at least this are also counted apart."""


Curve = dict[str, list[float]]
"""A reliability curve: ``predicted``, ``observed`` and ``count`` of each bin; ``gap_edges``, the
lower edges of the bins of ``accuracy_gap_1`` and on."""


Scored = list[tuple[Encoded, np.ndarray]]
"""Rows, and the scores of their answers [C], or of the tokens of a stepwise one [T]."""


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out rows, and what they were taken from."""

    metrics: dict[str, float]
    samples: tuple[dict[str, Any], ...] = ()
    gold: np.ndarray | None = None
    """The gold measure of each completion, in an order that every evaluation shares."""
    reliability: Curve | None = None
    """A reward model's probabilities against what came true."""


def evaluate(run: Run, params: Params) -> Evaluation | None:
    """Measure trainable parameters on the held-out rows; None if there are none."""
    if run.eval_rows is None:
        return None
    if is_on_policy(run.config):
        return evaluate_policy(run, params, run.eval_rows.items)
    return evaluate_offline(run, params, run.eval_rows.items)


def evaluate_policy(run: Run, params: Params, rows: tuple[Encoded, ...]) -> Evaluation:
    """Sample ``eval.n`` completions of each held-out prompt at T = 1, untruncated, and judge them.

    Metrics: ``proxy`` (the reward that is trained on) and ``gold`` (eval.gold), each with
    ``_ci``, the half width of the mean's 95 % interval, both over the completions that have it
    (NaN if none has: ``max_excluded`` is for training alone); ``kl_nats``, the mean over
    completions of Σ_t log π − log π_ref; ``length`` (tokens); ``ended`` (fraction); ``entropy``
    (nats a token); ``distinct_2`` (distinct bigrams of tokens / bigrams); ``completions``.
    """
    # Batches only bound the memory: draws follow from a prompt's place in the file.
    drawn = []
    for batch in batches(run, len(rows)):
        poll()
        drawn.append(_draw(run, params, rows, *batch))
    columns = {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}
    tokens = [t[m != 0].tolist() for t, m in zip(columns["token"], columns["mask"], strict=True)]
    count = columns["mask"].sum(1)
    metrics = {
        "kl_nats": float(columns["kl"].mean()),
        "length": float(count.mean()),
        "ended": float(columns["ended"].mean()),
        "entropy": float(-columns["logp"].sum() / count.sum()),
        "distinct_2": distinct_n(tokens, 2),
        "completions": float(len(tokens)),
    }
    for name in ("proxy", "gold"):
        if name in columns:
            metrics[name], metrics[f"{name}_ci"] = over_prompts(columns[name], run.config.eval.n)
            if unknown := int((~np.isfinite(columns[name])).sum()):
                log.warning("eval/%s: %d of %d completions have none", name, unknown, len(tokens))
    samples = [
        {
            **prompt_of(rows[index].source),
            "completion": text,
            **{name: float(columns[name][b]) for name in ("proxy", "gold") if name in columns},
        }
        for b, (index, text) in enumerate(zip(columns["row"], columns["text"], strict=True))
    ]
    return Evaluation(metrics, tuple(samples), columns.get("gold"))


def _draw(
    run: Run, params: Params, rows: tuple[Encoded, ...], row_Q: np.ndarray, real_Q: np.ndarray
) -> dict[str, np.ndarray]:
    """One batch of completions: everything that is measured of them, real rows only.

    The draws of a prompt follow from its place in the file, whatever batch it is in.
    """
    n = run.config.eval.n
    picked = [rows[i] for i in row_Q]
    arrays = prompt_arrays(picked, run.config.data.max_prompt_tokens, run.config.sample.pad)
    stream = jax.random.fold_in(jax.random.key(run.config.seed), EVALUATION)
    stream = jax.random.fold_in(stream, 0)  # as it has been for the first batch
    frozen = run.frozen["policy"]
    row_B = (row_Q[:, None] * n + np.arange(n)).ravel().astype(np.int32)
    decoding = run.programs.lay_out(params, frozen)
    rollout: Rollout = run.programs.eval_sample(
        params, frozen, decoding, *put_rows(arrays, run.mesh), stream, row_B
    )
    del decoding
    assert run.reference is not None
    ref_logp_BT = run.programs.eval_reference(
        at_hand(run.reference.params), rollout.token_BT, rollout.attention_mask_BT
    )
    host, ref_logp_BT = fetch((rollout, ref_logp_BT))
    prompts = [row.source for row in picked]
    real_B = np.repeat(real_Q, n)
    # KL(π‖π_ref) of a sequence by its own samples: Σ_t log π − log π_ref.
    gap_BT = (host.logp_BT - ref_logp_BT) * host.mask_BT
    texts = [p.text for p in prompts for _ in range(n)]  # type: ignore[union-attr]
    out = {
        "row": np.repeat(row_Q, n),
        "token": host.token_BT,
        "mask": host.mask_BT,
        "logp": host.logp_BT,
        "ended": host.ended_B,
        "kl": gap_BT.sum(1),
        "text": np.array(
            decode_rollout(run.tokenizer, host.token_BT, host.mask_BT, texts), dtype=object
        ),
    }
    judges: dict[str, Judge | None] = {"proxy": run.judge, "gold": run.gold}
    for name, judge in judges.items():
        if judge is not None:
            # The rows that fill a batch count for nothing, and nothing here ends a run.
            judge = replace(judge, max_excluded=1.0)
            out[name] = fetch(judge(rollout, prompts).reward_B)  # type: ignore[arg-type]
    return {name: x[real_B] for name, x in out.items()}


def evaluate_offline(run: Run, params: Params, rows: tuple[Encoded, ...]) -> Evaluation:
    """Loss and metrics of the training objective on held-out rows; of reward models also accuracy,
    calibration and the rest of ``judge_scores``."""
    metrics, curve = measure(run, params, rows)
    return Evaluation(metrics, reliability=curve)


def measure(
    run: Run, params: Params, rows: Sequence[Encoded]
) -> tuple[dict[str, float], Curve | None]:
    """Loss and metrics of the training objective; of reward models also ``judge_scores``."""
    totals: dict[str, float] = {}
    frozen = run.frozen["policy"]
    scored: Scored = []
    # A loss over tokens is a mean over tokens: batches weigh by what they hold of them.
    tokens_R = np.array([imitated(row).sum() for row in rows])
    for row_B, real_B in batches(run, len(rows)):
        # With patience it decides what is saved, and is short: see Session.record.
        if not run.config.eval.patience:
            poll()
        picked = [rows[i] for i in row_B]
        batch = pack(run, picked, real_B)
        if run.programs.scores is not None:
            score = run.programs.scores(params, frozen, batch)
            loss, metrics = run.programs.loss_of_scores(score, batch)
            scored += list(zip(picked, fetch(score), strict=True))[: int(real_B.sum())]
        else:
            loss, metrics = run.programs.loss(params, frozen, batch)
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


def batches(run: Run, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """All of ``count`` rows in batches that divide among the devices; see ``held_out_batches``."""
    return held_out_batches(count, run.config.eval.batch_size, row_shards())


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


def _comparisons(scored: Scored) -> tuple[dict[str, float], Reliability | None, list[float]]:
    """Of pairs and rankings."""
    found = [pair for row, score_C in scored for pair in _pairs(row, score_C)]
    if not found:
        return {"pairs": 0.0}, None, []
    difference_N, gap_N = np.array(found, float).T
    # A tie counts one half: an undecided reward model is right by chance.
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


def measure_normalisation(run: Run, params: Params) -> dict[str, float]:
    """``mean`` and ``std`` (ddof 0) of the scores of the rows of ``normalise_on``, reward units.

    Raises:
      InputError: scores that are all alike, or not finite.
    """
    assert run.normalise_rows is not None
    rows = run.normalise_rows.items
    seen = []
    for row_B, real_B in batches(run, len(rows)):
        poll()
        picked = [rows[i] for i in row_B]
        batch = preference_batch(picked, run.width, run.config.sample.pad, real_B)
        score_BC = run.programs.scores(params, run.frozen["policy"], put_rows(batch, run.mesh))
        seen.append(np.asarray(fetch(score_BC), np.float64)[real_B, 0])
    score_N = np.concatenate(seen)
    mean, std = float(score_N.mean()), float(score_N.std())
    # To divide by the noise of equal scores would give them a meaning.
    if not (np.isfinite(std) and std > 1e-6 * max(1.0, abs(mean))):
        path = run.normalise_rows.path
        raise InputError(
            f"algorithm.normalise_on={path}: its {len(rows)} answers score {mean:.4g} ± {std:.2g}, "
            "which is no spread to divide by: put answers there that differ, and start the run "
            "again: all of its training is saved"
        )
    return {"mean": mean, "std": std}
