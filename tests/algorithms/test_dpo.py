import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import answers, one_pair, pair_batch

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import DPOConfig

dpo = ALGORITHMS["dpo"]


def smoothed(kind):
    return DPOConfig(kind=kind, label_smoothing=0.1)


def slopes(config, logp, batch):
    """By the log-prob of every token, [B, 2, T]."""
    return jax.grad(lambda x: dpo(config).loss(x, batch)[0])(logp)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (DPOConfig(), 0.6443967),
        (smoothed("sigmoid"), 0.6543967),  # cDPO
        (smoothed("robust"), 0.6318967),
        (DPOConfig(kind="hinge"), 0.9),
        (DPOConfig(kind="ipo"), 16.0),
        (DPOConfig(kind="ipo", mean_logp=True), 20.25),
        (smoothed("exo_pair"), 0.4571891),
        (DPOConfig(kind="sppo_hard"), 40.5),
        (DPOConfig(kind="apo_zero"), 0.9750053),
        (DPOConfig(kind="apo_down"), 0.9875182),
    ],
)
def test_dpo_loss_hand_computed(config, wanted):
    """Answers of two tokens, −1 and −2 nats, −1.5 under the reference; β = .1."""
    loss, _ = dpo(config).loss(*one_pair())
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_dpo_loss_metrics():
    _, metrics = dpo(DPOConfig()).loss(*one_pair())
    wanted = {"chosen_reward": 0.05, "rejected_reward": -0.05, "margin": 0.1, "accuracy": 1}
    wanted |= {"nll": 0.5, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted, rel=1e-5)
    _, metrics = dpo(DPOConfig(mean_logp=True)).loss(*one_pair())
    np.testing.assert_allclose(metrics["margin"], 0.05, rtol=1e-5)


def test_dpo_loss_unequal_lengths():
    """log-ratios −1 + 3·.5 = .5 and −2 + 1 = −1; means over tokens: ⅙ and −1."""
    logp = answers([[-0.2, -0.3, -0.5], [-2.0]])
    batch = pair_batch(answers([[-0.5] * 3, [-1.0]]), [[3, 1]])
    for mean, margin in ((False, 0.15), (True, 0.1 * 7 / 6)):
        loss, metrics = dpo(DPOConfig(mean_logp=mean)).loss(logp, batch)
        np.testing.assert_allclose(metrics["margin"], margin, rtol=1e-5)
        np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)), rtol=1e-5)


def test_dpo_loss_sft_coef():
    """Plus the chosen answer's NLL a token, ½; its gradient −⅟₂ on each of two tokens."""
    logp, batch = one_pair()
    plain, config = DPOConfig(), DPOConfig(sft_coef=0.3)
    difference = dpo(config).loss(logp, batch)[0] - dpo(plain).loss(logp, batch)[0]
    np.testing.assert_allclose(difference, 0.15, rtol=1e-5)
    difference = slopes(config, logp, batch) - slopes(plain, logp, batch)
    np.testing.assert_allclose(difference, [[[0, -0.15, -0.15, 0], [0] * 4]], rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "loss", "chosen", "rejected"),
    [
        (DPOConfig(), np.log(2), -0.05, 0.05),  # β/2
        (smoothed("sigmoid"), np.log(2), -0.04, 0.04),  # (1 − 2ε)·β/2
        (smoothed("robust"), np.log(2), -0.0625, 0.0625),  # β/2 / (1 − 2ε)
        (DPOConfig(kind="hinge"), 1, -0.1, 0.1),  # β: twice that of DPO
        (DPOConfig(kind="ipo"), 25, -10, 10),  # 1/β: 2/β² times that of DPO
        (smoothed("exo_pair"), -np.log(0.36) / 2, -0.0549306, 0.0549306),  # β·ln 9 / 4
        (DPOConfig(kind="sppo_hard"), 50, -10, 10),
        (DPOConfig(kind="apo_zero"), 1, -0.025, 0.025),  # β/4
        (DPOConfig(kind="apo_down"), 1, 0, 0.025),
    ],
)
def test_dpo_loss_at_the_reference(config, loss, chosen, rejected):
    """The same slope on every token of an answer, none on the prompt."""
    logp = answers([[-0.2, -0.3, -0.5], [-2.0]])
    batch = pair_batch(logp, [[3, 1]])
    np.testing.assert_allclose(dpo(config).loss(logp, batch)[0], loss, rtol=1e-6)
    wanted = [[[0, chosen, chosen, chosen], [0, rejected, 0, 0]]]
    np.testing.assert_allclose(slopes(config, logp, batch), wanted, rtol=1e-5, atol=1e-8)


def test_dpo_loss_small_margins():
    """m → 0: sigmoid is ln 2 − m/2 + m²/8, so twice its gain is hinge's, up to m²/4."""
    logp, batch = one_pair()
    for beta in (0.01, 0.1):
        sigmoid = dpo(DPOConfig(beta=beta)).loss(logp, batch)[0]
        np.testing.assert_allclose(sigmoid, np.log(2) - beta / 2 + beta**2 / 8, atol=1e-6)
        hinge = dpo(DPOConfig(kind="hinge", beta=beta)).loss(logp, batch)[0]
        np.testing.assert_allclose(1 - hinge - 2 * (np.log(2) - sigmoid), beta**2 / 4, atol=2e-6)


def test_dpo_loss_large_margins():
    """m → −∞: sigmoid is −m, and its gradient hinge's; m → ∞: both are 0."""
    logp, batch = one_pair()
    for way, loss, slope in ((1, 0, 0), (-1, 100, -0.1)):
        far = logp.at[:, 0, 1].set(-0.25 + way * 1000)
        sigmoid, hinge = DPOConfig(), DPOConfig(kind="hinge")
        np.testing.assert_allclose(dpo(sigmoid).loss(far, batch)[0], loss, rtol=1e-2, atol=1e-6)
        for config in (sigmoid, hinge):
            gradient = slopes(config, far, batch)[0, 0]
            np.testing.assert_allclose(gradient, [0, slope, slope, 0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mean", [False, True])
def test_dpo_loss_ipo_is_least_at_half_over_beta(mean):
    """A difference of log-ratios of 5 nats, or of 5 nats a token: no loss and no gradient."""
    logp, batch = one_pair()  # a difference of 1, of ½ a token
    config = DPOConfig(kind="ipo", mean_logp=mean)
    best = logp.at[:, 0, 1].add(9 if mean else 4)
    np.testing.assert_allclose(dpo(config).loss(best, batch)[0], 0, atol=1e-4)
    np.testing.assert_allclose(slopes(config, best, batch), 0, atol=1e-3)
    for way in (-1, 1):
        gradient = slopes(config, best.at[:, 0, 1].add(way), batch)[0, 0]
        assert (np.sign(gradient) == [0, way, way, 0]).all()


def test_dpo_loss_is_the_mean_over_rows():
    """A right pair and the same one the wrong way round."""
    logp, batch = one_pair()
    logp = jnp.concatenate([logp, logp[:, ::-1]])
    reference = jnp.concatenate([batch.ref_logp_BCT] * 2)
    loss, metrics = dpo(DPOConfig()).loss(logp, pair_batch(reference, [[2, 2]] * 2))
    np.testing.assert_allclose(loss, (0.6443967 + 0.7443967) / 2, rtol=1e-6)
    assert metrics["accuracy"] == 0.5
