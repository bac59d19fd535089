"""PPO and A2C: from scores to targets, and the losses on them, by hand and where they agree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import (
    KNOWN,
    LOGP,
    MASK,
    REF,
    RETURNS,
    REWARD,
    VALUE,
    assert_tree_close,
    loss_of,
    rollout,
    targets,
)

from jaxrlhf.algorithms import ALGORITHMS, ppo
from jaxrlhf.algorithms.ppo import critic_loss
from jaxrlhf.config import PPOConfig
from jaxrlhf.config.algorithms import A2CConfig, ReinforceConfig
from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Batch, Outputs

PLAIN = PPOConfig(lam=1.0, whiten_advantages=False)
CRITICS = pytest.mark.parametrize("config", [PLAIN, A2CConfig()], ids=["ppo", "a2c"])
TOKEN = np.asarray(KNOWN) == 1


@CRITICS
def test_critics_targets_hand_computed(config):
    """γ = λ = 1: the rewards to come, minus the value."""
    batch, metrics = targets(config)
    np.testing.assert_allclose(batch.return_BT, RETURNS, rtol=1e-6)
    np.testing.assert_allclose(batch.advantage_BT, RETURNS - VALUE * KNOWN, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.old_value_BT, VALUE * KNOWN)
    np.testing.assert_array_equal(batch.old_logp_BT, LOGP * KNOWN)
    weight = KNOWN / (11 if config is PLAIN else 5)  # a mean over tokens, a sum over each row's
    np.testing.assert_allclose(batch.weight_BT, weight, rtol=1e-6)
    returns = np.asarray(RETURNS)[TOKEN]
    left = returns - np.asarray(VALUE)[TOKEN]
    np.testing.assert_allclose(metrics["return_mean"], returns.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["advantage_mean"], left.mean(), rtol=1e-4)
    wanted = 1 - left.var() / returns.var()
    np.testing.assert_allclose(metrics["explained_variance"], wanted, rtol=1e-4)


@CRITICS
def test_critics_targets_gae_hand_computed(config):
    """γ = .9, λ = ½; row 1: δ₂ = 1 − .4, δ₁ = .1 + .9·.4 − .2, A₁ = δ₁ + .45·δ₂."""
    batch, _ = targets(replace(config, gamma=0.9, lam=0.5))
    np.testing.assert_allclose(batch.advantage_BT[1], [0, 0.53, 0.6, 0], rtol=1e-5)
    np.testing.assert_allclose(batch.return_BT[1], [0, 0.73, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(batch.advantage_BT[3], [0, 0.3, 0, 0], rtol=1e-5)


@CRITICS
def test_critics_targets_whitened_over_tokens(config):
    plain, before = targets(config)
    batch, metrics = targets(replace(config, whiten_advantages=True))
    wanted = masked.whiten(plain.advantage_BT, KNOWN)
    np.testing.assert_allclose(batch.advantage_BT, wanted, atol=1e-6)
    np.testing.assert_array_equal(batch.return_BT, plain.return_BT)
    assert (batch.advantage_BT * (1 - KNOWN) == 0).all()
    assert metrics["advantage_mean"] == before["advantage_mean"] > 0.5  # before whitening


@CRITICS
def test_critics_targets_values_of_a_separate_critic(config):
    batch, _ = targets(config, rollout(value_BT=None), value_BT=2 * VALUE)
    np.testing.assert_array_equal(batch.old_value_BT, 2 * VALUE * KNOWN)
    with pytest.raises(InputError, match="value_BT=None"):
        targets(config, rollout(value_BT=None))


def test_ppo_targets_fractional_reward_arrives():
    """A reward of .7 is .7 in the returns though the mask is of integers."""
    roll = rollout(mask_BT=MASK.astype(jnp.int32))
    for reward in (jnp.full(6, 0.7), jnp.ones(6, jnp.int32)):
        batch, _ = targets(PLAIN, roll, reward=reward, valid=jnp.ones(6, bool), beta=0.0)
        np.testing.assert_allclose(batch.return_BT, MASK * reward[0], rtol=1e-6)
        assert batch.return_BT.dtype == jnp.float32


def test_ppo_targets_whiten_rewards_keeps_their_mean():
    batch, metrics = targets(replace(PLAIN, whiten_rewards=True))
    later = np.pad(RETURNS[:, 1:], ((0, 0), (0, 1)))
    reward = (np.asarray(RETURNS) - later)[TOKEN]
    white = np.zeros((6, 4))
    white[TOKEN] = (reward - reward.mean()) / reward.std(ddof=1) + reward.mean()
    wanted = white[:, ::-1].cumsum(1)[:, ::-1] * TOKEN
    np.testing.assert_allclose(batch.return_BT, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["reward"], 1.53, rtol=1e-5)


def test_ppo_loss_first_step_is_minus_the_mean_advantage():
    batch, _ = targets(PLAIN)
    loss, metrics = ppo(PLAIN).loss(Outputs(LOGP), batch)
    np.testing.assert_allclose(loss, -masked.mean(batch.advantage_BT, batch.mask_BT), rtol=1e-6)
    assert metrics["policy_loss"] == loss
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip_low", 0.4), ("clip_high", 0.4), ("dual_clip", 1.2), ("aggregation", "sequence")],
)
def test_ppo_loss_reads_its_config(field, value):
    def loss(config):
        batch, _ = targets(config)
        moved = jnp.where(jnp.arange(24).reshape(6, 4) % 2 == 0, 0.5, -0.5)
        sign = jnp.where(jnp.arange(24).reshape(6, 4) % 3 == 0, 1, -1)
        batch = replace(batch, advantage_BT=sign * batch.advantage_BT)
        return loss_of(config, LOGP + moved, batch)

    assert abs(loss(replace(PLAIN, **{field: value})) - loss(PLAIN)) > 1e-3


def test_ppo_value_loss_is_unweighted():
    batch, _ = targets(PLAIN)
    outputs = Outputs(LOGP, value_BT=batch.old_value_BT + 10)
    loss, metrics = ppo(PPOConfig(value_clip=100.0, value_coef=0.1)).value_loss(outputs, batch)
    wanted = 0.5 * masked.mean((outputs.value_BT - batch.return_BT) ** 2, batch.mask_BT)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert metrics["value_loss"] == loss


def test_critics_value_loss_clip():
    """A jump of 1 onto the return: PPO believes as much of it as value_clip allows, A2C all."""
    batch, _ = targets(PLAIN)
    batch = replace(batch, old_value_BT=batch.return_BT - 1)
    outputs = Outputs(LOGP, value_BT=batch.return_BT)
    for clip in (0.1, 0.5):
        loss, metrics = ppo(PPOConfig(value_clip=clip)).value_loss(outputs, batch)
        np.testing.assert_allclose(loss, 0.5 * (1 - clip) ** 2, rtol=1e-5)
        np.testing.assert_allclose(metrics["value_clip_fraction"], 1, rtol=1e-6)
    batch, _ = targets(A2CConfig())
    value_loss = ALGORITHMS["a2c"](A2CConfig()).value_loss
    for error in (0.0, 10.0):
        loss, metrics = value_loss(Outputs(LOGP, value_BT=batch.return_BT + error), batch)
        np.testing.assert_allclose(loss, 0.5 * error**2 * 11 / 5, rtol=1e-5)
        assert metrics["value_clip_fraction"] == 0


def test_ppo_minibatches_and_devices_agree():
    """Targets of rows split over devices equal those on one device."""
    args = jax.tree.map(
        lambda x: jnp.concatenate([x] * 4), (rollout(), REF, REWARD, jnp.ones(6, bool))
    )
    args = (*args[:2], jax.random.normal(jax.random.key(0), (24,)), args[3])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    run = jax.jit(ppo(PPOConfig()).targets)
    results = (run(*given, {"kl_coef": 0.05}) for given in (args, jax.device_put(args, rows)))
    assert_tree_close(*results)


def test_a2c_gradient_is_ppo_at_ratio_one():
    """The same rollout, aggregation and λ; the loss differs, by Σ weight·A·(1 − log π)."""

    def gradient(config):
        batch, _ = targets(config)
        return jax.grad(lambda logp: loss_of(config, logp, batch))(LOGP)

    wanted = gradient(replace(PLAIN, aggregation="sequence_sum"))
    np.testing.assert_allclose(gradient(A2CConfig()), wanted, rtol=1e-5, atol=1e-7)
    assert (wanted != 0).sum() == 11


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


@pytest.mark.parametrize(("clip", "wanted"), [(None, 0.5), (0.2, 0.75875)])
def test_critic_loss_hand_computed(clip, wanted):
    """Errors −1 and 1, clipped 1.3 and 1, under weights ¾ and ¼."""
    zero = jnp.zeros((1, 2))
    batch = Batch(
        token_BT=zero,
        attention_mask_BT=zero,
        mask_BT=zero + 1,
        old_logp_BT=zero,
        advantage_BT=zero,
        weight_BT=jnp.array([[0.75, 0.25]]),
        return_BT=jnp.array([[0.0, 3]]),
        old_value_BT=jnp.array([[1.5, 2]]),
    )
    loss, metrics = critic_loss(Outputs(zero, value_BT=jnp.array([[1.0, 2]])), batch, clip)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert metrics["value_loss"] == loss
    np.testing.assert_allclose(metrics["value_clip_fraction"], 0 if clip is None else 0.75)
