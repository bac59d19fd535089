"""Several scores a row → one reward, and which rows have one."""

from collections.abc import Sequence

import numpy as np

from jaxrlhf.errors import InputError


def combine(
    scores: Sequence[np.ndarray], weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """reward_b = Σ_i weight_i · score_ib, where every score of row b is there.

    Args:
      scores: arrays [B] of any numeric type, in reward units; NaN where a score is missing.
      weights: one for each of them.

    Returns:
      reward_B float32, NaN on rows without a reward; valid_B bool, False on those rows.

    Raises:
      InputError: no scores at all.
      ValueError: lengths that differ.
    """
    if not scores:
        raise InputError("rewards: none given; add one, such as [{function: sentiment}]")
    parts = [np.asarray(score_B, np.float64) for score_B in scores]
    if len(parts) != len(weights) or any(p.ndim != 1 or p.shape != parts[0].shape for p in parts):
        shapes = [p.shape for p in parts]
        raise ValueError(f"scores of shapes {shapes} with {len(weights)} weights do not combine")
    with np.errstate(over="ignore", invalid="ignore"):
        total_B = np.sum([w * p for w, p in zip(weights, parts, strict=True)], axis=0)
        reward_B = total_B.astype(np.float32)
    valid_B = np.isfinite(reward_B)
    return np.where(valid_B, reward_B, np.float32(np.nan)), valid_B
