"""Completions of held-out prompts by one network, and all that is measured of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import SampleConfig
from jaxrlhf.core.types import Array, Rollout
from jaxrlhf.data.batches import held_out_batches
from jaxrlhf.data.formats import Prompt
from jaxrlhf.data.rows import Rows
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.tokens import Encoded, prompt_arrays
from jaxrlhf.mesh.processes import fetch
from jaxrlhf.mesh.sharding import put_rows, row_shards
from jaxrlhf.models.load import Network
from jaxrlhf.rewards.judge import Judge
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import score

Columns = dict[str, np.ndarray]
"""What is known of N completions of each of Q prompts: arrays [Q, N].

``token`` (lists of ids) and ``text``; ``length`` (tokens) and ``ended``; ``logp``, the sum of the
log-probs at T = 1 (nats); ``kl_nats``, the sum of log π − log π_ref, where there is a reference;
and the score of each judge, NaN where it had none."""


@dataclass(frozen=True)
class Bench:
    """Where networks are measured: the same prompts, judges and settings for each."""

    prompts: Rows[Encoded]
    width: int
    """P, tokens that prompts are padded to."""
    sampling: SampleConfig
    """``n`` is not read."""
    rows: int
    """Completions drawn at once on each device."""
    judges: Mapping[str, Judge]
    tokenizer: Any
    mesh: Mesh


class Shape(NamedTuple):
    """How N completions of each prompt are drawn in batches that all have one shape."""

    prompts: int
    """Prompts a batch; divides by the devices that rows are split over."""
    n: int
    """Completions of each."""
    rounds: int
    """Batches for the same prompts, until they have their N."""


def shape_of(count: int, n: int, rows: int) -> Shape:
    """The batches for ``n`` completions of each of ``count`` prompts, about ``rows`` a device."""
    rounds = -(-n // rows)
    each = -(-n // rounds)
    shards = row_shards()
    prompts = min(max(rows // each, 1), -(-count // shards)) * shards
    return Shape(prompts, each, rounds)


def draw(
    bench: Bench, network: Network, n: int, key: jax.Array, reference: Network | None = None
) -> Columns:
    """Draw and measure ``n`` completions of every prompt.

    The i-th draw of the q-th prompt has a key of its own, number q·n + i: it is the same however
    many rows are drawn at once.

    Args:
      key: of this network's draws alone.
      reference: what the KL is measured to.
    """
    shape = shape_of(len(bench.prompts), n, bench.rows)
    program = _program(bench, network, shape, reference)
    parts = []
    for row_Q, real_Q in held_out_batches(len(bench.prompts), shape.prompts):
        prompts = [bench.prompts.items[i] for i in row_Q]
        first_QN = row_Q[:, None] * n + np.arange(shape.n)
        rounds = [
            program(prompts, key, (first_QN + turn * shape.n).ravel().astype(np.int32))
            for turn in range(shape.rounds)
        ]
        whole = _join(rounds, axis=1)
        parts.append({name: x_QN[real_Q, :n] for name, x_QN in whole.items()})
    return _join(parts, axis=0)


def _join(parts: Sequence[Columns], axis: int) -> Columns:
    return {name: np.concatenate([part[name] for part in parts], axis) for name in parts[0]}


def _program(
    bench: Bench, network: Network, shape: Shape, reference: Network | None
) -> Callable[[Sequence[Encoded], jax.Array, np.ndarray], Columns]:
    """(prompts of a batch, key, what its rows' keys are folded from) → columns."""
    settings = SampleConfig(
        max_new_tokens=bench.sampling.max_new_tokens,
        n=shape.n,
        stop=bench.sampling.stop,
        pad=bench.sampling.pad,
    )

    def program(rows: Sequence[Encoded], key: jax.Array, row_B: np.ndarray) -> Columns:
        arrays = put_rows(prompt_arrays(rows, bench.width, settings.pad), bench.mesh)
        rollout = _sample(
            network.model, network.params, *arrays, key, settings, network.lora, row_B=row_B
        )
        prompts: list[Prompt] = [row.source for row in rows]  # type: ignore[misc]
        scores = {name: _known(judge, rollout, prompts) for name, judge in bench.judges.items()}
        ref_logp_BT = None
        if reference is not None:
            ref_logp_BT = _score(
                reference.model,
                reference.params,
                rollout.token_BT,
                rollout.attention_mask_BT,
                1.0,
                reference.lora,
                bench.width,
            )
        flat = {**_columns(bench.tokenizer, *fetch((rollout, ref_logp_BT))), **scores}
        return {name: x_B.reshape(-1, shape.n) for name, x_B in flat.items()}

    return program


def _known(judge: Judge, rollout: Rollout, prompts: Sequence[Prompt]) -> np.ndarray:
    reward_B = np.asarray(fetch(judge(rollout, prompts).reward_B), np.float64)
    return np.where(np.isfinite(reward_B), reward_B, np.nan)


def _columns(tokenizer: Any, rollout: Rollout, ref_logp_BT: np.ndarray | None) -> Columns:
    """What the rollout itself says of its rows, [B] each."""
    token_BT, mask_BT = np.asarray(rollout.token_BT), np.asarray(rollout.mask_BT)
    rows = len(token_BT)
    texts = decode_rollout(tokenizer, token_BT, mask_BT, [""] * rows)
    ids = [t[m != 0].tolist() for t, m in zip(token_BT, mask_BT, strict=True)]
    logp_BT = np.asarray(rollout.logp_BT, np.float64)
    out = {
        "token": np.fromiter(ids, object, rows),
        "text": np.fromiter(texts, object, rows),
        "length": mask_BT.sum(1, dtype=np.float64),
        "ended": np.asarray(rollout.ended_B, np.float64),
        "logp": logp_BT.sum(1),
    }
    if ref_logp_BT is not None:
        out["kl_nats"] = ((logp_BT - ref_logp_BT) * mask_BT).sum(1)
    return out


_sample: Callable[..., Rollout] = jax.jit(sample, static_argnums=(0, 5))
_score: Callable[..., Array] = jax.jit(score, static_argnums=(0, 6))
