"""Several reward models' scores as one: an answer to reward hacking."""

from typing import Literal

import chex
import jax.numpy as jnp

from jaxrlhf.types import Array


def ensemble_score(
    score_MB: Array, combine: Literal["mean", "min", "lcb"] = "mean", k: float = 1.0
) -> Array:
    """Mean over members, the least of them, or mean − k · standard deviation (arXiv:2310.02743).

    Where members disagree a policy has left the data that they were trained on; ``min`` (worst-case
    optimisation) and ``lcb``, a lower confidence bound, do not pay for that. ``lcb`` is the paper's
    uncertainty-weighted optimisation with the standard deviation (ddof 0) for the variance, so that
    k has no unit.

    Args:
      score_MB: [M, B], reward units, M members; their scales should be alike (``normalise_on``).
      k: ≥ 0.

    Returns:
      float32 [B]; NaN where a member's score is.

    Raises:
      ValueError: if ``combine`` is not one of the three names.
    """
    chex.assert_rank(score_MB, 2)
    score_MB = score_MB.astype(jnp.float32)
    match combine:
        case "mean":
            return score_MB.mean(0)
        case "min":
            return score_MB.min(0)
        case "lcb":
            return score_MB.mean(0) - k * score_MB.std(0)
    raise ValueError(f"combine={combine!r}: choose mean, min or lcb")
