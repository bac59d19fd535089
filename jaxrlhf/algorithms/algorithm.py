"""An algorithm is a record of pure functions: what to learn from, and the losses."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from jaxrlhf import masked
from jaxrlhf.config.algorithm import Aggregation
from jaxrlhf.types import Array, Batch

Metrics = dict[str, Array]
"""Scalars by name. A loss's are sums under the batch's weights, so microbatches add up, except
names that end in _max or _min. ``weight`` is Σ weight: 1 unless ``aggregation`` is sequence_sum or
fixed, and what to divide the others by to read them as means."""


class Algorithm(NamedTuple):
    """What sets one algorithm apart; see ``ppo`` for an example of every field."""

    targets: Callable[..., tuple[Batch, Metrics]] | None
    """On policy: (rollout, ref_logp_BT, reward_B, valid_B, coefficients, value_BT=None)
    → (batch, metrics of the whole rollout). ``coefficients`` holds traced scalars, such as
    ``kl_coef``. None for algorithms that learn from data."""
    loss: Callable[..., tuple[Array, Metrics]]
    """On policy and SFT: (outputs, batch) → (scalar, metrics). Reward model: (score_BC, batch)."""
    value_loss: Callable[..., tuple[Array, Metrics]] | None = None
    """(outputs, batch) → (scalar, metrics), before any coefficient."""
    needs: frozenset[str] = frozenset()
    """Which of "value", "reference" and "entropy" have to be computed for it."""


def reweight(batch: Batch, aggregation: Aggregation, length: int | None = None) -> Batch:
    """``batch`` with the weights of its own rows: what a minibatch cut from a rollout needs.

    Args:
      batch: rows [B, T], perhaps fewer than ``batch.weight_BT`` was made for.
      aggregation, length: as in ``masked.weights``.
    """
    return replace(batch, weight_BT=masked.weights(batch.mask_BT, aggregation, length))
