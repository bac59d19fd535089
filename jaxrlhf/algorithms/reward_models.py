"""Reward models of every kind: of pairs, rankings, numbers and steps; and several as one.

Each kind is a loss on scores, and the record that learns by it from a batch: Σ weight·loss over
rows, with the metrics as sums under the same weights (``weighted``).
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics, check_shapes, weighted
from jaxrlhf.config.offline import (
    ListwiseRewardModelConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
)
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array, PreferenceBatch


def pairwise_reward_loss(chosen_B: Array, rejected_B: Array, margin_B: Array | float = 0) -> Array:
    """−log σ(r_chosen − r_rejected − margin) (Bradley-Terry; arXiv:2203.02155, arXiv:2307.09288).

    Args:
      chosen_B: [B], score of the answer that was preferred.
      rejected_B: [B], score of the other one.
      margin_B: [B] or scalar, wanted difference of the two, reward units.

    Returns:
      float32 [B], nats.
    """
    check_shapes(1, chosen_B, rejected_B)
    difference_B = chosen_B.astype(jnp.float32) - rejected_B.astype(jnp.float32)
    return -jax.nn.log_sigmoid(difference_B - margin_B)


def reward_model(config: RewardModelConfig) -> Algorithm:
    """Pairwise loss over a batch, with what keeps its scores in bounds.

    (1 − ε)·ℓ(chosen, rejected) + ε·ℓ(rejected, chosen) + ``centre_coef``·(r_chosen + r_rejected)² +
    ``score_l2``·(r_chosen² + r_rejected²)/2, with ε = ``label_smoothing``, the probability that a
    label is wrong. The third term pins the one freedom of the first two, a constant added to every
    score (arXiv:2312.09244); the last one also their scale.
    """

    def loss(score_BC: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        """Of scores [B, 2] and ``margin_B``; rows of weight 0 are never read.

        Metrics: ``accuracy`` (a tie counts one half), ``margin`` (chosen − rejected), ``chosen``,
        ``rejected`` (reward units).
        """
        chex.assert_shape(score_BC, (None, 2))
        weight_B, smoothing = batch.weight_B, config.label_smoothing
        chosen_B, rejected_B = (masked.fill(score_B, weight_B) for score_B in score_BC.T)
        margin_B = masked.fill(batch.margin_B, weight_B)
        loss_B = pairwise_reward_loss(chosen_B, rejected_B, margin_B)
        if smoothing:
            # the wrong label is the other pair with the same margin
            wrong_B = pairwise_reward_loss(rejected_B, chosen_B, margin_B)
            loss_B = (1 - smoothing) * loss_B + smoothing * wrong_B
        loss_B += config.centre_coef * (chosen_B + rejected_B) ** 2
        loss_B += config.score_l2 * (chosen_B**2 + rejected_B**2) / 2
        metrics_B = {
            "accuracy": (1 + jnp.sign(chosen_B - rejected_B)) / 2,
            "margin": chosen_B - rejected_B,
            "chosen": chosen_B,
            "rejected": rejected_B,
        }
        return weighted(loss_B, metrics_B, weight_B)

    return Algorithm(targets=None, loss=loss, reads="scores")


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
    check_shapes(2, score_BK, rank_BK, mask_BK)
    score_BK = masked.fill(score_BK, mask_BK)
    rank_BK = masked.fill(rank_BK, mask_BK)
    real_BK = mask_BK != 0
    rival_BKK = real_BK[:, None, :] & (rank_BK[:, None, :] >= rank_BK[:, :, None])
    # an absent one faces itself: a sum over none would be −inf, and its gradient NaN
    rival_BKK |= jnp.eye(score_BK.shape[1], dtype=bool)
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
    difference_BP, better_BP = _compared(score_BK, rank_BK, mask_BK)
    return masked.mean(-jax.nn.log_sigmoid(difference_BP), better_BP, axis=1)


def ranked_accuracy(score_BK: Array, rank_BK: Array, mask_BK: Array) -> Array:
    """Fraction of a row's pairs of unequal rank that the scores order alike, float32 [B].

    Equal scores count one half, and so does a row in which all ranks tie. Arguments as in
    ``listwise_reward_loss``.
    """
    difference_BP, better_BP = _compared(score_BK, rank_BK, mask_BK)
    return (1 + masked.mean(jnp.sign(difference_BP), better_BP, axis=1)) / 2


def _compared(score_BK: Array, rank_BK: Array, mask_BK: Array) -> tuple[Array, Array]:
    """s_i − s_j, and where i is ranked better than j and both are real: all pairs, [B, K²]."""
    check_shapes(2, score_BK, rank_BK, mask_BK)
    score_BK, real_BK = masked.fill(score_BK, mask_BK), mask_BK != 0
    difference_BKK = score_BK[:, :, None] - score_BK[:, None, :]
    better_BKK = rank_BK[:, :, None] < rank_BK[:, None, :]
    better_BKK &= real_BK[:, :, None] & real_BK[:, None, :]
    rows = len(score_BK)
    return difference_BKK.reshape(rows, -1), better_BKK.reshape(rows, -1)


def listwise_reward_model(config: ListwiseRewardModelConfig) -> Algorithm:
    """``listwise_reward_loss``, or ``ranked_pairs_loss``, plus ``score_l2`` · mean of s²."""
    compare = ranked_pairs_loss if config.as_pairs else listwise_reward_loss

    def loss(score_BC: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        """Of scores [B, C], ``rank_BC`` and ``candidate_mask_BC``; absent candidates and rows of
        weight 0 are never read.

        Metrics: ``accuracy`` (see ``ranked_accuracy``), ``best`` and ``mean`` (the highest score
        and the candidates' mean, reward units).
        """
        assert batch.rank_BC is not None
        assert batch.candidate_mask_BC is not None
        weight_B = batch.weight_B
        mask_BC = batch.candidate_mask_BC * (weight_B != 0)[:, None]
        score_BC, rank_BC = masked.fill(score_BC, mask_BC), masked.fill(batch.rank_BC, mask_BC)
        loss_B = compare(score_BC, rank_BC, mask_BC)
        loss_B += config.score_l2 * masked.mean(score_BC**2, mask_BC, axis=1)
        metrics_B = {
            "accuracy": ranked_accuracy(score_BC, rank_BC, mask_BC),
            "best": masked.fill(score_BC, mask_BC, -jnp.inf).max(1),
            "mean": masked.mean(score_BC, mask_BC, axis=1),
        }
        return weighted(loss_B, metrics_B, weight_B)

    return Algorithm(targets=None, loss=loss, reads="scores")


def pointwise_reward_loss(
    score_B: Array,
    target_B: Array,
    kind: Literal["mse", "huber", "binary"] = "mse",
    delta: float = 1.0,
) -> Array:
    """The loss of a score against a number, with e = r − y.

    - ``mse``: e².
    - ``huber``: e² where |e| ≤ δ, δ·(2|e| − δ) beyond (Huber 1964, times 2).
    - ``binary``: −y·log σ(r) − (1 − y)·log(1 − σ(r)), nats; y is a label or a probability.

    Args:
      score_B: [B], r: reward units, or log-odds with ``binary``.
      target_B: [B], y, in the same units, or in [0, 1] with ``binary``.
      delta: δ, > 0.

    Returns:
      float32 [B].

    Raises:
      ValueError: if ``kind`` is not one of the three names.
    """
    check_shapes(1, score_B, target_B)
    score_B, target_B = score_B.astype(jnp.float32), target_B.astype(jnp.float32)
    match kind:
        case "mse":
            return (score_B - target_B) ** 2
        case "huber":
            # twice Huber's, so that within δ it is the ``mse`` above
            return 2 * optax.losses.huber_loss(score_B, target_B, delta=delta)
        case "binary":
            return optax.losses.sigmoid_binary_cross_entropy(score_B, target_B)
    raise ValueError(f"kind={kind!r}: choose mse, huber or binary")


def pointwise_reward_model(config: PointwiseRewardModelConfig) -> Algorithm:
    """``pointwise_reward_loss`` over a batch, plus ``score_l2``·r²."""

    def loss(score_BC: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        """Of scores [B, 1] and ``label_B``; rows of weight 0 are never read.

        Metrics: ``error`` (|r − y|, with ``binary`` |σ(r) − y|), ``score``, ``target``.
        """
        chex.assert_shape(score_BC, (None, 1))
        assert batch.label_B is not None
        weight_B = batch.weight_B
        score_B = masked.fill(score_BC[:, 0], weight_B)
        target_B = masked.fill(batch.label_B, weight_B)
        loss_B = pointwise_reward_loss(score_B, target_B, config.kind, config.delta)
        loss_B += config.score_l2 * score_B**2
        guess_B = jax.nn.sigmoid(score_B) if config.kind == "binary" else score_B
        metrics_B = {"error": jnp.abs(guess_B - target_B), "score": score_B, "target": target_B}
        return weighted(loss_B, metrics_B, weight_B)

    return Algorithm(targets=None, loss=loss, reads="scores")


def process_reward_loss(score_BT: Array, label_BT: Array, step_mask_BT: Array) -> Array:
    """Mean over a row's steps of −y·log σ(s) − (1 − y)·log(1 − σ(s)) (arXiv:2305.20050).

    Args:
      score_BT: [B, T], log-odds that the step that ends in column t is right.
      label_BT: [B, T], y: 1 where it is, 0 where not, or a probability.
      step_mask_BT: [B, T], non-zero at the last token of each step; others are never read.

    Returns:
      float32 [B], nats; 0 in rows without a step.
    """
    check_shapes(2, score_BT, label_BT, step_mask_BT)
    score_BT, label_BT = masked.fill(score_BT, step_mask_BT), masked.fill(label_BT, step_mask_BT)
    loss_BT = optax.losses.sigmoid_binary_cross_entropy(score_BT, label_BT)
    return masked.mean(loss_BT, step_mask_BT, axis=1)


def aggregate_steps(
    score_BT: Array, step_mask_BT: Array, how: Literal["min", "product", "last"] = "min"
) -> Array:
    """One reward of an answer from p = σ(s) of its steps.

    ``min``: the least p, a chain being as good as its weakest link (arXiv:2312.08935); ``product``:
    Π p, the probability that all steps are right if they are independent (arXiv:2305.20050);
    ``last``: p of the last one.

    Args:
      score_BT: [B, T], log-odds.
      step_mask_BT: [B, T], non-zero at the last token of each step; others are never read.

    Returns:
      float32 [B] in [0, 1]; NaN in rows without a step, which have no reward.

    Raises:
      ValueError: if ``how`` is not one of the three names.
    """
    check_shapes(2, score_BT, step_mask_BT)
    match how:
        case "min":
            total_B = jax.nn.sigmoid(masked.fill(score_BT, step_mask_BT, jnp.inf)).min(1)
        case "product":
            logp_BT = jax.nn.log_sigmoid(masked.fill(score_BT, step_mask_BT))
            total_B = jnp.exp(masked.sum(logp_BT, step_mask_BT, axis=1))
        case "last":
            last_B = score_BT.shape[1] - 1 - jnp.argmax(step_mask_BT[:, ::-1] != 0, axis=1)
            total_B = jax.nn.sigmoid(jnp.take_along_axis(score_BT, last_B[:, None], 1)[:, 0])
        case _:
            raise ValueError(f"how={how!r}: choose min, product or last")
    # NaN, not 0: an answer without a step was not judged
    return jnp.where((step_mask_BT != 0).any(1), total_B.astype(jnp.float32), jnp.nan)


def process_reward_model(config: ProcessRewardModelConfig) -> Algorithm:
    """``process_reward_loss`` over a batch, plus ``score_l2`` times the mean of s² over steps."""

    def loss(score_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        """Of the head at every token [B, 1, T], ``label_BCT`` and ``step_mask_BCT``; rows of
        weight 0 are never read.

        Metrics: ``accuracy`` (fraction of a row's steps with p and label on one side of one half),
        ``reward`` (see ``aggregate_steps``), ``steps`` (a row).
        """
        chex.assert_shape(score_BCT, (None, 1, None))
        assert batch.label_BCT is not None
        assert batch.step_mask_BCT is not None
        weight_B = batch.weight_B
        mask_BT = batch.step_mask_BCT[:, 0] * (weight_B != 0)[:, None]
        score_BT, label_BT = score_BCT[:, 0], batch.label_BCT[:, 0]
        loss_B = process_reward_loss(score_BT, label_BT, mask_BT)
        square_BT = masked.fill(score_BT, mask_BT) ** 2
        loss_B += config.score_l2 * masked.mean(square_BT, mask_BT, axis=1)
        # p > ½ is s > 0
        right_BT = (score_BT > 0) == (label_BT > 0.5)
        metrics_B = {
            "accuracy": masked.mean(right_BT, mask_BT, axis=1),
            "reward": aggregate_steps(score_BT, mask_BT, config.aggregate),
            "steps": (mask_BT != 0).sum(1).astype(jnp.float32),
        }
        return weighted(loss_B, metrics_B, weight_B)

    return Algorithm(targets=None, loss=loss, reads="steps")


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
