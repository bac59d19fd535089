"""Reward models: a scalar for a whole response, learnt from preference pairs."""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.config.algorithm import RewardModelConfig
from jaxrlhf.types import Array, PreferenceBatch


def pairwise_reward_loss(chosen_B: Array, rejected_B: Array, margin_B: Array | float = 0) -> Array:
    """−log σ(r_chosen − r_rejected − margin) (Bradley-Terry; arXiv:2203.02155, arXiv:2307.09288).

    Args:
      chosen_B: [B], score of the answer that was preferred.
      rejected_B: [B], score of the other one.
      margin_B: [B] or scalar, wanted difference of the two, reward units.

    Returns:
      float32 [B], nats.
    """
    chex.assert_rank([chosen_B, rejected_B], 1)
    chex.assert_equal_shape([chosen_B, rejected_B])
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
        """Σ weight·loss over pairs.

        Args:
          score_BC: [B, 2], scores of chosen and rejected.
          batch: its ``margin_B`` and ``weight_B``; rows of weight 0 are never read.

        Returns:
          The loss, and sums under the weights: ``accuracy`` (a tie counts one half), ``margin``
          (chosen − rejected), ``chosen``, ``rejected`` (reward units), ``weight``.
        """
        chex.assert_shape(score_BC, (None, 2))
        weight_B, smoothing = batch.weight_B, config.label_smoothing
        chosen_B, rejected_B = (masked.fill(score_B, weight_B) for score_B in score_BC.T)
        margin_B = masked.fill(batch.margin_B, weight_B)
        loss_B = pairwise_reward_loss(chosen_B, rejected_B, margin_B)
        if smoothing:
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


def weighted(loss_B: Array, metrics_B: Metrics, weight_B: Array) -> tuple[Array, Metrics]:
    """Σ weight·loss, and the same of each metric; ``weight`` is Σ weight.

    Args:
      loss_B, metrics_B: float32 [B], finite in every row.
      weight_B: float32 [B].
    """
    metrics = {name: (weight_B * x_B).sum() for name, x_B in metrics_B.items()}
    return (weight_B * loss_B).sum(), {**metrics, "weight": weight_B.sum()}
