"""What all algorithms that sample have in common.

Their ``targets`` is ``price``, then a credit of their own, then ``learnable`` (``targets_of``);
their ``loss`` is a policy loss of their own, then ``penalised`` (``gradient_loss``,
``ratio_loss``).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Loss, Metrics, Targets, check_shapes
from jaxrlhf.algorithms.kl import bounded_exp, kl_estimate, kl_kind, kl_loss, token_rewards
from jaxrlhf.algorithms.policy_losses import entropy_bonus, policy_gradient_loss
from jaxrlhf.config.algorithms import OnPolicyConfig
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array, Batch, Outputs, Rollout


class Priced(NamedTuple):
    """A rollout and what its tokens earned."""

    rollout: Rollout
    mask_BT: Array
    """float32, 1 on the tokens of rows whose reward is known."""
    logp_BT: Array
    ref_logp_BT: Array
    reward_BT: Array
    """Each token's reward: the score on the last one, and −β·KL where it is in the reward."""
    valid_B: Array
    """bool, True where the reward is known."""
    kl_coef: Array
    metrics: Metrics

    def returns(self) -> Array:
        """[B], Σ over a response's tokens, reward units."""
        return self.reward_BT.sum(1)


class Credit(NamedTuple):
    """What an algorithm makes of a priced rollout."""

    advantage_BT: Array
    return_BT: Array | None = None
    value_BT: Array | None = None
    """What a critic learns, and what it said."""
    metrics: Metrics | None = None


def targets_of(config: OnPolicyConfig, credit: Callable[..., Credit]) -> Targets:
    """The targets of an algorithm: ``price``, its ``credit``, ``learnable``; without gradient.

    Args:
      credit: Priced → Credit, with ``value_BT`` or ``baseline_B`` if the algorithm needs them.
    """

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
        *given: Array,
        **named: Array,
    ) -> tuple[Batch, Metrics]:
        priced = price(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients)
        found = credit(priced, *given, **named)
        metrics = priced.metrics | (found.metrics or {})
        return jax.lax.stop_gradient((learnable(config, priced, found), metrics))

    return targets


def price(
    config: OnPolicyConfig,
    rollout: Rollout,
    ref_logp_BT: Array,
    reward_B: Array,
    valid_B: Array,
    coefficients: dict[str, Array],
) -> Priced:
    """Put a price on every token: the score, penalties on it, and the KL where it is a reward.

    Rows whose reward is unknown (``valid_B`` False, or a reward that is not finite) keep their
    place with an empty mask: weight, advantage and return 0, no part in any mean.

    Args:
      rollout: its ``logp_BT`` is the old log-prob of the ratio and of the KL.
      ref_logp_BT: [B, T], nats, at the same temperature.
      reward_B: [B], any dtype.
      valid_B: [B] bool.
      coefficients: ``kl_coef``, β, reward units a nat.
    """
    reward_B = reward_B.astype(jnp.float32)
    valid_B = (valid_B != 0) & jnp.isfinite(reward_B)
    mask_BT = ((rollout.mask_BT != 0) & valid_B[:, None]).astype(jnp.float32)
    logp_BT, ref_logp_BT = (masked.fill(x_BT, mask_BT) for x_BT in (rollout.logp_BT, ref_logp_BT))
    beta = jnp.asarray(coefficients["kl_coef"], jnp.float32)
    kl_BT = kl_estimate(logp_BT, ref_logp_BT, kl_kind(config))
    # a KL that is in the loss is measured here all the same, and charged nothing
    charged = beta if config.kl_in == "reward" else jnp.zeros_like(beta)
    net_B = reward_B - score_penalty(config, rollout)
    reward_BT = token_rewards(net_B, kl_BT, mask_BT, charged)
    priced = Priced(rollout, mask_BT, logp_BT, ref_logp_BT, reward_BT, valid_B, beta, {})
    return priced._replace(metrics=_metrics(priced, reward_B, kl_BT, charged))


def _metrics(priced: Priced, reward_B: Array, kl_BT: Array, beta: Array) -> Metrics:
    """Means over valid rows: ``score`` as it came and its std, ``kl`` (nats a sequence),
    ``kl_reward``, ``reward`` (score, penalties and KL together); those of ``drawn``; and the
    fraction ``valid`` of all rows.
    """
    rollout, mask_BT, logp_BT, ref_logp_BT = priced[:4]
    valid_B = priced.valid_B
    return {
        "score": masked.mean(reward_B, valid_B),
        "score_std": jnp.sqrt(masked.variance(reward_B, valid_B)),
        "reward": masked.mean(priced.returns(), valid_B),
        # k1 whatever the estimator that is charged: runs stay comparable
        "kl": masked.mean((logp_BT - ref_logp_BT).sum(1), valid_B),
        "kl_reward": masked.mean(-beta * kl_BT.sum(1), valid_B),
        **drawn(rollout, mask_BT, logp_BT, valid_B),
        "valid": valid_B.mean(dtype=jnp.float32),
    }


def drawn(rollout: Rollout, mask_BT: Array, logp_BT: Array, valid_B: Array) -> Metrics:
    """What was sampled. Means over valid rows: ``length`` (tokens), ``ended`` (fraction); over
    their tokens: ``entropy_estimate`` (nats) and ``sample_ratio``, exp(logp − sample_logp), 1 when
    the update's log-probs are the sampler's and nothing was truncated, and ``sample_gap``,
    |logp − sample_logp| (nats), in which differences of either sign add up.
    """
    gap_BT = logp_BT - masked.fill(rollout.sample_logp_BT, mask_BT)
    return {
        "length": masked.mean(mask_BT.sum(1), valid_B),
        "ended": masked.mean(rollout.ended_B, valid_B),
        "entropy_estimate": -masked.mean(logp_BT, mask_BT),
        "sample_ratio": masked.mean(bounded_exp(gap_BT), mask_BT),
        "sample_gap": masked.mean(jnp.abs(gap_BT), mask_BT),
    }


def score_penalty(config: OnPolicyConfig, rollout: Rollout) -> Array:
    """``missing_eos_penalty`` and ``overlong_penalty`` of each response, float32 [B], reward units.

    Samples pay it, and so does whatever else they are compared with.
    """
    penalty_B = jnp.where(rollout.ended_B, 0, jnp.float32(config.missing_eos_penalty))
    if config.overlong_buffer:
        penalty_B += overlong_penalty(rollout.mask_BT, config.overlong_buffer)
    return penalty_B


def overlong_penalty(mask_BT: Array, buffer: int) -> Array:
    """Soft penalty on length, in tokens: 0 up to N − buffer, then linear up to 1 at N.

    max(0, length − (N − buffer)) / buffer (DAPO; arXiv:2503.14476, equation 13), where N is the
    most tokens that a response can have.

    Args:
      mask_BT: [B, T], 1 on the response's tokens; the first column of any response is that of all.
      buffer: tokens, at least 1.

    Returns:
      float32 [B], from 0 to 1, reward units.
    """
    mask_BT = mask_BT != 0
    # prompts are left-padded, so N is what is right of the first column of any response
    most = mask_BT.shape[1] - jnp.argmax(mask_BT.any(0))
    return jnp.clip((mask_BT.sum(1) - (most - buffer)) / buffer, 0, 1)


def learnable(config: OnPolicyConfig, priced: Priced, credit: Credit) -> Batch:
    """The Batch of a rollout, given the credit of its tokens."""
    rollout, mask_BT, advantage_BT = priced.rollout, priced.mask_BT, credit.advantage_BT
    if config.mask_truncated:
        # only here, after the credit: in their groups' means these rewards still count
        mask_BT = mask_BT * rollout.ended_B[:, None]
    if config.off_policy != "none":
        level, _, mode = config.off_policy.partition("_")
        # into the advantage: every policy loss here is linear in a non-negative factor of it,
        # clipped ones included
        advantage_BT *= importance_weights(
            priced.logp_BT,
            masked.fill(rollout.sample_logp_BT, priced.mask_BT),
            mask_BT,
            level=level,  # type: ignore[arg-type]
            mode="mask" if mode else "truncate",
            cap=config.off_policy_cap,
        )
    in_loss = config.kl_in != "reward"
    return Batch(
        token_BT=rollout.token_BT,
        attention_mask_BT=rollout.attention_mask_BT,
        mask_BT=mask_BT,
        old_logp_BT=priced.logp_BT,
        advantage_BT=masked.fill(advantage_BT, mask_BT),
        weight_BT=masked.weights(mask_BT, config.aggregation, config.length),
        return_BT=credit.return_BT,
        old_value_BT=credit.value_BT,
        ref_logp_BT=priced.ref_logp_BT if in_loss else None,
        # one a row, because a batch is cut by rows
        kl_coef_B=jnp.broadcast_to(priced.kl_coef, mask_BT.shape[:1]) if in_loss else None,
        expert_BTM=rollout.expert_BTM,
    )


def importance_weights(
    logp_BT: Array,
    behaviour_logp_BT: Array,
    mask_BT: Array,
    level: Literal["token", "sequence"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    cap: float = 2.0,
) -> Array:
    """w = π/μ, bounded: π the policy that the loss is written for, μ the one that sampled.

    Levels: ``token`` takes each token's own ratio: low variance, biased, because what the policies
    think of the other tokens is left out. ``sequence`` gives all tokens of a row exp of the *sum*
    of its log-ratios, the row's exact ratio: unbiased before it is bounded, and soon at its bounds
    in long rows. The geometric mean (``ratio="sequence"`` of ``ppo_policy_loss``) is that ratio's
    root, to the number of tokens: it stays near 1 and is no importance weight.

    Modes: ``truncate`` is min(w, cap) (V-trace's ρ, Espeholt et al. 2018, arXiv:1802.01561; TIS,
    Yao et al. 2025, fengyao.notion.site/off-policy-rl). ``mask`` is w where 1/cap ≤ w ≤ cap, else
    0: a token on which the two disagree teaches nothing (IcePop, arXiv:2510.18855), though a mean
    over tokens still counts it.

    Args:
      logp_BT: [B, T], nats, log π of each token.
      behaviour_logp_BT: [B, T], nats, log μ of the same tokens; ``Rollout.sample_logp_BT``.
      mask_BT: [B, T], non-zero on the tokens that learn; the other columns are never read.
      level, mode: see above.
      cap: the largest weight, a Python number; > 0, and ≥ 1 with ``mask``.

    Returns:
      float32 [B, T], without gradient; 0 where the mask is 0. A factor of a policy loss's
      advantage or ``weight_BT``.

    Raises:
      ValueError: if ``level`` or ``mode`` is not one of its names, or ``cap`` is out of range.
    """
    check_shapes(2, logp_BT, behaviour_logp_BT, mask_BT)
    if level not in ("token", "sequence"):
        raise ValueError(f"level={level!r}: choose token or sequence")
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode={mode!r}: choose truncate or mask")
    # not cap > 0: refuses NaN too
    if not cap > 0 or (mode == "mask" and cap < 1):
        raise ValueError(f"cap={cap}: must be > 0, and at least 1 with mode='mask'")
    gap_BT = masked.fill(logp_BT, mask_BT) - masked.fill(behaviour_logp_BT, mask_BT)
    if level == "sequence":
        gap_BT = jnp.broadcast_to(gap_BT.sum(1, keepdims=True), gap_BT.shape)
    weight_BT = bounded_exp(jax.lax.stop_gradient(gap_BT))
    if mode == "truncate":
        weight_BT = jnp.minimum(weight_BT, cap)
    else:
        weight_BT = jnp.where((weight_BT >= 1 / cap) & (weight_BT <= cap), weight_BT, 0)
    return masked.fill(weight_BT, mask_BT)


def ratio_loss(config: OnPolicyConfig, policy_loss: Loss) -> Loss:
    """A policy loss in π/π_old of a batch (``ppo_policy_loss``, with its clips), ``penalised``."""

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        arrays = (outputs.logp_BT, batch.old_logp_BT, batch.advantage_BT, batch.mask_BT)
        total, metrics = policy_loss(*arrays, weight_BT=batch.weight_BT)
        return penalised(config, total, metrics, outputs, batch)

    return loss


def gradient_loss(config: OnPolicyConfig) -> Loss:
    """``policy_gradient_loss`` of a batch, ``penalised``: it has no use for old log-probs."""

    def policy_loss(logp_BT: Array, _: Array, *rest: Any, **weights: Array):
        return policy_gradient_loss(logp_BT, *rest, **weights)

    return ratio_loss(config, policy_loss)


def penalised(
    config: OnPolicyConfig, loss: Array, metrics: Metrics, outputs: Outputs, batch: Batch
) -> tuple[Array, Metrics]:
    """The policy loss plus β·KL where it is in the loss, minus the entropy bonus."""
    metrics = {**metrics, "policy_loss": loss}
    if batch.ref_logp_BT is not None and batch.kl_coef_B is not None:
        metrics["kl_loss"] = kl_loss(
            outputs.logp_BT,
            batch.ref_logp_BT,
            batch.old_logp_BT,
            batch.mask_BT,
            batch.weight_BT * batch.kl_coef_B[:, None],
            kind=kl_kind(config),
            exact=config.kl_in == "exact_loss",
        )
        loss += metrics["kl_loss"]
    if config.entropy_coef:
        assert outputs.entropy_BT is not None  # "entropy" is in needs
        metrics["entropy"] = entropy_bonus(outputs.entropy_BT, batch.mask_BT, batch.weight_BT)
        loss -= config.entropy_coef * metrics["entropy"]
    return loss, metrics


def needs(config: OnPolicyConfig, *more: str) -> frozenset[str]:
    """What has to be computed for an algorithm with these settings."""
    return frozenset({"reference", *more, *(["entropy"] if config.entropy_coef else [])})


def spread(x_B: Array, mask_BT: Array) -> Array:
    """A number a response → the same on each of its tokens, float32 [B, T]."""
    return masked.fill(jnp.broadcast_to(x_B[:, None], mask_BT.shape), mask_BT)


def groups(x_B: Array, rollout: Rollout) -> Array:
    """[B] → [Q, G].

    Raises:
      ValueError: G < 2: nothing to compare a response with.
    """
    if rollout.n < 2:
        raise ValueError(f"sample.n={rollout.n}: a group needs at least 2 samples of a prompt")
    return x_B.reshape(-1, rollout.n)
