"""An algorithm is a record of pure functions: what to learn from, and the losses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxrlhf.config.algorithms import Aggregation
from jaxrlhf.core import masked
from jaxrlhf.core.types import AnyBatch, Array, Batch, PreferenceBatch

Metrics = dict[str, Array]
"""Scalars by name. A loss's are sums under the batch's weights, so microbatches add up, except
names that end in _max or _min. ``weight`` is Σ weight: 1 unless ``aggregation`` is sequence_sum or
fixed, and what to divide the others by to read them as means."""


Targets = Callable[..., tuple[Any, Metrics]]
"""(rollout, ref_logp_BT, reward_B, valid_B, coefficients, …) → (batch, metrics of the rollout)."""


class Algorithm(NamedTuple):
    """What sets one algorithm apart; see ``ppo`` for an example of every field."""

    targets: Targets | None
    """On policy: (rollout, ref_logp_BT, reward_B, valid_B, coefficients) → (batch, metrics of the
    whole rollout), with ``value_BT`` or ``baseline_B`` by name if it needs them. ``coefficients``
    holds traced scalars, such as ``kl_coef``. None for algorithms that learn from data."""
    loss: Callable[..., tuple[Array, Metrics]]
    """(what ``reads`` says, batch) → (scalar, metrics)."""
    value_loss: Callable[..., tuple[Array, Metrics]] | None = None
    """(outputs, batch) → (scalar, metrics), before any coefficient."""
    needs: frozenset[str] = frozenset()
    """Which of "value", "reference", "entropy" and "greedy" (what each prompt's greedy response is
    worth) have to be computed for it."""
    reads: Literal["outputs", "scores", "steps", "pairs"] = "outputs"
    """What its loss is given: Outputs of a batch's rows, the rewards [B, C] of its candidates, the
    head at every token of them [B, C, T], or their log-probs [B, C, T]."""


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
