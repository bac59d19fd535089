"""Process reward models: a score at the end of every step of an answer."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.reward_model import weighted
from jaxrlhf.config.algorithm import ProcessRewardModelConfig
from jaxrlhf.types import Array, PreferenceBatch


def process_reward_loss(score_BT: Array, label_BT: Array, step_mask_BT: Array) -> Array:
    """Mean over a row's steps of −y·log σ(s) − (1 − y)·log(1 − σ(s)) (arXiv:2305.20050).

    Args:
      score_BT: [B, T], log-odds that the step that ends in column t is right.
      label_BT: [B, T], y: 1 where it is, 0 where not, or a probability.
      step_mask_BT: [B, T], non-zero at the last token of each step; others are never read.

    Returns:
      float32 [B], nats; 0 in rows without a step.
    """
    chex.assert_rank([score_BT, label_BT, step_mask_BT], 2)
    chex.assert_equal_shape([score_BT, label_BT, step_mask_BT])
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
    chex.assert_rank([score_BT, step_mask_BT], 2)
    chex.assert_equal_shape([score_BT, step_mask_BT])
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
    return jnp.where((step_mask_BT != 0).any(1), total_B.astype(jnp.float32), jnp.nan)


def process_reward_model(config: ProcessRewardModelConfig) -> Algorithm:
    """``process_reward_loss`` over a batch, plus ``score_l2`` times the mean of s² over steps."""

    def loss(score_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        """Σ weight·loss over answers.

        Args:
          score_BCT: [B, 1, T], the head at every token.
          batch: its ``label_BCT``, ``step_mask_BCT`` and ``weight_B``; rows of weight 0 are never
            read.

        Returns:
          The loss, and sums under the weights: ``accuracy`` (fraction of a row's steps with p and
          label on one side of one half), ``reward`` (see ``aggregate_steps``), ``steps`` (a row),
          ``weight``.
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
        right_BT = (score_BT > 0) == (label_BT > 0.5)
        metrics_B = {
            "accuracy": masked.mean(right_BT, mask_BT, axis=1),
            "reward": masked.fill(aggregate_steps(score_BT, mask_BT, config.aggregate), weight_B),
            "steps": (mask_BT != 0).sum(1).astype(jnp.float32),
        }
        return weighted(loss_B, metrics_B, weight_B)

    return Algorithm(targets=None, loss=loss, reads="steps")
