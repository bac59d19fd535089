"""What held-out rows say of a network, before and after training, with the same draws."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxrlhf.config import is_on_policy
from jaxrlhf.data.tokens import Encoded, prompt_arrays
from jaxrlhf.held_out import Curve, batches, measure
from jaxrlhf.judging import Judge
from jaxrlhf.metrics import distinct_n, mean_interval
from jaxrlhf.offload import at_hand
from jaxrlhf.processes import fetch
from jaxrlhf.rewards.text import decode_rollout
from jaxrlhf.setup import Run
from jaxrlhf.sharding import put_rows
from jaxrlhf.types import Params, Rollout

log = logging.getLogger(__name__)

EVALUATION = 0x7FFFFFFF
"""Stream of the draws of evaluation, beside those of the steps: the same at every evaluation."""


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
    drawn = [_draw(run, params, rows, *batch) for batch in batches(run, len(rows))]
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
            "prompt": rows[index].source.text,  # type: ignore[union-attr]
            "completion": text,
            **{name: float(columns[name][b]) for name in ("proxy", "gold") if name in columns},
        }
        for b, (index, text) in enumerate(zip(columns["row"], columns["text"], strict=True))
    ]
    return Evaluation(metrics, tuple(samples), columns.get("gold"))


def over_prompts(
    x_B: np.ndarray, n: int, interval: Callable[..., tuple[float, float]] = mean_interval
) -> tuple[float, float]:
    """Mean of the prompts' means, and the half width of its 95 % interval.

    The n completions of a prompt are no independent draws of prompts, so they are averaged first;
    a completion without a number (NaN) is left out, a prompt without any likewise.
    """
    x_QG = np.asarray(x_B, np.float64).reshape(-1, n)
    count_Q = np.isfinite(x_QG).sum(1)
    mean_Q = np.nansum(x_QG, axis=1) / np.maximum(count_Q, 1)
    return interval(mean_Q[count_Q > 0])


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
    rollout: Rollout = run.programs["eval_sample"](
        params, frozen, *put_rows(arrays, run.mesh), stream, row_B
    )
    assert run.reference is not None
    ref_logp_BT = run.programs["eval_reference"](
        at_hand(run.reference.params), rollout.token_BT, rollout.attention_mask_BT
    )
    host, ref_logp_BT = fetch((rollout, ref_logp_BT))
    prompts = [row.source for row in picked]
    real_B = np.repeat(real_Q, n)
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
    calibration and the rest of ``held_out.judge_scores``."""
    metrics, curve = measure(run, params, rows)
    return Evaluation(metrics, reliability=curve)
