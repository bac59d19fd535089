import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.on_policy import importance_weights


def weights(rows, *args, **options):
    """Of the shared rows; log-ratios .1, −.5, 0 | 0, .4 and one masked column."""
    return importance_weights(rows.logp, rows.old, rows.mask, *args, **options)


@pytest.mark.parametrize(
    ("level", "mode", "cap", "wanted"),
    [
        ("token", "truncate", 2.0, [[1.1051709, 0.6065307, 1], [1, 1.4918247, 0]]),
        ("token", "truncate", 1.2, [[1.1051709, 0.6065307, 1], [1, 1.2, 0]]),
        ("token", "truncate", 0.5, [[0.5, 0.5, 0.5], [0.5, 0.5, 0]]),
        ("token", "mask", 2.0, [[1.1051709, 0.6065307, 1], [1, 1.4918247, 0]]),
        ("token", "mask", 1.2, [[1.1051709, 0, 1], [1, 0, 0]]),
        ("token", "mask", 1.0, [[0, 0, 1], [1, 0, 0]]),
        ("sequence", "truncate", 2.0, [[0.6703200] * 3, [1.4918247, 1.4918247, 0]]),
        ("sequence", "truncate", 1.2, [[0.6703200] * 3, [1.2, 1.2, 0]]),
        ("sequence", "mask", 1.495, [[0.6703200] * 3, [1.4918247, 1.4918247, 0]]),
        ("sequence", "mask", 1.49, [[0] * 3, [0] * 3]),
    ],
)
def test_importance_weights_hand_computed(rows, level, mode, cap, wanted):
    weight = weights(rows, level, mode, cap)
    np.testing.assert_allclose(weight, wanted, rtol=1e-5)
    assert weight.dtype == jnp.float32


def test_importance_weights_defaults(rows):
    np.testing.assert_array_equal(weights(rows), weights(rows, "token", "truncate", 2.0))


def test_importance_weights_same_policy_is_one(rows):
    for level in ("token", "sequence"):
        for mode in ("truncate", "mask"):
            weight = importance_weights(rows.logp, rows.logp, rows.mask, level, mode)
            np.testing.assert_array_equal(weight, rows.mask)


def test_importance_weights_sequence_is_the_product_of_tokens(rows):
    """Not the geometric mean: that, to the number of tokens."""
    token = np.asarray(weights(rows, "token", cap=100.0))
    row = weights(rows, "sequence", cap=100.0)
    np.testing.assert_allclose(row[:, 0], [token[0].prod(), token[1, :2].prod()], rtol=1e-5)


def test_importance_weights_unbiased_where_nothing_is_capped():
    """E_μ[w·f] = E_π[f], over all pairs of tokens of a vocabulary of 3."""
    policy, behaviour = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (2, 3)))
    token_BT = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(3)), axis=-1).reshape(9, 2)
    f_B = jax.random.normal(jax.random.key(1), (9,))
    logp_BT, behaviour_BT = policy[token_BT], behaviour[token_BT]
    weight_BT = importance_weights(logp_BT, behaviour_BT, jnp.ones((9, 2)), "sequence", cap=1e6)
    estimate = (jnp.exp(behaviour_BT.sum(1)) * weight_BT[:, 0] * f_B).sum()
    np.testing.assert_allclose(estimate, (jnp.exp(logp_BT.sum(1)) * f_B).sum(), rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_masked_columns_are_never_read(rows, level, mode):
    wanted = weights(rows, level, mode)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        logp, old = rows.logp.at[1, 2].set(bad), rows.old.at[1, 2].set(-bad)
        np.testing.assert_array_equal(importance_weights(logp, old, rows.mask, level, mode), wanted)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_no_gradient(rows, level, mode):
    def total(logp, old):
        return (importance_weights(logp, old, rows.mask, level, mode) ** 2).sum()

    for gradient in jax.grad(total, (0, 1))(rows.logp, rows.old):
        np.testing.assert_array_equal(gradient, jnp.zeros((2, 3)))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_extreme_ratios_are_finite(level):
    logp, old = jnp.array([[0.0], [-1e5]]), jnp.array([[-1e5], [0.0]])
    mask = jnp.ones((2, 1))
    np.testing.assert_array_equal(importance_weights(logp, old, mask, level), [[2], [0]])
    np.testing.assert_array_equal(importance_weights(logp, old, mask, level, "mask"), [[0], [0]])
    free = importance_weights(logp, old, mask, level, cap=float("inf"))
    np.testing.assert_allclose(free, [[np.exp(20) * (1e5 - 19)], [0]], rtol=1e-5)


def test_importance_weights_errors(rows):
    with pytest.raises(ValueError, match="level='row': choose token or sequence"):
        weights(rows, "row")
    with pytest.raises(ValueError, match="mode='clip': choose truncate or mask"):
        weights(rows, mode="clip")
    for mode, cap in (("truncate", 0.0), ("mask", 0.9), ("truncate", float("nan"))):
        with pytest.raises(ValueError, match="cap="):
            weights(rows, mode=mode, cap=cap)
    with pytest.raises(AssertionError):
        importance_weights(rows.logp, rows.old[:, :2], rows.mask)
