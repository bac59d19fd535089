"""The optimum in closed form and best of n, by hand and enumeration; estimates tend to it."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.optimal_policy import (
    best_of_n_kl,
    best_of_n_logp,
    implicit_reward,
    importance_resample,
    log_z_estimate,
    optimal_policy,
    resampling_kl,
)


def random_problem(seed, *shape):
    keys = jax.random.split(jax.random.key(seed))
    return jax.nn.log_softmax(jax.random.normal(keys[0], shape)), jax.random.normal(keys[1], shape)


def kl(logp, other):
    return float(np.sum(np.exp(logp) * (np.asarray(logp) - np.asarray(other))))


def test_optimal_policy_hand_computed():
    """Two equally likely answers, rewards 1 and 0, β = 1: σ(1), and Z = (e + 1)/2."""
    logp, log_z = optimal_policy(jnp.log(jnp.array([0.5, 0.5])), jnp.array([1, 0]), 1.0)
    np.testing.assert_allclose(jnp.exp(logp), [0.7310586, 0.2689414], rtol=1e-6)
    np.testing.assert_allclose(log_z, 0.6201145, rtol=1e-6)
    assert logp.dtype == log_z.dtype == jnp.float32


def test_optimal_policy_brute_force():
    """Any leading axes."""
    ref, reward = random_problem(0, 2, 3, 5)
    logp, log_z = optimal_policy(ref, reward, 0.3)
    plain = np.exp(np.float64(ref) + np.float64(reward) / 0.3)
    np.testing.assert_allclose(log_z, np.log(plain.sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(logp), plain / plain.sum(-1, keepdims=True), rtol=1e-5)


def test_optimal_policy_maximises_the_objective():
    """E[r] − β·KL(π‖π_ref) = β·log Z − β·KL(π‖π*) for every π."""
    ref, reward = random_problem(1, 6)
    beta = 0.7
    best, log_z = optimal_policy(ref, reward, beta)
    for seed in range(5):
        logp, _ = random_problem(seed + 10, 6)
        objective = float((jnp.exp(logp) * reward).sum()) - beta * kl(logp, ref)
        wanted = beta * float(log_z) - beta * kl(logp, best)
        assert objective == pytest.approx(wanted, abs=1e-5)
        assert objective < beta * log_z


def test_optimal_policy_limits():
    """β → ∞: the reference; β → 0: the best answer, without overflow."""
    ref, reward = random_problem(2, 4)
    np.testing.assert_allclose(optimal_policy(ref, reward, 1e6)[0], ref, atol=1e-5)
    logp, log_z = optimal_policy(ref, reward, 1e-4)
    np.testing.assert_allclose(jnp.exp(logp), jnp.arange(4) == jnp.argmax(reward), atol=1e-6)
    np.testing.assert_allclose(1e-4 * log_z, reward.max(), rtol=1e-2)


def test_optimal_policy_impossible_answers():
    ref = jnp.log(jnp.array([0.5, 0, 0.5]))
    logp, log_z = optimal_policy(ref, jnp.array([1, jnp.nan, 0]), 1.0)
    np.testing.assert_allclose(jnp.exp(logp), [0.7310586, 0, 0.2689414], rtol=1e-6)
    np.testing.assert_allclose(log_z, 0.6201145, rtol=1e-6)


def test_optimal_policy_gradient_of_log_z():
    """∂ log Z/∂r = π*/β; 0 for an impossible answer whose reward is NaN."""
    ref, reward = random_problem(3, 5)
    ref, reward = ref.at[2].set(-jnp.inf), reward.at[2].set(jnp.nan)
    gradient = jax.grad(lambda r: optimal_policy(ref, r, 0.3)[1])(reward)
    wanted = jnp.exp(optimal_policy(ref, reward, 0.3)[0]) / 0.3
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)
    assert gradient[2] == 0


def test_implicit_reward_recovers_the_reward():
    """Up to β·log Z, a constant of the prompt."""
    ref, reward = random_problem(4, 2, 5)
    logp, log_z = optimal_policy(ref, reward, 0.3)
    np.testing.assert_allclose(
        implicit_reward(logp, ref, 0.3), reward - 0.3 * log_z[:, None], atol=1e-5
    )


def test_implicit_reward_no_gradient_into_reference():
    slopes = jax.grad(lambda *x: implicit_reward(*x, 0.3).sum(), (0, 1))(jnp.ones(2), jnp.ones(2))
    np.testing.assert_allclose(slopes[0], [0.3, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(slopes[1], [0, 0])


def test_best_of_n_kl_hand_computed():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.1931472)
    assert best_of_n_kl(4) == pytest.approx(0.6362944)


def best_of_n_by_enumeration(ref, reward, n):
    """Every way to draw n answers, each best one drawn sharing alike."""
    wins = np.zeros(len(ref))
    for drawn in itertools.product(range(len(ref)), repeat=n):
        probability = np.prod(np.exp(np.float64(ref))[list(drawn)])
        best = [y for y in drawn if reward[y] == max(reward[y] for y in drawn)]
        for y in best:
            wins[y] += probability / len(best)
    return wins


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_logp_enumerated(n):
    """Distinct rewards, some that tie, and all that do."""
    ref, distinct = random_problem(5, 5)
    for reward in (distinct, jnp.array([1.0, 0, 1, 2, 0]), jnp.zeros(5)):
        logp = best_of_n_logp(ref, reward, n)
        wanted = best_of_n_by_enumeration(np.asarray(ref), np.asarray(reward), n)
        np.testing.assert_allclose(jnp.exp(logp), wanted, rtol=2e-5)
        assert logp.dtype == jnp.float32
    np.testing.assert_allclose(best_of_n_logp(ref, jnp.zeros(5), n), ref, rtol=1e-5)


def test_best_of_n_logp_leading_axes_and_impossible_answers():
    ref, reward = random_problem(6, 2, 4)
    logp = best_of_n_logp(ref, reward, 3)
    for row in range(2):
        np.testing.assert_allclose(logp[row], best_of_n_logp(ref[row], reward[row], 3), rtol=1e-5)
    gap = best_of_n_logp(np.insert(ref[0], 1, -jnp.inf), np.insert(reward[0], 1, jnp.nan), 3)
    assert gap[1] == -jnp.inf
    np.testing.assert_allclose(np.delete(gap, 1), logp[0], rtol=1e-5)


def test_best_of_n_logp_rare_answers_keep_their_digits():
    """A best answer of probability 1e-12 wins with n·1e-12; the worst of two with (1 − p)ⁿ."""
    ref = jnp.log(jnp.array([1e-12, 1.0]))
    logp = best_of_n_logp(ref, jnp.array([1.0, 0]), 100)
    np.testing.assert_allclose(logp, [math.log(1e-10), 0], rtol=1e-5, atol=1e-6)
    logp = best_of_n_logp(jnp.log(jnp.array([0.5, 0.5])), jnp.array([1.0, 0]), 100)
    np.testing.assert_allclose(logp, [0, -100 * math.log(2)], rtol=1e-5, atol=1e-6)


def test_best_of_n_kl_is_an_upper_bound():
    """Nearly met by many answers of distinct reward, missed by ties."""
    many = jnp.full(400, -math.log(400))
    for n in (2, 8):
        for seed in range(5):
            ref, reward = random_problem(seed + 20, 6)
            assert kl(best_of_n_logp(ref, reward, n), ref) <= best_of_n_kl(n) + 1e-5
        distinct = kl(best_of_n_logp(many, jnp.arange(400.0), n), many)
        assert distinct == pytest.approx(best_of_n_kl(n), rel=1e-2)
        ties = kl(best_of_n_logp(many, jnp.arange(400) // 200, n), many)
        assert ties < 0.9 * best_of_n_kl(n)


def test_best_of_n_needs_a_sample():
    with pytest.raises(ValueError, match="n=0"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match="n=0"):
        best_of_n_logp(jnp.zeros(1), jnp.zeros(1), 0)


def test_importance_resample_frequencies():
    """∝ exp(r/β) among the N samples; unknown ones are never drawn."""
    reward = jnp.array([[1, 0, jnp.nan, 0.5], [2.0, 2, 2, jnp.inf]])
    index = importance_resample(jax.random.key(0), reward, 0.5, 20000)
    assert index.shape == (2, 20000)
    assert index.dtype == jnp.int32
    share = np.stack([np.bincount(row, minlength=4) / 20000 for row in np.asarray(index)])
    weight = np.exp([2, 0, 1])
    wanted = [[*(weight / weight.sum())[:2], 0, weight[2] / weight.sum()], [1 / 3] * 3 + [0]]
    np.testing.assert_allclose(share, wanted, atol=0.015)
    np.testing.assert_array_equal(share[[0, 1], [2, 3]], 0)


def test_importance_resample_rows_are_independent():
    """The same draws with fewer prompts beside them; different ones for equal rows."""
    key, reward = jax.random.key(1), jnp.zeros((3, 8))
    index = importance_resample(key, reward, 1.0, 50)
    np.testing.assert_array_equal(importance_resample(key, reward[:1], 1.0, 50), index[:1])
    assert (index[0] != index[1]).any()


def test_importance_resample_tends_to_the_optimal_policy():
    """KL of what is drawn to π* falls with N, from KL(π_ref‖π*) at N = 1."""
    ref, reward = jnp.log(jnp.array([0.6, 0.3, 0.1])), jnp.array([0.0, 1, 2])
    best, _ = optimal_policy(ref, reward, 0.7)
    keys = jax.random.split(jax.random.key(2))
    distances = []
    for count in (1, 4, 64):
        answer_QN = jax.random.categorical(keys[0], ref, shape=(8000, count))
        index_Q1 = importance_resample(keys[1], reward[answer_QN], 0.7, 1)
        drawn = np.take_along_axis(np.asarray(answer_QN), np.asarray(index_Q1), 1)
        distances.append(kl(np.log(np.bincount(drawn[:, 0], minlength=3) / 8000), best))
    assert distances[0] == pytest.approx(kl(ref, best), rel=0.1)
    assert distances[0] > 3 * distances[1] > 9 * distances[2]
    assert distances[2] < 0.01


def test_log_z_estimate_hand_computed():
    """(e + 1)/2, twice with one more that is unknown; nothing known: 0."""
    reward = jnp.array([[1, 0, jnp.nan], [0, -jnp.inf, 1], [jnp.nan] * 3])
    np.testing.assert_allclose(log_z_estimate(reward, 1.0), [0.6201145, 0.6201145, 0], rtol=1e-6)
    np.testing.assert_allclose(
        log_z_estimate(jnp.array([[1e4, 0]]), 0.1), [1e5 - np.log(2)], rtol=1e-6
    )


def test_resampling_kl_hand_computed():
    """w = σ(1), σ(−1): w₁·1 − log Z = .1109441; equal rewards, or none known: 0."""
    reward = jnp.array([[1, 0, jnp.nan], [3.0, 3, 3], [jnp.nan] * 3])
    np.testing.assert_allclose(resampling_kl(reward, 1.0), [0.1109441, 0, 0], atol=1e-6)


def test_resampling_kl_is_the_entropy_missing():
    """log N − H(w), so at most log N, which one answer alone reaches."""
    _, reward = random_problem(7, 3, 8)
    weight = np.float64(jax.nn.softmax(reward / 0.5))
    wanted = np.log(8) + (weight * np.log(weight)).sum(1)
    np.testing.assert_allclose(resampling_kl(reward, 0.5), wanted, rtol=1e-4)
    np.testing.assert_allclose(resampling_kl(reward, 1e-3), np.log(8), rtol=1e-3)


def test_estimates_tend_to_the_truth():
    """log Z and KL(π*‖π_ref) from 20000 samples of π_ref."""
    ref, reward = random_problem(8, 6)
    best, log_z = optimal_policy(ref, reward, 0.5)
    answer_1N = jax.random.categorical(jax.random.key(9), ref, shape=(1, 20000))
    np.testing.assert_allclose(log_z_estimate(reward[answer_1N], 0.5), [log_z], atol=0.05)
    np.testing.assert_allclose(resampling_kl(reward[answer_1N], 0.5), [kl(best, ref)], atol=0.05)
