import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import LOGP, MASK, RETURNS, VALUE, batch_of, loss_of, rollout, targets

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import PPOConfig
from jaxrlhf.config.algorithms import A2CConfig, ReinforceConfig
from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Outputs

KNOWN = MASK.at[4].set(0)


def test_a2c_targets_hand_computed():
    """λ = 1: the rewards to come, minus the value."""
    batch, metrics = targets(A2CConfig())
    np.testing.assert_allclose(batch.return_BT, RETURNS, rtol=1e-5)
    np.testing.assert_allclose(batch.advantage_BT, RETURNS - VALUE * KNOWN, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.old_value_BT, VALUE * KNOWN)
    np.testing.assert_allclose(batch.weight_BT, KNOWN / 5, rtol=1e-6)  # a sum over tokens
    np.testing.assert_allclose(metrics["return_mean"], RETURNS.sum() / 11, rtol=1e-5)


def test_a2c_targets_gae_hand_computed():
    """γ = .9, λ = ½; row 1: δ₂ = 1 − .4, δ₁ = .1 + .9·.4 − .2, A₁ = δ₁ + .45·δ₂."""
    batch, _ = targets(A2CConfig(gamma=0.9, lam=0.5))
    np.testing.assert_allclose(batch.advantage_BT[1], [0, 0.53, 0.6, 0], rtol=1e-5)
    np.testing.assert_allclose(batch.return_BT[1], [0, 0.73, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(batch.advantage_BT[3], [0, 0.3, 0, 0], rtol=1e-5)


def test_a2c_targets_whitened_over_tokens():
    plain, _ = targets(A2CConfig())
    batch, _ = targets(A2CConfig(whiten_advantages=True))
    wanted = masked.whiten(plain.advantage_BT, KNOWN)
    np.testing.assert_allclose(batch.advantage_BT, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.return_BT, plain.return_BT)


def test_a2c_targets_values_of_a_separate_critic():
    batch, _ = targets(A2CConfig(), rollout(value_BT=None), value_BT=2 * VALUE)
    np.testing.assert_array_equal(batch.old_value_BT, 2 * VALUE * KNOWN)
    with pytest.raises(InputError, match="value_BT=None"):
        targets(A2CConfig(), rollout(value_BT=None))


def test_a2c_loss_hand_computed(rows):
    """−Σ A·log π a row: (6 − 1)/2, whatever the old policy."""
    batch = batch_of(rows, A2CConfig())
    np.testing.assert_allclose(loss_of(A2CConfig(), rows.logp, batch), 2.5, rtol=1e-6)
    gradient = jax.grad(lambda logp: loss_of(A2CConfig(), logp, batch))(rows.logp)
    np.testing.assert_allclose(gradient, [[-0.5] * 3, [0.5, 0.5, 0]], rtol=1e-6)


def test_a2c_value_loss_is_not_clipped():
    """½·mean over rows of the summed squares; none is left of a jump onto the returns."""
    batch, _ = targets(A2CConfig())
    value_loss = ALGORITHMS["a2c"](A2CConfig()).value_loss
    for error in (0.0, 10.0):
        loss, metrics = value_loss(Outputs(LOGP, value_BT=batch.return_BT + error), batch)
        np.testing.assert_allclose(loss, 0.5 * error**2 * 11 / 5, rtol=1e-5)
        assert metrics["value_clip_fraction"] == 0


def test_a2c_gradient_is_ppo_at_ratio_one():
    """The same rollout, aggregation and λ; the loss differs, by Σ weight·A·(1 − log π)."""
    config = PPOConfig(lam=1.0, whiten_advantages=False, aggregation="sequence_sum")

    def gradient(config):
        batch, _ = targets(config)
        return jax.grad(lambda logp: loss_of(config, logp, batch))(LOGP)

    np.testing.assert_allclose(gradient(A2CConfig()), gradient(config), rtol=1e-5, atol=1e-7)
    assert (gradient(config) != 0).sum() == 11


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a2c_of_a_constant_value_is_reinforce_with_that_baseline(gamma):
    """λ = 1: the values of later states cancel."""
    mean, _ = targets(ReinforceConfig(gamma=gamma))
    none, _ = targets(ReinforceConfig(gamma=gamma, baseline="none"))
    baseline = (none.advantage_BT - mean.advantage_BT)[0, 1]
    roll = rollout(value_BT=jnp.full((6, 4), baseline))
    batch, _ = targets(A2CConfig(gamma=gamma), roll)
    np.testing.assert_allclose(batch.advantage_BT, mean.advantage_BT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch.return_BT, none.advantage_BT, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.weight_BT, mean.weight_BT)
