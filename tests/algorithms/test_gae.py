import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.algorithms import explained_variance, gae


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
