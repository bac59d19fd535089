"""The optimum of E[r(x, y)] − β·KL(π‖π_ref) in closed form, and its approximations by sampling.

Where the answers to a prompt can be listed, ``optimal_policy`` is what every algorithm that
optimises this objective must arrive at.
"""

import math

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array


def optimal_policy(ref_logp_Y: Array, reward_Y: Array, beta: Array | float) -> tuple[Array, Array]:
    """π*(y) = π_ref(y)·exp(r(y)/β) / Z, Z = Σ_y π_ref(y)·exp(r(y)/β) (arXiv:2305.18290, eq. 4).

    The objective's value at π* is β·log Z. Differentiable in all three arguments.

    Args:
      ref_logp_Y: [..., Y], nats, log π_ref of every possible answer; sums to 1 over the last axis.
        −inf for an impossible one, whose reward is then not read.
      reward_Y: same shape, reward units.
      beta: > 0, reward units a nat.

    Returns:
      log π*, nats, float32 [..., Y], −inf where ``ref_logp_Y`` is; and log Z, nats, [...].
    """
    chex.assert_equal_shape([ref_logp_Y, reward_Y])
    possible_Y = ref_logp_Y != -jnp.inf
    # filled before the sum: π_ref = 0 there, but −inf + NaN is NaN, in the gradient too
    gain_Y = jnp.where(possible_Y, reward_Y, 0).astype(jnp.float32) / beta
    score_Y = ref_logp_Y.astype(jnp.float32) + gain_Y
    log_z = jax.nn.logsumexp(score_Y, axis=-1)
    return score_Y - log_z[..., None], log_z


def implicit_reward(logp: Array, ref_logp: Array, beta: Array | float) -> Array:
    """β·(log π − log π_ref): the reward that π is optimal for (DPO; arXiv:2305.18290, eq. 5).

    Known up to β·log Z(x), a constant of the prompt: compare answers to one prompt only.

    Args:
      logp: log π of whole answers, nats, any shape.
      ref_logp: log π_ref of the same answers, same shape; no gradient flows into it.
      beta: reward units a nat.

    Returns:
      float32 of the same shape, reward units.
    """
    chex.assert_equal_shape([logp, ref_logp])
    ref_logp = jax.lax.stop_gradient(ref_logp).astype(jnp.float32)
    return beta * (logp.astype(jnp.float32) - ref_logp)


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n, nats: KL of the best of n samples to the policy that drew them.

    Exact if no two answers have the same reward and none is likely (continuous rewards;
    arXiv:2009.01325), an upper bound otherwise (arXiv:2401.01879).

    Raises:
      ValueError: if ``n`` is less than 1.
    """
    _check_draws(n)
    return math.log(n) - (n - 1) / n


def best_of_n_logp(ref_logp_Y: Array, reward_Y: Array, n: int) -> Array:
    """log-probability that the best of n independent draws from π_ref is y, exactly.

    With F(r) = Pr(reward ≤ r), F₋(r) = Pr(reward < r) and G = F − F₋ at r = r(y):
    π(y) = π_ref(y)/G · (Fⁿ − F₋ⁿ) (arXiv:2401.01879). Among the best ones drawn the winner is
    picked uniformly, so answers of equal reward share its probability in proportion to π_ref.
    Compares all pairs of answers: memory grows with Y².

    Args:
      ref_logp_Y: [..., Y], nats, over all possible answers; normalised here. −inf for an impossible
        one, whose reward is then not read.
      reward_Y: same shape, reward units; only the order matters.
      n: draws, at least 1.

    Returns:
      float32 [..., Y], nats, without gradient.

    Raises:
      ValueError: if ``n`` is less than 1.
    """
    chex.assert_equal_shape([ref_logp_Y, reward_Y])
    _check_draws(n)
    possible_Y = ref_logp_Y != -jnp.inf
    ref_logp_Y = jax.nn.log_softmax(jax.lax.stop_gradient(ref_logp_Y).astype(jnp.float32))
    reward_Y = jax.lax.stop_gradient(reward_Y)
    other_YY = ref_logp_Y[..., None, :]
    no_better_YY = reward_Y[..., None, :] <= reward_Y[..., :, None]
    equal_YY = reward_Y[..., None, :] == reward_Y[..., :, None]
    log_f_Y = jax.nn.logsumexp(jnp.where(no_better_YY, other_YY, -jnp.inf), axis=-1)
    log_g_Y = jax.nn.logsumexp(jnp.where(equal_YY, other_YY, -jnp.inf), axis=-1)
    # Fⁿ − F₋ⁿ = Fⁿ·(1 − (1 − G/F)ⁿ), in logs: a rare best answer keeps its digits
    share_Y = jnp.minimum(jnp.exp(log_g_Y - log_f_Y), 1)
    log_wins_Y = n * log_f_Y + jax.nn.log1mexp(-n * jnp.log1p(-share_Y))
    return jnp.where(possible_Y, ref_logp_Y - log_g_Y + log_wins_Y, -jnp.inf)


def importance_resample(key: Array, reward_QN: Array, beta: Array | float, count: int) -> Array:
    """Draws among N samples of π_ref with probability ∝ exp(r/β), with replacement.

    Self-normalised importance resampling: the law of a draw tends to π* as N grows; at finite N it
    stays within log N nats of π_ref. A prompt's draws depend on its row, not on the others.

    Args:
      key: a key; it is folded with the row's number.
      reward_QN: [Q, N], reward units, of N independent samples of π_ref for each prompt. One that
        is not finite is unknown and never drawn, unless its whole row is.
      beta: > 0, reward units a nat.
      count: draws a prompt.

    Returns:
      int32 [Q, count], which of the N samples.
    """
    chex.assert_rank(reward_QN, 2)
    logit_QN = _log_weight(reward_QN, beta)

    # the key by the row's number: a prompt draws the same whatever is beside it
    def draw(row: Array, logit_N: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(key, row), logit_N, shape=(count,))

    return jax.vmap(draw)(jnp.arange(len(reward_QN)), logit_QN).astype(jnp.int32)


def resampling_kl(reward_QN: Array, beta: Array | float) -> Array:
    """log N − H(w), w = softmax(r/β): an estimate of KL(π*‖π_ref) from N samples of π_ref.

    The same as Σ w·r/β − ``log_z_estimate``. Between 0 and log N: too low when KL(π*‖π_ref) is not
    well below log N, the sign that N is too small for this β.

    Args:
      reward_QN, beta: as in ``importance_resample``. Unknown rewards do not count towards N.

    Returns:
      float32 [Q], nats; 0 for a prompt without a known reward.
    """
    chex.assert_rank(reward_QN, 2)
    logit_QN = _log_weight(reward_QN, beta)
    # an unknown reward has weight 0, but 0·−inf is NaN
    gain_QN = jnp.where(jnp.isfinite(reward_QN), logit_QN, 0)
    return (jax.nn.softmax(logit_QN) * gain_QN).sum(1) - log_z_estimate(reward_QN, beta)


def log_z_estimate(reward_QN: Array, beta: Array | float) -> Array:
    """log(mean over N of exp(r/β)), nats: estimates log Z from samples of π_ref.

    The mean is an unbiased estimate of Z; its log is too low on average.

    Args:
      reward_QN, beta: as in ``importance_resample``. Unknown rewards do not count towards N.

    Returns:
      float32 [Q], nats; 0 for a prompt without a known reward.
    """
    chex.assert_rank(reward_QN, 2)
    count_Q = jnp.isfinite(reward_QN).sum(1)
    total_Q = jax.nn.logsumexp(_log_weight(reward_QN, beta), axis=1)
    return jnp.where(count_Q > 0, total_Q - jnp.log(jnp.maximum(count_Q, 1)), 0)


def _log_weight(reward_QN: Array, beta: Array | float) -> Array:
    """r/β, −inf where the reward is unknown; 0 in a row without a known one."""
    known_QN = jnp.isfinite(reward_QN)
    gain_QN = jnp.where(known_QN, reward_QN, 0).astype(jnp.float32) / beta
    return jnp.where(known_QN | ~known_QN.any(1, keepdims=True), gain_QN, -jnp.inf)


def _check_draws(n: int) -> None:
    if n < 1:
        raise ValueError(f"n={n}: the best of at least 1 sample")
