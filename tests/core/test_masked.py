"""Hand-computed means, whitening and weights over masks; sharding and padding change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.core import masked

X = jnp.array([[1.0, 2, 3, 9], [4, 5, 9, 9]])
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])
AGGREGATIONS = ["token", "sequence", "sequence_sum", "fixed"]


def on_four_devices(*arrays, axis):
    """The arrays split over four devices along ``axis``."""
    sharding = NamedSharding(
        Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec(*([None] * axis), "data")
    )
    return [jax.device_put(x, sharding) for x in arrays]


def test_mean_sharded_is_global():
    x, mask = on_four_devices(jnp.array([1.0, 2, 3, 10]), jnp.array([1, 1, 1, 0]), axis=0)
    assert len(x.sharding.device_set) == 4
    assert jax.jit(masked.mean)(x, mask) == 2.0  # a mean of the four devices' means is 1.5


def test_mean_axis_empty_and_integers():
    np.testing.assert_allclose(masked.mean(X, MASK, axis=1), [2, 4.5])
    assert masked.mean(X, jnp.zeros_like(MASK)) == 0
    mean = masked.mean(jnp.array([0, 1, 1, 0]), jnp.array([1, 1, 1, 1]))
    assert mean == 0.5
    assert mean.dtype == jnp.float32


@pytest.mark.parametrize("value", [0.1, 1000.1, 1234.567, 12345.678])
def test_equal_elements_have_no_spread(value):
    for count in (3, 7, 13):
        x = jnp.full((2, count), value)
        assert not jnp.abs(masked.centre(x, jnp.ones_like(x), axis=1)).max()
    np.testing.assert_allclose(jax.jit(masked.whiten)(x[0], jnp.ones(13)), 0, atol=1e-3)


@pytest.mark.parametrize(
    ("shift_mean", "wanted"),
    [
        (True, [[-1.264911, -0.632456, 0, 0], [0.632456, 1.264911, 0, 0]]),
        (False, [[1.735089, 2.367544, 3, 0], [3.632456, 4.264911, 0, 0]]),
    ],
)
def test_whiten_hand_computed(shift_mean, wanted):
    found = masked.whiten(X, MASK, shift_mean)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert (found * (1 - MASK) == 0).all()


def test_whiten_sharded_equals_whole():
    for axis, mask in ((0, MASK.T), (1, MASK)):
        x, mask = on_four_devices(X.T if axis == 0 else X, mask, axis=axis)
        whole = masked.whiten(np.asarray(x), np.asarray(mask))
        np.testing.assert_allclose(jax.jit(masked.whiten)(x, mask), whole, atol=1e-6)


@pytest.mark.parametrize("selected", [0, 1])
def test_whiten_too_few_elements(selected):
    mask = jnp.zeros((2, 3)).at[0, 1].set(selected)
    x = jnp.full((2, 3), 7.0)
    assert (masked.whiten(x, mask) == 0).all()
    assert (masked.whiten(x, mask, shift_mean=False) == 7 * mask).all()


def test_whiten_nan_under_mask_has_no_gradient():
    x = jnp.where(MASK == 1, X, jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.nan]))

    def total(x, shift_mean):
        return (masked.whiten(x, MASK, shift_mean) ** 3).sum()

    for shift_mean in (True, False):
        np.testing.assert_array_equal(
            jax.grad(total)(x, shift_mean), jax.grad(total)(X, shift_mean)
        )


@pytest.mark.parametrize(
    ("aggregation", "wanted"),
    [
        ("token", [[0.2, 0.2, 0.2, 0], [0.2, 0.2, 0, 0]]),
        ("sequence", [[1 / 6, 1 / 6, 1 / 6, 0], [0.25, 0.25, 0, 0]]),
        ("sequence_sum", [[0.5, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]]),
        ("fixed", [[0.125, 0.125, 0.125, 0], [0.125, 0.125, 0, 0]]),
    ],
)
def test_weights_hand_computed(aggregation, wanted):
    np.testing.assert_allclose(masked.weights(MASK, aggregation), wanted, rtol=1e-6)


def test_weights_length_name_and_nothing_selected():
    np.testing.assert_allclose(masked.weights(MASK, "fixed", 10), MASK / 20, rtol=1e-6)
    with pytest.raises(ValueError, match="aggregation='mean'"):
        masked.weights(MASK, "mean")
    for aggregation in AGGREGATIONS:
        assert (masked.weights(jnp.zeros((2, 3)), aggregation) == 0).all()


def test_weights_microbatches_add_up():
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]])
    loss = jnp.array([[1.0, 1, 1, 1], [5, 9, 9, 9]])
    parts = (masked.weights(mask) * loss).sum(1)
    np.testing.assert_allclose(parts.sum(), 1.8, rtol=1e-6)  # a mean of means is 3


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    aggregation=st.sampled_from(AGGREGATIONS[:3]),
    pads=st.integers(0, 3),
)
def test_weights_padding_changes_nothing(lengths, aggregation, pads):
    mask = jnp.arange(4) < jnp.array(lengths)[:, None]
    weight = masked.weights(mask, aggregation)
    padded = masked.weights(jnp.pad(mask, ((0, pads), (pads, 1))), aggregation)
    np.testing.assert_allclose(padded[: len(lengths), pads:-1], weight, rtol=1e-6)
    np.testing.assert_allclose(padded.sum(), weight.sum(), rtol=1e-6)
    if any(lengths) and aggregation != "sequence_sum":
        np.testing.assert_allclose(weight.sum(), 1, rtol=1e-6)
