"""An algorithm is a record of pure functions; ``sft`` is the shortest, ``ppo`` has every field."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import chex
import jax.numpy as jnp

from jaxrlhf.config.algorithms import (
    Aggregation,
)
from jaxrlhf.config.offline import (
    SFTConfig,
)
from jaxrlhf.core import masked
from jaxrlhf.core.types import AnyBatch, Array, Batch, Outputs, PreferenceBatch, TokenBatch

Metrics = dict[str, Array]
"""Scalars by name. A loss's are sums under the batch's weights, so microbatches add up, except
names that end in _max or _min. ``weight`` is Σ weight: 1 unless ``aggregation`` is sequence_sum or
fixed, and what to divide the others by to read them as means."""

Loss = Callable[..., tuple[Array, Metrics]]

Targets = Callable[..., tuple[Any, Metrics]]
"""(rollout, ref_logp_BT, reward_B, valid_B, coefficients, …) → (batch, metrics of the rollout)."""


class Algorithm(NamedTuple):
    """What sets one algorithm apart."""

    targets: Targets | None
    """On policy: (rollout, ref_logp_BT, reward_B, valid_B, coefficients) → (batch, metrics of the
    whole rollout), with ``value_BT``, ``baseline_B``, or ``score_BS`` and ``weight_S``, by name if
    it needs them; of the rollout alone with a teacher. ``coefficients`` holds traced scalars, such
    as ``kl_coef``. None for algorithms that learn from data."""
    loss: Loss
    """(what ``reads`` says, batch) → (scalar, metrics)."""
    value_loss: Loss | None = None
    """(outputs, batch) → (scalar, metrics), before any coefficient."""
    needs: frozenset[str] = frozenset()
    """Which of "value", "reference", "entropy", "greedy" (what each prompt's greedy response is
    worth), "scores" (of each source of reward, with its weight) and "teacher" (the reference, in
    the update) have to be had for it."""
    reads: Literal["outputs", "scores", "steps", "pairs"] = "outputs"
    """What its loss is given: Outputs of a batch's rows, the rewards [B, C] of its candidates, the
    head at every token of them [B, C, T], or their log-probs [B, C, T]."""
    divergence: Callable[[Array, Array], Array] | None = None
    """With a teacher: (logits, its logits) [..., V] → [...], what ``Outputs.divergence_BT`` is made
    of; differentiable by the first."""


def sft(config: SFTConfig) -> Algorithm:
    """−Σ weight·log π, nats a token, over the tokens to imitate; metrics ``weight``, ``tokens``."""
    del config

    def loss(outputs: Outputs, batch: TokenBatch) -> tuple[Array, Metrics]:
        weight_BT = batch.weight_BT  # 0 on prompt and padding, which are never read
        check_shapes(2, outputs.logp_BT, weight_BT)
        logp_BT = masked.fill(outputs.logp_BT, weight_BT)
        tokens = (weight_BT != 0).sum().astype(jnp.float32)
        return -(weight_BT * logp_BT).sum(), {"weight": weight_BT.sum(), "tokens": tokens}

    return Algorithm(targets=None, loss=loss)


def check_shapes(rank: int, *arrays: Array) -> None:
    """AssertionError unless all have this rank and the same shape."""
    chex.assert_rank(arrays, rank)
    chex.assert_equal_shape(arrays)


def weighted(loss_B: Array, metrics_B: Metrics, weight_B: Array) -> tuple[Array, Metrics]:
    """Σ weight·loss over rows, and the same of each metric; ``weight`` is Σ weight.

    All [B], float32; rows of weight 0 are never read.
    """

    def total(x_B: Array) -> Array:
        return (weight_B * masked.fill(x_B, weight_B)).sum()

    metrics = {name: total(x_B) for name, x_B in metrics_B.items()}
    return total(loss_B), {**metrics, "weight": weight_B.sum()}


def reweight(batch: AnyBatch, aggregation: Aggregation, length: int | None = None) -> AnyBatch:
    """``batch`` with the weights of its own rows: what a minibatch cut from a rollout needs.

    Args:
      batch: rows [B, T], perhaps fewer than ``batch.weight_BT`` was made for.
      aggregation, length: as in ``masked.weights``; pairs, which have one weight each, keep their
        proportions.
    """
    if isinstance(batch, PreferenceBatch):
        total = batch.weight_B.sum()
        return replace(batch, weight_B=batch.weight_B / jnp.where(total > 0, total, 1))
    assert isinstance(batch, Batch)
    return replace(batch, weight_BT=masked.weights(batch.mask_BT, aggregation, length))
