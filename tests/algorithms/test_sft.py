import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import sft
from jaxrlhf.config import SFTConfig
from jaxrlhf.core import masked
from jaxrlhf.core.types import Outputs, TokenBatch


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
