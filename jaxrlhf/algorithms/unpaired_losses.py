"""KTO and BCO: a policy learnt from single answers, each marked as desirable or not."""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Metrics
from jaxrlhf.algorithms.optimal_policy import implicit_reward
from jaxrlhf.types import Array


def kto_loss(
    logp_B: Array,
    ref_logp_B: Array,
    desirable_B: Array,
    kl_logp_B: Array,
    kl_ref_logp_B: Array,
    beta: Array | float,
    desirable_weight: Array | float = 1.0,
    undesirable_weight: Array | float = 1.0,
    valid_B: Array | None = None,
) -> tuple[Array, Metrics]:
    """λ·(1 − σ(±β·(d − z₀))), + for desirable answers, − for the others (KTO; arXiv:2402.01306).

    d = log π − log π_ref. The reference point z₀ = max(0, mean over the batch of the same of
    mismatched pairs, each prompt with another prompt's answer), an estimate of the KL to the
    reference in nats; no gradient flows through it. Because of z₀, losses of microbatches with
    their own mismatched pairs do not add up to that of the batch.

    Args:
      logp_B: [B], nats, log π of each answer: sum over its tokens.
      ref_logp_B: [B], nats, log π_ref of the same; no gradient flows into it.
      desirable_B: [B], non-zero where the answer is desirable.
      kl_logp_B, kl_ref_logp_B: [B], nats, of row b's prompt with the answer of another row.
      beta: > 0, reward units a nat.
      desirable_weight, undesirable_weight: λ of each class.
      valid_B: [B], non-zero on rows that count, their mismatched pair included; the others are
        never read. None: all.

    Returns:
      float32 [B] and metrics [B], all 0 in rows that do not count: those of ``unpaired_metrics``
      and ``kl``, z₀ in nats.
    """
    inputs = [logp_B, ref_logp_B, desirable_B, kl_logp_B, kl_ref_logp_B]
    chex.assert_rank(inputs, 1)
    chex.assert_equal_shape(inputs)
    valid_B = _valid(valid_B, logp_B)
    logp_B, ref_logp_B, kl_logp_B, kl_ref_logp_B = (
        masked.fill(x, valid_B) for x in (logp_B, ref_logp_B, kl_logp_B, kl_ref_logp_B)
    )
    mean = masked.mean(jax.lax.stop_gradient(kl_logp_B - kl_ref_logp_B), valid_B)
    z0 = jnp.maximum(mean, 0)
    reward_B = implicit_reward(logp_B, ref_logp_B, beta)
    gap_B = reward_B - beta * z0
    loss_B = jnp.where(
        desirable_B != 0,
        desirable_weight * jax.nn.sigmoid(-gap_B),
        undesirable_weight * jax.nn.sigmoid(gap_B),
    )
    metrics = unpaired_metrics(reward_B, desirable_B, valid_B)
    return masked.fill(loss_B, valid_B), metrics | {"kl": z0 * valid_B}


def bco_loss(
    logp_B: Array,
    ref_logp_B: Array,
    desirable_B: Array,
    beta: Array | float,
    shift: Array | float,
    valid_B: Array | None = None,
) -> tuple[Array, Metrics]:
    """−log σ(±(β·(log π − log π_ref) − δ)), + for desirable answers (BCO; arXiv:2404.04656).

    The policy is a classifier of desirable against undesirable answers. The paper's importance
    weights for prompts that differ between the two classes are weights of rows, the caller's.

    Args:
      logp_B, ref_logp_B, desirable_B, beta, valid_B: as in ``kto_loss``.
      shift: δ, reward units, scalar; the mean of ``bco_shift`` so far. No gradient flows into it.

    Returns:
      float32 [B], nats, and the metrics of ``unpaired_metrics``; 0 in rows that do not count.
    """
    chex.assert_rank([logp_B, ref_logp_B, desirable_B], 1)
    chex.assert_equal_shape([logp_B, ref_logp_B, desirable_B])
    valid_B = _valid(valid_B, logp_B)
    reward_B = implicit_reward(masked.fill(logp_B, valid_B), masked.fill(ref_logp_B, valid_B), beta)
    gap_B = reward_B - jax.lax.stop_gradient(shift)
    loss_B = -jax.nn.log_sigmoid(jnp.where(desirable_B != 0, gap_B, -gap_B))
    return masked.fill(loss_B, valid_B), unpaired_metrics(reward_B, desirable_B, valid_B)


def bco_shift(
    logp_B: Array,
    ref_logp_B: Array,
    desirable_B: Array,
    beta: Array | float,
    valid_B: Array | None = None,
) -> Array:
    """½·(mean reward of desirable answers + mean reward of the others), reward units.

    δ of ``bco_loss`` on one batch (arXiv:2404.04656); keep a running mean of it. If a class has no
    row, the mean of the other is δ.

    Args:
      logp_B, ref_logp_B, desirable_B, beta, valid_B: as in ``kto_loss``.

    Returns:
      float32 scalar, without gradient.
    """
    chex.assert_rank([logp_B, ref_logp_B, desirable_B], 1)
    chex.assert_equal_shape([logp_B, ref_logp_B, desirable_B])
    valid_B = _valid(valid_B, logp_B)
    reward_B = jax.lax.stop_gradient(implicit_reward(logp_B, ref_logp_B, beta))
    classes = [valid_B & (desirable_B != 0), valid_B & (desirable_B == 0)]
    present = sum(class_B.any() for class_B in classes)
    return sum(masked.mean(reward_B, class_B) for class_B in classes) / jnp.maximum(present, 1)


def unpaired_metrics(reward_B: Array, desirable_B: Array, valid_B: Array) -> Metrics:
    """What to watch of single answers, float32 [B] each, 0 in rows that do not count.

    Args:
      reward_B: [B], implicit rewards.
      desirable_B, valid_B: [B], non-zero where desirable, and where the row counts.

    Returns:
      ``reward``; ``desirable_reward`` and ``undesirable_reward``, the same with 0 in rows of the
      other class; ``desirable``, 1 in rows of that class: the mean reward of desirable answers is
      mean ``desirable_reward`` / mean ``desirable``.
    """
    desirable_B = desirable_B != 0
    return {
        "reward": masked.fill(reward_B, valid_B),
        "desirable_reward": masked.fill(reward_B, valid_B & desirable_B),
        "undesirable_reward": masked.fill(reward_B, valid_B & ~desirable_B),
        "desirable": (valid_B & desirable_B).astype(jnp.float32),
    }


def _valid(valid_B: Array | None, like_B: Array) -> Array:
    """The rows that count, bool."""
    if valid_B is None:
        return jnp.ones(like_B.shape, bool)
    chex.assert_equal_shape([valid_B, like_B])
    return valid_B != 0
