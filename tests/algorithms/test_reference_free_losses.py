import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.preference_losses import cpo_loss, orpo_loss, preference_loss, simpo_loss

CHOSEN, REJECTED = jnp.array([-0.5]), jnp.array([-1.0])


def test_orpo_loss_hand_computed():
    """The ratio of the odds at e^−½ and e^−1 is 1 + √e = 2.648721, σ of its log .725931."""
    loss, metrics = orpo_loss(CHOSEN, REJECTED, 0.1)
    np.testing.assert_allclose(metrics["log_odds_ratio"], [0.9740770], rtol=1e-6)
    np.testing.assert_allclose(loss, [-0.1 * np.log(0.7259313)], rtol=1e-6)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("logp", [-1e-5, -1e-3, -0.6, -0.7, -3.0, -20.0, -80.0])
def test_orpo_loss_log_odds_keep_their_digits(logp):
    """At log-probs near 0, where 1 − exp cancels, and far from it."""
    _, metrics = orpo_loss(jnp.array([logp]), jnp.array([-np.log(2)]), 1.0)  # odds of 1
    x = np.float64(np.float32(logp))
    np.testing.assert_allclose(metrics["log_odds_ratio"], [x - np.log(-np.expm1(x))], rtol=1e-5)


def test_orpo_loss_certain_answers_are_finite():
    mean = jnp.array([0.0, -1e-9, 1e-7, -1e4])
    for pair in ((mean, mean[::-1]), (mean[::-1], mean), (mean, mean)):
        loss, metrics = orpo_loss(*pair, 0.1)
        gradients = jax.grad(lambda c, r: orpo_loss(c, r, 0.1)[0].sum(), (0, 1))(*pair)
        for x in (loss, *metrics.values(), *gradients):
            assert np.isfinite(x).all()


def test_simpo_loss_hand_computed():
    """2·(−½ + 1) − ½ = ½: −log σ(½)."""
    loss, _ = simpo_loss(CHOSEN, REJECTED, 2.0, 0.5)
    np.testing.assert_allclose(loss, [0.4740770], rtol=1e-6)
    assert loss.dtype == jnp.float32


def test_simpo_loss_gamma_is_in_reward_units():
    """At a difference of γ/β nats a token: ln 2."""
    for beta, gamma in ((2.0, 0.5), (10.0, 3.0)):
        loss, _ = simpo_loss(jnp.array([gamma / beta]), jnp.zeros(1), beta, gamma)
        np.testing.assert_allclose(loss, [np.log(2)], rtol=1e-6)


def test_cpo_loss_hand_computed():
    """Sums −1 and −2, β = .1: as DPO with equal reference log-probs."""
    for smoothing, wanted in ((0.0, 0.6443967), (0.1, 0.6543967)):
        loss, _ = cpo_loss(jnp.array([-1.0]), jnp.array([-2.0]), 0.1, smoothing)
        np.testing.assert_allclose(loss, [wanted], rtol=1e-6)
        assert loss.dtype == jnp.float32
        uniform = jnp.array([-1.5])
        dpo, _ = preference_loss(
            jnp.array([-1.0]), jnp.array([-2.0]), uniform, uniform, 0.1, "sigmoid", smoothing
        )
        np.testing.assert_allclose(loss, dpo, rtol=1e-6)


def test_cpo_loss_label_smoothing_out_of_range():
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
        cpo_loss(CHOSEN, REJECTED, 0.1, 0.5)


LOSSES = pytest.mark.parametrize(
    "loss",
    [
        lambda c, r, beta=0.1: orpo_loss(c, r, beta),
        lambda c, r, beta=0.1: simpo_loss(c, r, beta, 0.3),
        lambda c, r, beta=0.1: cpo_loss(c, r, beta),
    ],
    ids=["orpo", "simpo", "cpo"],
)


@LOSSES
def test_reference_free_losses_gradient_signs(loss):
    chosen, rejected = jax.grad(lambda c, r: loss(c, r)[0].sum(), (0, 1))(CHOSEN, REJECTED)
    assert chosen < 0 < rejected


@LOSSES
def test_reference_free_losses_metrics(loss):
    """Rewards are β·log-prob; the margin leaves out γ; a tie counts one half."""
    chosen, rejected = jnp.array([-0.5, -1, -2]), jnp.array([-1.0, -0.5, -2])
    _, metrics = loss(chosen, rejected)
    np.testing.assert_allclose(metrics["chosen_reward"], [-0.05, -0.1, -0.2], rtol=1e-5)
    np.testing.assert_allclose(metrics["rejected_reward"], [-0.1, -0.05, -0.2], rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], [0.05, -0.05, 0], rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], [1, 0, 0.5])


@LOSSES
def test_reference_free_losses_rows_traced_beta_and_half_precision(loss):
    pair = -jnp.exp(jax.random.normal(jax.random.key(0), (2, 5))).astype(jnp.bfloat16)
    together = jax.jit(lambda beta: loss(*pair, beta)[0])(0.3)
    alone = [loss(*pair[:, i : i + 1], 0.3)[0][0] for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert together.dtype == jnp.float32


@LOSSES
def test_reference_free_losses_shapes(loss):
    with pytest.raises(AssertionError):
        loss(CHOSEN, jnp.zeros(2))
    with pytest.raises(AssertionError):
        loss(CHOSEN[None], REJECTED[None])
