"""Reward models learnt from answers that have a number each: regression and classification."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.reward_model import weighted
from jaxrlhf.config.algorithm import PointwiseRewardModelConfig
from jaxrlhf.types import Array, PreferenceBatch


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
    chex.assert_rank([score_B, target_B], 1)
    chex.assert_equal_shape([score_B, target_B])
    score_B, target_B = score_B.astype(jnp.float32), target_B.astype(jnp.float32)
    match kind:
        case "mse":
            return (score_B - target_B) ** 2
        case "huber":
            return 2 * optax.losses.huber_loss(score_B, target_B, delta=delta)
        case "binary":
            return optax.losses.sigmoid_binary_cross_entropy(score_B, target_B)
    raise ValueError(f"kind={kind!r}: choose mse, huber or binary")


def pointwise_reward_model(config: PointwiseRewardModelConfig) -> Algorithm:
    """``pointwise_reward_loss`` over a batch, plus ``score_l2``·r²."""

    def loss(score_BC: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        """Σ weight·loss over answers.

        Args:
          score_BC: [B, 1], the answers' scores.
          batch: its ``label_B`` and ``weight_B``; rows of weight 0 are never read.

        Returns:
          The loss, and sums under the weights: ``error`` (|r − y|, with ``binary`` |σ(r) − y|),
          ``score``, ``target``, ``weight``.
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
