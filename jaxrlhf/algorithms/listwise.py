"""Reward models learnt from a ranking of several responses to a prompt."""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.reward_model import weighted
from jaxrlhf.config.algorithm import ListwiseRewardModelConfig
from jaxrlhf.types import Array, PreferenceBatch


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


def ranked_pairs_loss(score_BK: Array, rank_BK: Array, mask_BK: Array) -> Array:
    """Mean of −log σ(s_better − s_worse) over a row's pairs of unequal rank (arXiv:2203.02155).

    All pairs of a prompt count 1 together, so that a prompt with many responses does not outweigh
    the others. Pairs that tie are left out.

    Args:
      score_BK, rank_BK, mask_BK: as in ``listwise_reward_loss``.

    Returns:
      float32 [B], nats; 0 in rows in which all tie.
    """
    difference_BKK, better_BKK = _compared(score_BK, rank_BK, mask_BK)
    return _pair_mean(-jax.nn.log_sigmoid(difference_BKK), better_BKK)


def ranked_accuracy(score_BK: Array, rank_BK: Array, mask_BK: Array) -> Array:
    """Fraction of a row's pairs of unequal rank that the scores order alike, float32 [B].

    Equal scores count one half, and so does a row in which all ranks tie. Arguments as in
    ``listwise_reward_loss``.
    """
    difference_BKK, better_BKK = _compared(score_BK, rank_BK, mask_BK)
    return (1 + _pair_mean(jnp.sign(difference_BKK), better_BKK)) / 2


def _pair_mean(x_BKK: Array, mask_BKK: Array) -> Array:
    """Mean over a row's pairs, [B]."""
    rows = x_BKK.shape[0]
    return masked.mean(x_BKK.reshape(rows, -1), mask_BKK.reshape(rows, -1), axis=1)


def _compared(score_BK: Array, rank_BK: Array, mask_BK: Array) -> tuple[Array, Array]:
    """s_i − s_j, and where i is ranked better than j, both [B, K, K] and real."""
    chex.assert_rank([score_BK, rank_BK, mask_BK], 2)
    chex.assert_equal_shape([score_BK, rank_BK, mask_BK])
    score_BK = masked.fill(score_BK, mask_BK)
    real_BK = mask_BK != 0
    better_BKK = rank_BK[:, :, None] < rank_BK[:, None, :]
    better_BKK &= real_BK[:, :, None] & real_BK[:, None, :]
    return score_BK[:, :, None] - score_BK[:, None, :], better_BKK


def listwise_reward_model(config: ListwiseRewardModelConfig) -> Algorithm:
    """``listwise_reward_loss``, or ``ranked_pairs_loss``, plus ``score_l2`` · mean of s²."""
    compare = ranked_pairs_loss if config.as_pairs else listwise_reward_loss

    def loss(score_BC: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        """Σ weight·loss over prompts.

        Args:
          score_BC: [B, C], the candidates' scores.
          batch: its ``rank_BC``, ``candidate_mask_BC`` and ``weight_B``; rows of weight 0 and
            absent candidates are never read.

        Returns:
          The loss, and sums under the weights: ``accuracy`` (see ``ranked_accuracy``), ``best``
          and ``mean`` (the highest score and the candidates' mean, reward units), ``weight``.
        """
        assert batch.rank_BC is not None
        assert batch.candidate_mask_BC is not None
        weight_B = batch.weight_B
        mask_BC = batch.candidate_mask_BC * (weight_B != 0)[:, None]
        score_BC, rank_BC = masked.fill(score_BC, mask_BC), masked.fill(batch.rank_BC, mask_BC)
        loss_B = compare(score_BC, rank_BC, mask_BC)
        loss_B += config.score_l2 * masked.mean(score_BC**2, mask_BC, axis=1)
        highest_B = masked.fill(score_BC, mask_BC, -jnp.inf).max(1)
        metrics_B = {
            "accuracy": ranked_accuracy(score_BC, rank_BC, mask_BC),
            "best": masked.fill(highest_B, weight_B),
            "mean": masked.mean(score_BC, mask_BC, axis=1),
        }
        return weighted(loss_B, metrics_B, weight_B)

    return Algorithm(targets=None, loss=loss, reads="scores")
