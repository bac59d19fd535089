"""Proximal policy optimisation from human feedback, with a learned critic."""

import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.gae import explained_variance, gae
from jaxrlhf.algorithms.kl import bounded_exp, kl_estimate, token_rewards
from jaxrlhf.algorithms.policy_losses import entropy_bonus, ppo_policy_loss
from jaxrlhf.algorithms.value_loss import value_loss as clipped_value_loss
from jaxrlhf.config.algorithm import PPOConfig
from jaxrlhf.errors import InputError
from jaxrlhf.types import Array, Batch, Outputs, Rollout


def ppo(config: PPOConfig) -> Algorithm:
    """PPO on the KL-regularised objective E[r(x, y)] − β·KL(π‖π_ref) (arXiv:2203.02155).

    ``targets`` turns scores into advantages (see ``_targets``); ``loss`` is the clipped policy loss
    minus ``entropy_coef``·entropy; ``value_loss`` is the critic's, before ``value_coef``.
    """

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
        value_BT: Array | None = None,
    ) -> tuple[Batch, Metrics]:
        value_BT = rollout.value_BT if value_BT is None else value_BT
        if value_BT is None:
            raise InputError("value_BT=None: ppo needs a critic; pass its values or roll them out")
        return jax.lax.stop_gradient(
            _targets(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients, value_BT)
        )

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        policy_loss, metrics = ppo_policy_loss(
            outputs.logp_BT,
            batch.old_logp_BT,
            batch.advantage_BT,
            batch.mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            weight_BT=batch.weight_BT,
        )
        metrics["policy_loss"] = policy_loss
        if not config.entropy_coef:
            return policy_loss, metrics
        assert outputs.entropy_BT is not None  # "entropy" is in needs
        metrics["entropy"] = entropy_bonus(outputs.entropy_BT, batch.mask_BT, batch.weight_BT)
        return policy_loss - config.entropy_coef * metrics["entropy"], metrics

    def value_loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        assert outputs.value_BT is not None  # "value" is in needs
        assert batch.old_value_BT is not None
        assert batch.return_BT is not None
        loss, metrics = clipped_value_loss(
            outputs.value_BT,
            batch.old_value_BT,
            batch.return_BT,
            batch.mask_BT,
            clip=config.value_clip,
            weight_BT=batch.weight_BT,
        )
        return loss, metrics | {"value_loss": loss}

    needs = {"value", "reference"} | ({"entropy"} if config.entropy_coef else set())
    return Algorithm(targets, loss, value_loss, frozenset(needs))


def _targets(
    config: PPOConfig,
    rollout: Rollout,
    ref_logp_BT: Array,
    reward_B: Array,
    valid_B: Array,
    coefficients: dict[str, Array],
    value_BT: Array,
) -> tuple[Batch, Metrics]:
    """Scores to advantages: KL and score into token rewards, GAE, whitening, weights.

    Rows whose reward is unknown (``valid_B`` False, or a reward that is not finite) keep their
    place with an empty mask: weight, advantage and return 0, no part in any mean.

    With ``bootstrap_truncated``, a response that was cut off bootstraps from the critic's value of
    the state that its *last token was chosen in*: the state after it has no column, so this is one
    token early.

    Args:
      rollout: its ``logp_BT`` is the old log-prob of the ratio and of the KL.
      ref_logp_BT: [B, T], nats, at the same temperature.
      reward_B: [B], any dtype.
      valid_B: [B] bool.
      coefficients: ``kl_coef``, β, reward units a nat.
      value_BT: [B, T], V(tokens < t).
    """
    reward_B = reward_B.astype(jnp.float32)
    valid_B = (valid_B != 0) & jnp.isfinite(reward_B)
    mask_BT = ((rollout.mask_BT != 0) & valid_B[:, None]).astype(jnp.float32)
    logp_BT, ref_logp_BT, value_BT = (
        masked.fill(x_BT, mask_BT) for x_BT in (rollout.logp_BT, ref_logp_BT, value_BT)
    )
    beta = coefficients["kl_coef"]
    kl_BT = kl_estimate(logp_BT, ref_logp_BT, config.kl_estimator)
    penalty_B = jnp.where(rollout.ended_B, 0, config.missing_eos_penalty)
    reward_BT = token_rewards(reward_B - penalty_B, kl_BT, mask_BT, beta)
    metrics = _sequence_metrics(rollout, reward_B, reward_BT, kl_BT, valid_B, mask_BT, beta)
    metrics["kl"] = masked.mean((logp_BT - ref_logp_BT).sum(1), valid_B)

    if config.whiten_rewards:
        reward_BT = masked.whiten(reward_BT, mask_BT, shift_mean=False)
    bootstrap_B = jnp.zeros_like(reward_B)
    if config.bootstrap_truncated:
        bootstrap_B = jnp.where(rollout.ended_B, 0, _last(value_BT, mask_BT))
    raw_BT, return_BT = gae(reward_BT, value_BT, mask_BT, config.gamma, config.lam, bootstrap_B)
    metrics |= {
        "advantage_mean": masked.mean(raw_BT, mask_BT),
        "return_mean": masked.mean(return_BT, mask_BT),
        "explained_variance": explained_variance(value_BT, return_BT, mask_BT),
    }
    return Batch(
        token_BT=rollout.token_BT,
        attention_mask_BT=rollout.attention_mask_BT,
        mask_BT=mask_BT,
        old_logp_BT=logp_BT,
        advantage_BT=masked.whiten(raw_BT, mask_BT) if config.whiten_advantages else raw_BT,
        weight_BT=masked.weights(mask_BT, config.aggregation, config.length),
        return_BT=return_BT,
        old_value_BT=value_BT,
    ), metrics


def _sequence_metrics(
    rollout: Rollout,
    reward_B: Array,
    reward_BT: Array,
    kl_BT: Array,
    valid_B: Array,
    mask_BT: Array,
    beta: Array,
) -> Metrics:
    """Means over valid rows: ``score`` as it came and its std, ``kl_reward``, ``reward`` (score,
    penalty and KL together), ``length`` (tokens), ``ended`` (fraction); over their tokens:
    ``entropy_estimate`` (nats) and ``sample_ratio``, exp(logp − sample_logp), 1 when the update's
    log-probs are the sampler's and nothing was truncated; and the fraction ``valid`` of all rows.
    """
    logp_BT = masked.fill(rollout.logp_BT, mask_BT)
    gap_BT = logp_BT - masked.fill(rollout.sample_logp_BT, mask_BT)
    return {
        "score": masked.mean(reward_B, valid_B),
        "score_std": jnp.sqrt(masked.variance(reward_B, valid_B)),
        "reward": masked.mean(reward_BT.sum(1), valid_B),
        "kl_reward": masked.mean(-beta * kl_BT.sum(1), valid_B),
        "length": masked.mean(mask_BT.sum(1), valid_B),
        "ended": masked.mean(rollout.ended_B, valid_B),
        "entropy_estimate": -masked.mean(logp_BT, mask_BT),
        "sample_ratio": masked.mean(bounded_exp(gap_BT), mask_BT),
        "valid": valid_B.mean(dtype=jnp.float32),
    }


def _last(x_BT: Array, mask_BT: Array) -> Array:
    """x_B, the entry of each row's last masked-in column; the last column's in a row without."""
    last_B = x_BT.shape[1] - 1 - jnp.argmax(mask_BT[:, ::-1] != 0, axis=1)
    return jnp.take_along_axis(x_BT, last_B[:, None], axis=1)[:, 0]
