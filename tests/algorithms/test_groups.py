"""Advantages within groups, by hand, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.algorithms import (
    batch_advantage,
    each_advantage,
    group_advantage,
    rloo_advantage,
)

BOTH = pytest.mark.parametrize("advantage", [group_advantage, rloo_advantage])


def test_group_advantage_hand_computed():
    advantage = group_advantage(jnp.array([[1, 0, 1, 1]]))
    np.testing.assert_allclose(advantage, [[0.499999, -1.499997, 0.499999, 0.499999]], rtol=1e-6)
    assert advantage.dtype == jnp.float32


def test_group_advantage_unscaled():
    advantage = group_advantage(jnp.array([[1.0, 0, 1, 1]]), scale="none")
    np.testing.assert_allclose(advantage, [[0.25, -0.75, 0.25, 0.25]], rtol=1e-6)


def test_group_advantage_unknown_scale():
    with pytest.raises(ValueError, match="scale='var'"):
        group_advantage(jnp.ones((1, 2)), scale="var")


def test_group_advantage_groups_are_consecutive_rows():
    """Prompts A, A, B, B: rows are prompt-major."""
    reward_B = jnp.array([1.0, 0, 1, 1])
    advantage = group_advantage(reward_B.reshape(2, 2)).reshape(-1)
    np.testing.assert_allclose(advantage, [0.7071, -0.7071, 0, 0], atol=1e-4)


def test_group_advantage_unknown_reward():
    wanted = [[0.5773, 0, -1.1545, 0.5773]]
    reward = jnp.array([[1, jnp.nan, 0, 1]])
    mask = jnp.array([[1, 0, 1, 1]])
    for advantage in (
        group_advantage(reward),
        group_advantage(reward, mask),
        group_advantage(jnp.array([[1.0, 99, 0, 1]]), mask),
    ):
        np.testing.assert_allclose(advantage, wanted, atol=2e-4)


def test_each_advantage_hand_computed():
    """Two groups of three; the second source does not apply to the first of the second group."""
    score_SQG = jnp.array([[[1, 0, 0], [0, 0, 0]], [[0, 10, 20], [jnp.nan, 1, 3]]], jnp.float32)
    third = 1 / 3**0.5
    first = np.array([[2 * third, -third, -third], [0, 0, 0]])
    half = 0.5**0.5
    second = np.array([[-1, 0, 1], [0, -half, half]])
    for weights in ([1, 1], [2, -0.5], [0, 3]):
        got = each_advantage(score_SQG, jnp.array(weights))
        wanted = weights[0] * first + weights[1] * second
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_each_advantage_tells_apart_what_sums_do_not():
    """Rewards (1, 0, 0) and (0, 1, 1): every sum is 1, and GRPO sees no difference."""
    score_SQG = jnp.array([[[1, 0, 0]], [[0, 1, 1]], [[0, 0, 1]]], jnp.float32)
    assert (group_advantage(score_SQG[:2].sum(0)) == 0).all()
    weights = jnp.array([1, 1, 0.5])
    assert abs(each_advantage(score_SQG, weights)).min() > 0.2
    # Scales of a source do not matter, its weight does.
    scaled = score_SQG * jnp.array([100, 0.01, 1])[:, None, None]
    np.testing.assert_allclose(
        each_advantage(scaled, weights), each_advantage(score_SQG, weights), rtol=1e-3, atol=1e-6
    )


def test_each_advantage_leaves_out_rows_that_do_not_count():
    score_SQG = jnp.array([[[1, 0, 7]], [[2, 3, 9]]], jnp.float32)
    mask_QG = jnp.array([[1, 1, 0]])
    got = each_advantage(score_SQG, jnp.ones(2), mask_QG)
    np.testing.assert_allclose(got, [[0, 0, 0]], atol=1e-6)
    got = each_advantage(score_SQG, jnp.array([1, 0]), mask_QG)
    np.testing.assert_allclose(got, [[0.5**0.5, -(0.5**0.5), 0]], rtol=1e-4)


def test_batch_advantage_hand_computed():
    """3, 1, −1 known: mean 1, standard deviation 2."""
    got = batch_advantage(jnp.array([[3, 1], [-1, jnp.nan]]), jnp.array([[1, 1], [1, 0]]))
    np.testing.assert_allclose(got, [[1, 0], [-1, 0]], rtol=1e-5)
    assert (batch_advantage(jnp.ones((2, 2)), jnp.ones((2, 2))) == 0).all()
    assert (batch_advantage(jnp.ones((2, 2)), jnp.eye(2)[:1].repeat(2, 0)) == 0).all()


def test_rloo_advantage_hand_computed():
    advantage = rloo_advantage(jnp.array([[1, 0, 1, 1], [3, 3, 3, 3]]))
    np.testing.assert_allclose(advantage, [[1 / 3, -1, 1 / 3, 1 / 3], [0] * 4], rtol=1e-5)


def test_rloo_advantage_unknown_reward():
    advantage = rloo_advantage(jnp.array([[1, jnp.nan, 0, 1]]))
    np.testing.assert_allclose(advantage, [[0.5, 0, -1, 0.5]], rtol=1e-5)


@BOTH
def test_advantages_equal_rewards_are_zero(advantage):
    for value in (0.1, 1000.1, 12345.678):
        for count in (3, 7):
            np.testing.assert_allclose(advantage(jnp.full((2, count), value)), 0, atol=1e-3)


@BOTH
def test_advantages_single_sample_is_zero(advantage):
    assert (advantage(jnp.array([[3.0], [jnp.nan]])) == 0).all()
    assert (advantage(jnp.array([[3.0, jnp.nan], [jnp.nan, jnp.nan]])) == 0).all()


@BOTH
def test_advantages_no_gradient(advantage):
    reward = jnp.array([[1.0, 0, 1, 1]])
    assert (jax.grad(lambda r: (advantage(r) ** 2).sum())(reward) == 0).all()


@BOTH
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), groups=st.integers(1, 4), samples=st.integers(2, 6))
def test_advantages_permutation_and_shift(advantage, seed, groups, samples):
    keys = jax.random.split(jax.random.key(seed), 3)
    reward = jax.random.normal(keys[0], (groups, samples))
    plain = advantage(reward)
    rows = jax.random.permutation(keys[1], groups)
    columns = jax.random.permutation(keys[2], samples)
    shuffled = advantage(reward[rows][:, columns] + 3)
    np.testing.assert_allclose(shuffled, plain[rows][:, columns], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(plain.sum(1), 0, atol=1e-5)
