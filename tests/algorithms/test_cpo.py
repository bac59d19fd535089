import jax
import numpy as np
import pytest
from responses import answers, one_pair, pair_batch

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import DPOConfig
from jaxrlhf.config.algorithms import CPOConfig

cpo = ALGORITHMS["cpo"]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (CPOConfig(), 0.6443967 + 0.5),
        (CPOConfig(sft_coef=0.2), 0.6443967 + 0.1),
        (CPOConfig(label_smoothing=0.1), 0.6543967 + 0.5),
        (CPOConfig(beta=0.5), 0.4740770 + 0.5),
    ],
)
def test_cpo_loss_hand_computed(config, wanted):
    """Sums −1 and −2; the chosen answer's NLL is ½ a token."""
    loss, metrics = cpo(config).loss(*one_pair())
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], config.beta, rtol=1e-6)


def test_cpo_loss_reads_sums_over_tokens():
    """−3 and −1: a margin of −.2; slopes β·σ(.2) a token, and ⅓ of the NLL's."""
    logp, batch = answers([[-0.5, -1, -1.5], [-1.0]]), pair_batch(None, [[3, 1]])
    loss, gradient = jax.value_and_grad(lambda x: cpo(CPOConfig()).loss(x, batch)[0])(logp)
    np.testing.assert_allclose(loss, np.log1p(np.exp(0.2)) + 1, rtol=1e-6)
    slope = 0.1 / (1 + np.exp(-0.2))
    wanted = [[[0, *[-slope - 1 / 3] * 3], [0, slope, 0, 0]]]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_cpo_is_dpo_with_a_uniform_reference():
    """Where both answers are equally likely under it, plus the NLL."""
    logp, batch = one_pair()
    for smoothing in (0.0, 0.1):
        config = CPOConfig(label_smoothing=smoothing, sft_coef=0.7)
        dpo = ALGORITHMS["dpo"](DPOConfig(label_smoothing=smoothing, sft_coef=0.7))
        np.testing.assert_allclose(
            cpo(config).loss(logp, batch)[0], dpo.loss(logp, batch)[0], rtol=1e-6
        )
