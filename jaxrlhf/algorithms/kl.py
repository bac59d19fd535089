"""KL to the reference: estimators, the per-token reward, and the controllers of β."""

import math
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import check_shapes
from jaxrlhf.config.algorithms import OnPolicyConfig
from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array

KLKind = Literal["k1", "k2", "k3"]
"""Estimators of the KL; ``kl_estimate`` gives the formulas."""

LIMIT = 20.0
"""Nats up to which ``bounded_exp`` is exp itself."""


def bounded_exp(x: Array) -> Array:
    """eˣ up to x = 20 nats, beyond that its tangent there, e²⁰·(1 + x − 20).

    Value and gradient stay finite and keep their sign for every finite x: an extreme ratio neither
    overflows nor, as a clamped one would, stops pulling the policy back.
    """
    bounded = jnp.minimum(x, LIMIT)
    return jnp.exp(bounded) * (1 + (x - bounded))


def kl_kind(config: OnPolicyConfig) -> KLKind:
    """``kl_estimator``, or where it is left out k1 in the reward and k3 in the loss."""
    return config.kl_estimator or ("k1" if config.kl_in == "reward" else "k3")


def kl_estimate(logp: Array, ref_logp: Array, kind: KLKind = "k1") -> Array:
    """Estimates of KL(π‖π_ref) from tokens drawn from π (http://joschu.net/blog/kl-approx.html).

    With d = log π − log π_ref: k1 = d is unbiased, k2 = d²/2 is biased and has low variance,
    k3 = e⁻ᵈ − 1 + d is unbiased and never negative. Exact for d ≥ −20; below, k3 goes on along
    its tangent (``bounded_exp``), because e⁻ᵈ overflows float32 from d = −88 on.

    As a reward, only k1 makes the policy gradient that of the KL. For a token's own choice,
    E[∇log π·k3] = ∇KL(π‖π_ref) − ∇KL(π_ref‖π), and E[∇log π·k2] like it is 0 to first order near
    the reference: the penalty comes when π is far off. As a loss, only the gradient of k2 is that
    of the KL; the gradient of k1 is 0 on average.

    Args:
      logp: log π of each token, any shape, nats.
      ref_logp: log π_ref of the same tokens, same shape; no gradient flows into it.

    Returns:
      float32 of the same shape, nats. For KL(old‖new) pass the old log-probs first.

    Raises:
      ValueError: if ``kind`` is not one of the three names.
    """
    chex.assert_equal_shape([logp, ref_logp])
    d = logp.astype(jnp.float32) - jax.lax.stop_gradient(ref_logp).astype(jnp.float32)
    match kind:
        case "k1":
            return d
        case "k2":
            return d**2 / 2
        case "k3":
            # bounded_exp(−d) − 1 + d, but by expm1: at small d the 1 would swallow d²/2
            bounded = jnp.minimum(-d, LIMIT)
            return jnp.expm1(bounded) + jnp.exp(bounded) * (-d - bounded) + d
    raise ValueError(f"kind={kind!r}: choose k1, k2 or k3")


def kl_loss(
    logp_BT: Array,
    ref_logp_BT: Array,
    old_logp_BT: Array,
    mask_BT: Array,
    weight_BT: Array,
    kind: KLKind = "k3",
    exact: bool = False,
) -> Array:
    """Σ weight·kl, the KL to the reference as a term of the loss, float32 scalar.

    The gradient of an estimator is not an estimator of the gradient. With d = log π − log π_ref at
    a token, and tokens drawn from π: that of k1 is 0 on average (no penalty at all); that of k3 is
    that of KL(π_ref‖π), the other direction, as in GRPO's paper; that of k2 is the gradient of the
    KL of *this token's* choice, which leaves out what the choice does to the KL of later tokens.
    ``exact`` keeps the estimator's value and takes the gradient of the whole sequence's KL instead:
    ρ·(Σ_s d_s)·∇log π(token t), with ρ = π/π_old to hold after several updates on one rollout.

    Args:
      logp_BT, ref_logp_BT, old_logp_BT: [B, T], nats; only the first gets a gradient.
      mask_BT: [B, T], non-zero on the tokens that count; the other columns are never read.
      weight_BT: [B, T], as made by ``masked.weights``, β included.
      kind: the estimator, see ``kl_estimate``.

    Raises:
      ValueError: ``kind="k1"`` without ``exact``.
    """
    check_shapes(2, logp_BT, ref_logp_BT, old_logp_BT, mask_BT, weight_BT)
    if kind == "k1" and not exact:
        raise ValueError("kind='k1': its gradient is 0 on average: take k2, k3 or exact")
    weight_BT, logp_BT, ref_logp_BT, old_logp_BT = (
        masked.fill(x, mask_BT) for x in (weight_BT, logp_BT, ref_logp_BT, old_logp_BT)
    )
    value = (weight_BT * kl_estimate(logp_BT, ref_logp_BT, kind)).sum()
    if not exact:
        return value
    # credit every token with the whole sequence's log-ratio: its choice moves later tokens' KL too
    gap_B1 = jax.lax.stop_gradient(logp_BT - ref_logp_BT).sum(1, keepdims=True)
    ratio_BT = bounded_exp(logp_BT - jax.lax.stop_gradient(old_logp_BT))
    surrogate = (weight_BT * gap_B1 * ratio_BT).sum()
    # the estimator's value with the surrogate's gradient
    return jax.lax.stop_gradient(value) + surrogate - jax.lax.stop_gradient(surrogate)


def token_rewards(reward_B: Array, kl_BT: Array, mask_BT: Array, beta: Array | float) -> Array:
    """r_t = −β·kl_t, plus the score of the whole response on its last token (arXiv:1909.08593).

    Args:
      reward_B: [B], score of each response; integers are welcome. Unread in rows without a token.
      kl_BT: [B, T], nats, an estimate of the KL at each token.
      mask_BT: [B, T], non-zero on the response's tokens; the last of them gets the score.
      beta: reward units a nat.

    Returns:
      float32 [B, T], 0 where the mask is 0.
    """
    chex.assert_rank([reward_B, kl_BT, mask_BT], [1, 2, 2])
    mask_BT = mask_BT != 0
    # tokens from here to the end: 1 on the last one, wherever gaps and padding are
    left_BT = jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1]
    score_BT = jnp.broadcast_to(reward_B[:, None], mask_BT.shape)
    return masked.fill(score_BT, mask_BT & (left_BT == 1)) - beta * masked.fill(kl_BT, mask_BT)


def fixed_kl(beta: float, *_: float, **__: float) -> float:
    """β as it is: the controller that does not control."""
    return beta


def adaptive_kl(beta: float, kl: float, target: float, count: int, horizon: float) -> float:
    """β·(1 + clip(kl/target − 1, −.2, .2)·count/horizon) (arXiv:1909.08593, equation 4).

    Runs on the host, on Python numbers. A ``kl`` that is not finite, which comes with an update
    that is skipped, leaves β as it is.

    Args:
      beta: the coefficient so far, reward units a nat.
      kl: measured KL to the reference, nats a sequence.
      target: wanted KL, nats a sequence.
      count: sequences that ``kl`` was measured on.
      horizon: sequences over which the controller acts.

    Raises:
      InputError: if the horizon is so short that a single step could make β negative.
    """
    if count >= 5 * horizon:
        raise InputError(
            f"algorithm.kl_horizon={horizon:g}: must exceed {count / 5:g}, a fifth of the "
            f"{count} sequences of a rollout, or β changes sign; raise it"
        )
    if not math.isfinite(kl):
        return beta
    # clipped, so that one odd rollout moves β by no more than a fifth of count/horizon
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * count / horizon)


KL_CONTROLLERS: dict[str, Callable[[float, float, float, int, float], float]] = {
    "fixed": fixed_kl,
    "adaptive": adaptive_kl,
}
"""By ``OnPolicyConfig.kl_controller``: (beta, kl, target, count, horizon) → beta."""
