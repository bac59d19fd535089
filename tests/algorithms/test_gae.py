"""The critic: advantages, returns, explained variance and the clipped value loss, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.algorithms import explained_variance, gae, value_loss
from jaxrlhf.algorithms.gae import to_go
from jaxrlhf.core import masked


@pytest.mark.parametrize(
    ("reward", "value", "advantage"),
    [
        ([0, 0, 1], [0.5, 0.4, 0.3], [0.43675, 0.565, 0.7]),
        ([0, -0.2, 0, 0.5], [0.1, 0.2, 0.3, 0.4], [0.1809875, 0.08525, 0.195, 0.1]),
    ],
)
def test_gae_hand_computed(reward, value, advantage):
    reward, value = jnp.array([reward], jnp.float32), jnp.array([value])
    advantages, returns = gae(reward, value, jnp.ones_like(value), 1.0, 0.95)
    np.testing.assert_allclose(advantages[0], advantage, rtol=1e-6)
    np.testing.assert_allclose(returns, advantages + value, rtol=1e-6)


def test_gae_discount_and_bootstrap():
    """γ = .5, λ = .5: δ = [0 + .5·.4 − .2, 1 + .5·3 − .4] = [0, 2.1], A = [0 + .25·2.1, 2.1]."""
    advantages, returns = gae(
        jnp.array([[0.0, 1]]), jnp.array([[0.2, 0.4]]), jnp.ones((1, 2)), 0.5, 0.5, jnp.array([3])
    )
    np.testing.assert_allclose(advantages, [[0.525, 2.1]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.725, 2.5]], rtol=1e-6)


def test_gae_pad_columns_leave_it_bit_equal():
    key = jax.random.key(0)
    reward, value = jax.random.normal(key, (2, 3, 7))
    plain = gae(reward, value, jnp.ones((3, 7)), 0.99, 0.95, 0.3)
    pad = [(0, 0), (1, 1)]
    padded = gae(
        jnp.pad(reward, pad, constant_values=9),
        jnp.pad(value, pad, constant_values=9),
        jnp.pad(jnp.ones((3, 7)), pad),
        0.99,
        0.95,
        0.3,
    )
    for wanted, array in zip(plain, padded, strict=True):
        np.testing.assert_array_equal(array[:, 1:-1], wanted)
        np.testing.assert_array_equal(array[:, [0, -1]], 0)


def test_gae_steps_over_gaps():
    reward, value = jnp.array([[0.0, 0, 1]]), jnp.array([[0.5, 0.4, 0.3]])
    wanted = gae(reward, value, jnp.ones((1, 3)), 0.9, 0.95)
    gap = jnp.array([[0, 3, 4]])
    mask = jnp.array([[1, 0, 0, 1, 1, 0]])
    wide = [jnp.full((1, 6), jnp.nan).at[0, gap].set(x) for x in (reward, value)]
    for array, plain in zip(gae(*wide, mask, 0.9, 0.95), wanted, strict=True):
        np.testing.assert_array_equal(array[0, gap], plain)
        np.testing.assert_array_equal(array * (1 - mask), 0)


def test_gae_integers_become_floats():
    reward = jnp.array([[0, 1]], jnp.int32)
    advantages, returns = gae(reward, jnp.array([[0.3, 0.3]]), jnp.ones((1, 2), bool), 1, 1)
    np.testing.assert_allclose(advantages, [[0.7, 0.7]], rtol=1e-6)
    assert advantages.dtype == returns.dtype == jnp.float32


def test_gae_no_gradient():
    reward, mask = jnp.ones((2, 3)), jnp.ones((2, 3))
    for i in (0, 1):
        gradient = jax.grad(lambda v, i=i: gae(reward, v, mask, 1.0, 0.95)[i].sum())(reward)
        assert (gradient == 0).all()


def test_gae_all_masked_is_zero():
    for array in gae(
        jnp.full((1, 3), jnp.nan), jnp.ones((1, 3)), jnp.zeros((1, 3)), 1.0, 0.95, 5.0
    ):
        assert (array == 0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), length=st.integers(1, 6), gamma=st.floats(0, 1))
def test_gae_lambda_one_is_return_minus_value(seed, length, gamma):
    reward, value = jax.random.normal(jax.random.key(seed), (2, 1, length))
    _, returns = gae(reward, value, jnp.ones((1, length)), gamma, 1.0, 0.7)
    wanted = 0.7
    for t in reversed(range(length)):
        wanted = float(reward[0, t]) + gamma * wanted
        np.testing.assert_allclose(returns[0, t], wanted, rtol=1e-4, atol=1e-5)


def test_explained_variance_hand_computed():
    returns, mask = jnp.array([[1.0, 2, 3, jnp.nan]]), jnp.array([[1, 1, 1, 0]])
    for value, wanted in (
        ([1, 2, 3, 0], 1),
        ([5, 5, 5, 0], 0),
        ([2, 2, 4, 0], 2 / 3),
        ([3, 2, 1, 0], -3),
    ):
        value = jnp.array([value], jnp.float32)
        np.testing.assert_allclose(explained_variance(value, returns, mask), wanted, atol=1e-6)


def test_explained_variance_constant_returns():
    assert explained_variance(jnp.array([[1.0, 2]]), jnp.ones((1, 2)), jnp.ones((1, 2))) == 0


VALUE = jnp.array([[1.0, 2]])

OLD = jnp.array([[0.5, 2.5]])

RETURN = jnp.array([[0.0, 3]])

MASK = jnp.ones((1, 2))


def test_value_loss_hand_computed():
    loss, metrics = value_loss(VALUE, OLD, RETURN, MASK, clip=0.2)
    np.testing.assert_allclose(loss, 0.5, rtol=1e-6)
    assert metrics["value_clip_fraction"] == 0


@pytest.mark.parametrize(
    ("value", "clip", "loss", "slope", "clipped"),
    [
        (0.9, 0.2, 0.5 * 0.8**2, 0, 1),  # moved from 0 to .9 of 1; only the first .2 are believed
        (0.1, 0.2, 0.5 * 0.9**2, -0.9, 0),
        (-0.9, 0.2, 0.5 * 1.9**2, -1.9, 0),  # away from the return: the full error
        (0.9, None, 0.5 * 0.1**2, -0.1, 0),
    ],
)
def test_value_loss_clips_progress(value, clip, loss, slope, clipped):
    def total(value):
        return value_loss(value, jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)), clip)

    (result, metrics), gradient = jax.value_and_grad(total, has_aux=True)(jnp.full((1, 1), value))
    assert result == pytest.approx(loss, rel=1e-5)
    assert gradient[0, 0] == pytest.approx(slope, rel=1e-5)
    assert metrics["value_clip_fraction"] == clipped


def test_value_loss_weights():
    weight = jnp.array([[0.25, 0.5]])
    loss, metrics = value_loss(VALUE, OLD, RETURN, MASK, weight_BT=weight)
    np.testing.assert_allclose(loss, 0.5 * (0.25 * 1 + 0.5 * 1), rtol=1e-6)
    assert metrics["weight"] == 0.75


def test_value_loss_metrics_give_explained_variance():
    value, returns = jax.random.normal(jax.random.key(0), (2, 40, 50)) + 1
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, (40, 50))
    weight = masked.weights(mask)
    parts = [
        value_loss(value[r], value[r], returns[r], mask[r], weight_BT=weight[r])[1]
        for r in (slice(10), slice(10, None))
    ]
    m = jax.tree.map(jnp.add, *parts)
    left = m["value_error_sq"] - (m["return_mean"] - m["value_mean"]) ** 2
    spread = m["return_sq"] - m["return_mean"] ** 2
    wanted = explained_variance(value, returns, mask)
    np.testing.assert_allclose(1 - left / spread, wanted, rtol=1e-3)


def test_to_go_hand_computed():
    """γ = ½; the gap in row 1 costs no discount, and what it holds is not read."""
    reward = jnp.array([[9.0, 1, 2, 4], [9, 1, jnp.nan, 4], [jnp.inf] * 4])
    mask = jnp.array([[0, 1, 1, 1], [0, 1, 0, 1], [0] * 4])
    wanted = [[0, 7, 6, 4], [0, 5, 0, 4], [0] * 4]
    np.testing.assert_array_equal(to_go(reward, mask), wanted)
    wanted = [[0, 3, 4, 4], [0, 3, 0, 4], [0] * 4]
    np.testing.assert_array_equal(to_go(reward, mask, 0.5), wanted)
