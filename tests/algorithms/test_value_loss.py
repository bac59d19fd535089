import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import explained_variance, value_loss
from jaxrlhf.core import masked

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


def test_value_loss_no_gradient_into_targets():
    def total(old, returns):
        return value_loss(VALUE, old, returns, MASK, clip=0.01)[0]

    for gradient in jax.grad(total, (0, 1))(jnp.array([[0.5, 1.5]]), RETURN):
        assert (gradient == 0).all()


def test_value_loss_masked_columns_are_never_read():
    mask = jnp.array([[1, 0]])

    def total(value, old, returns):
        return value_loss(value, old, returns, mask)

    clean = jax.value_and_grad(total, has_aux=True)(VALUE, OLD, RETURN)
    assert clean[1][0, 1] == 0
    for bad in (jnp.nan, jnp.inf):
        spoilt = [x.at[0, 1].set(bad) for x in (VALUE, OLD, RETURN)]
        jax.tree.map(
            np.testing.assert_array_equal, jax.value_and_grad(total, has_aux=True)(*spoilt), clean
        )


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
