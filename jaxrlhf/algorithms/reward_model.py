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
    """Pairwise loss over a batch, plus ``centre_coef``·(r_chosen + r_rejected)² (arXiv:2312.09244).

    The second term pins the one freedom of the first, a constant added to every score.
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
        weight_B = batch.weight_B
        chosen_B, rejected_B = (masked.fill(score_B, weight_B) for score_B in score_BC.T)
        loss_B = pairwise_reward_loss(chosen_B, rejected_B, masked.fill(batch.margin_B, weight_B))
        loss_B += config.centre_coef * (chosen_B + rejected_B) ** 2
        metrics_B = {
            "accuracy": (1 + jnp.sign(chosen_B - rejected_B)) / 2,
            "margin": chosen_B - rejected_B,
            "chosen": chosen_B,
            "rejected": rejected_B,
            "weight": jnp.ones_like(weight_B),
        }
        return (weight_B * loss_B).sum(), {k: (weight_B * x).sum() for k, x in metrics_B.items()}

    return Algorithm(targets=None, loss=loss, reads="scores")
