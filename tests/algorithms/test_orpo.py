import jax
import numpy as np
import pytest
from responses import answers, one_pair, pair_batch

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config.algorithms import ORPOConfig

orpo = ALGORITHMS["orpo"]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (ORPOConfig(), 0.5 - 0.1 * np.log(0.7259313)),
        (ORPOConfig(beta=0.4), 0.5 - 0.4 * np.log(0.7259313)),
        (ORPOConfig(sft_coef=0.2), 0.1 - 0.1 * np.log(0.7259313)),
    ],
)
def test_orpo_loss_hand_computed(config, wanted):
    """Means −½ and −1: an odds ratio of 1 + √e; the chosen answer's NLL is ½ a token."""
    loss, metrics = orpo(config).loss(*one_pair())
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["log_odds_ratio"], np.log(1 + np.exp(0.5)), rtol=1e-6)


def test_orpo_loss_reads_means_over_tokens():
    """Three tokens of −½ and one of −1 are the pair above."""
    logp = answers([[-0.5] * 3, [-1.0]])
    loss, _ = orpo(ORPOConfig()).loss(logp, pair_batch(None, [[3, 1]]))
    np.testing.assert_allclose(loss, 0.5 - 0.1 * np.log(0.7259313), rtol=1e-6)


def test_orpo_loss_gradient():
    """β·(1 − σ)·d log odds / d mean, where that of −½ is 1/(1 − e^−½), and −1 from the NLL."""
    logp, batch = one_pair()
    gradient = jax.grad(lambda x: orpo(ORPOConfig()).loss(x, batch)[0])(logp)
    missing = 0.1 * (1 - 0.7259313)
    chosen = (-missing / (1 - np.exp(-0.5)) - 1) / 2
    rejected = missing / (1 - np.exp(-1)) / 2
    wanted = [[[0, chosen, chosen, 0], [0, rejected, rejected, 0]]]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_orpo_loss_of_certain_answers_is_finite():
    """A policy that is certain of the chosen answer, of the rejected one, of both."""
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)):
        logp = answers([[chosen] * 2, [rejected] * 2])
        batch = pair_batch(None, [[2, 2]])
        loss, gradient = jax.value_and_grad(lambda x, b=batch: orpo(ORPOConfig()).loss(x, b)[0])(
            logp
        )
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()
