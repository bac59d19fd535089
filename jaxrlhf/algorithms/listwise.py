"""Reward models learnt from a ranking of several responses to a prompt."""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.types import Array


def listwise_reward_loss(score_BK: Array, rank_BK: Array, mask_BK: Array) -> Array:
    """−Σ_i log(exp s_i / Σ_j exp s_j), j over those ranked no better than i (Plackett-Luce).

    The negative log-likelihood of the ranking, as in arXiv:2305.18290 (appendix A.3): the best is
    chosen from all, the next from the rest, and so on. With two responses it is −log σ(s_best −
    s_other). Grows with the number of responses, unlike a mean.

    Ties follow Breslow's rule: each of the responses that share a rank is compared with the whole
    group and all below it, so that a group's scores are drawn together. Two that tie count as a win
    each way: −log σ(d) − log σ(−d) for their difference d.

    Args:
      score_BK: [B, K], reward units, K candidate responses to each prompt.
      rank_BK: [B, K], 1 is best; only the order matters.
      mask_BK: [B, K], non-zero on real candidates; the others are absent and never read.

    Returns:
      float32 [B], nats; 0 in rows with fewer than two candidates.
    """
    chex.assert_rank([score_BK, rank_BK, mask_BK], 2)
    chex.assert_equal_shape([score_BK, rank_BK, mask_BK])
    score_BK = masked.fill(score_BK, mask_BK)
    rank_BK = masked.fill(rank_BK, mask_BK)
    real_BK = mask_BK != 0
    rival_BKK = real_BK[:, None, :] & (rank_BK[:, None, :] >= rank_BK[:, :, None])
    rival_BKK |= jnp.eye(score_BK.shape[1], dtype=bool)  # an absent one faces itself: no empty sum
    faced_BKK = jnp.where(rival_BKK, score_BK[:, None, :], -jnp.inf)
    return masked.sum(jax.nn.logsumexp(faced_BKK, axis=2) - score_BK, mask_BK, axis=1)
