import jax
import numpy as np
import pytest
from responses import answers, one_pair, pair_batch

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config.algorithms import SimPOConfig

simpo = ALGORITHMS["simpo"]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (SimPOConfig(), np.log(2)),  # 2·(−½ + 1) − 1 = 0
        (SimPOConfig(margin=0.5), 0.4740770),
        (SimPOConfig(beta=3.0), 0.4740770),
        (SimPOConfig(sft_coef=0.2), np.log(2) + 0.1),
    ],
)
def test_simpo_loss_hand_computed(config, wanted):
    """Means −½ and −1 nats a token."""
    loss, metrics = simpo(config).loss(*one_pair())
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], config.beta / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"], 0.5, rtol=1e-6)


def test_simpo_loss_reads_means_over_tokens():
    """Three tokens of −½ and one of −1 are the pair above; β/2 over 3 tokens and over 1."""
    logp, batch = answers([[-0.5] * 3, [-1.0]]), pair_batch(None, [[3, 1]])
    loss, gradient = jax.value_and_grad(lambda x: simpo(SimPOConfig()).loss(x, batch)[0])(logp)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[0, *[-1 / 3] * 3], [0, 1, 0, 0]]], rtol=1e-5)
