"""What a minibatch that is cut from a rollout weighs, and SFT, the shortest record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import reweight, sft
from jaxrlhf.config import SFTConfig
from jaxrlhf.core import masked
from jaxrlhf.core.types import Batch, Outputs, PreferenceBatch, TokenBatch

MASK = jnp.array([[1.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])


def rollout(mask_BT=MASK, weight_BT=MASK / 6):
    """Four rows of 3, 1, 0 and 2 tokens, under the weights of all four."""
    return Batch(mask_BT, mask_BT, mask_BT, mask_BT, mask_BT, weight_BT)


@pytest.mark.parametrize(
    ("aggregation", "length", "weight_BT"),
    [
        ("token", None, [[1 / 5] * 3, [0, 0, 0], [1 / 5, 1 / 5, 0]]),
        ("sequence", None, [[1 / 6] * 3, [0, 0, 0], [1 / 4, 1 / 4, 0]]),
        ("sequence_sum", None, [[1 / 2] * 3, [0, 0, 0], [1 / 2, 1 / 2, 0]]),
        ("fixed", 10, [[1 / 20] * 3, [0, 0, 0], [1 / 20, 1 / 20, 0]]),
    ],
)
def test_reweight_makes_means_of_the_rows_that_are_left(aggregation, length, weight_BT):
    part = jax.tree.map(lambda x: x[np.array([0, 2, 3])], rollout())
    found = reweight(part, aggregation, length)
    np.testing.assert_allclose(found.weight_BT, weight_BT, rtol=1e-6)
    np.testing.assert_array_equal(found.mask_BT, part.mask_BT)


def test_reweight_pairs_keep_their_proportions():
    pairs = PreferenceBatch(MASK, MASK, MASK[:, 0], jnp.array([0.1, 0.0, 0.3]))
    np.testing.assert_allclose(reweight(pairs, "token").weight_B, [0.25, 0, 0.75], rtol=1e-6)
    nothing = PreferenceBatch(MASK, MASK, MASK[:, 0], jnp.zeros(3))
    np.testing.assert_array_equal(reweight(nothing, "token").weight_B, [0, 0, 0])


def test_sft_loss_hand_computed():
    mask = jnp.array([[0, 1, 1], [0, 1, 0]])
    tokens = jnp.zeros((2, 3), jnp.int32)
    batch = TokenBatch(tokens, jnp.ones_like(tokens), masked.weights(mask))

    def loss(logp):
        return sft(SFTConfig()).loss(Outputs(logp), batch)

    logp = jnp.array([[0, -1, -2], [jnp.nan, -3, -jnp.inf]])
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logp)
    np.testing.assert_allclose(value, 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, -mask / 3, rtol=1e-6)
    assert metrics["tokens"] == 3
    np.testing.assert_allclose(metrics["weight"], 1, rtol=1e-6)
