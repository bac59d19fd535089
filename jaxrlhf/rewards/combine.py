"""Several scores a row → one reward, and which rows have one."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxrlhf.config import GateConfig
from jaxrlhf.errors import InputError


def combine(
    scores: Sequence[np.ndarray],
    weights: Sequence[float],
    gates: Sequence[GateConfig | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """reward_b = Σ_i weight_i · score_ib over the sources that are no gates, where all gates open.

    Gates are asked in their order. The first whose score is missing leaves the row without a
    reward; the first whose score is below ``at_least`` gives it ``otherwise``, whatever the other
    sources say. A row that passes all of them needs every score of the sum.

    Args:
      scores: arrays [B] of any numeric type, in reward units; NaN where a score is missing.
      weights: one for each of them; those of gates are not read.
      gates: what makes each of them a gate, None where it is part of the sum.

    Returns:
      reward_B float32, NaN on rows without a reward; valid_B bool, False on those rows.

    Raises:
      InputError: no scores at all.
      ValueError: lengths that differ.
    """
    if not scores:
        raise InputError("rewards: none given; add one, such as [{function: sentiment}]")
    parts = [np.asarray(score_B, np.float64) for score_B in scores]
    gates = gates or [None] * len(parts)
    lengths = {len(parts), len(weights), len(gates)}
    if len(lengths) > 1 or any(p.ndim != 1 or p.shape != parts[0].shape for p in parts):
        shapes = [p.shape for p in parts]
        raise ValueError(f"scores of shapes {shapes} with {len(weights)} weights do not combine")
    with np.errstate(over="ignore", invalid="ignore"):
        reward_B = fold(parts, weights, gates, np).astype(np.float32)
    valid_B = np.isfinite(reward_B)
    return np.where(valid_B, reward_B, np.float32(np.nan)), valid_B


def fold(
    scores: Sequence[Any],
    weights: Sequence[float],
    gates: Sequence[GateConfig | None],
    xp: ModuleType,
) -> Any:
    """The gated sum of ``combine``, of numpy's or jax's arrays; ``xp`` is the one or the other."""
    sources = list(zip(scores, weights, gates, strict=True))
    reward_B = xp.stack([w * score_B for score_B, w, gate in sources if gate is None]).sum(0)
    for score_B, _, gate in reversed(sources):
        if gate is not None:
            reward_B = xp.where(score_B >= gate.at_least, reward_B, gate.otherwise)
            reward_B = xp.where(xp.isfinite(score_B), reward_B, xp.nan)
    return reward_B
