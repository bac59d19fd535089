"""From scores to targets, and the losses on them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import ALGORITHMS, gae, ppo, reweight
from jaxrlhf.config import PPOConfig, RewardModelConfig, SFTConfig
from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Outputs, Rollout

PLAIN = PPOConfig(lam=1.0, whiten_advantages=False)
BETA = {"kl_coef": jnp.float32(0.05)}


def rollout(**changes):
    """Prompt in column 0; responses of 3 and 2 tokens; the second was cut off."""
    mask = jnp.array([[0, 1, 1, 1], [0, 1, 1, 0]])
    logp = jnp.array([[0.0, -1, -1, -1], [0, -2, -1, 0]])
    whole = Rollout(
        token_BT=jnp.array([[3, 5, 6, 2], [3, 5, 6, 0]]),
        attention_mask_BT=jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
        mask_BT=mask,
        logp_BT=logp,
        sample_logp_BT=logp,
        ended_B=jnp.array([True, False]),
        value_BT=jnp.array([[0.0, 0.5, 0.4, 0.3], [0, 0.1, 0.2, 0]]),
    )
    return replace(whole, **changes)


REF = jnp.array([[0.0, -1.5, -1.5, -1.5], [0, -1, -1, 0]])
REWARD = jnp.array([2.0, 1.0])
VALID = jnp.array([True, True])


def targets(config=PLAIN, roll=None, ref=REF, reward=REWARD, valid=VALID, beta=BETA, **options):
    roll = rollout() if roll is None else roll
    return jax.jit(ppo(config).targets)(roll, ref, reward, valid, beta, **options)


def assert_tree_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


def test_ppo_targets_hand_computed():
    """γ = λ = 1: the return is the sum of the rewards to come."""
    batch, metrics = targets()
    returns = jnp.array([[0, 2 - 0.075, 2 - 0.05, 2 - 0.025], [0, 1 + 0.05, 1, 0]])
    np.testing.assert_allclose(batch.return_BT, returns, rtol=1e-6)
    np.testing.assert_allclose(batch.advantage_BT, returns - rollout().value_BT, rtol=1e-5)
    np.testing.assert_allclose(batch.weight_BT, batch.mask_BT / 5, rtol=1e-6)
    np.testing.assert_array_equal(batch.old_logp_BT, rollout().logp_BT)
    np.testing.assert_array_equal(batch.old_value_BT, rollout().value_BT)
    wanted = {
        "score": 1.5,
        "score_std": np.sqrt(0.5),
        "reward": 1.5 + (-0.075 + 0.05) / 2,
        "kl": (1.5 - 1) / 2,
        "kl_reward": (-0.075 + 0.05) / 2,
        "length": 2.5,
        "ended": 0.5,
        "valid": 1,
        "entropy_estimate": 6 / 5,
        "sample_ratio": 1,
        "sample_gap": 0,
        "return_mean": (1.925 + 1.95 + 1.975 + 1.05 + 1) / 5,
        "advantage_mean": (1.925 + 1.95 + 1.975 + 1.05 + 1 - 1.5) / 5,
    }
    got = {k: float(v) for k, v in metrics.items()}
    residual = np.array([1.425, 1.55, 1.675, 0.95, 0.8])
    values = np.array([1.925, 1.95, 1.975, 1.05, 1])
    wanted["explained_variance"] = 1 - residual.var() / values.var()
    assert got == pytest.approx(wanted, rel=1e-4)


def test_ppo_targets_gae():
    batch, _ = targets(PPOConfig(gamma=0.9, lam=0.8, whiten_advantages=False))
    reward = jnp.array([[0, -0.025, -0.025, 1.975], [0, 0.05, 1, 0]])
    wanted = gae(reward, rollout().value_BT, rollout().mask_BT, 0.9, 0.8)
    np.testing.assert_allclose(batch.advantage_BT, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(batch.return_BT, wanted[1], rtol=1e-5)


def test_ppo_targets_fractional_reward_arrives():
    """A reward of .7 is .7 in the returns though every other array is of integers."""
    for reward in (jnp.array([0.7, 0.7]), jnp.array([1, 1], jnp.int32)):
        batch, _ = targets(reward=reward, beta={"kl_coef": 0.0})
        wanted = jnp.where(rollout().mask_BT == 1, reward[0], 0)
        np.testing.assert_allclose(batch.return_BT, wanted, rtol=1e-6)
        assert batch.return_BT.dtype == jnp.float32


@pytest.mark.parametrize(
    ("kind", "kl_reward"), [("k1", 0.5), ("k2", 0.125), ("k3", np.exp(-0.5) - 0.5)]
)
def test_ppo_targets_kl_estimator(kind, kl_reward):
    config = PPOConfig(kl_estimator=kind, lam=1.0, whiten_advantages=False)
    batch, metrics = targets(config)
    np.testing.assert_allclose(batch.return_BT[0, 3], 2 - 0.05 * kl_reward, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], 0.25, rtol=1e-6)  # always k1


def test_ppo_targets_whitens_over_tokens():
    plain, _ = targets()
    white, metrics = targets(PPOConfig(lam=1.0))
    wanted = masked.whiten(plain.advantage_BT, plain.mask_BT)
    np.testing.assert_allclose(white.advantage_BT, wanted, atol=1e-6)
    np.testing.assert_array_equal(white.return_BT, plain.return_BT)
    assert (white.advantage_BT * (1 - white.mask_BT) == 0).all()
    assert metrics["advantage_mean"] > 1  # before whitening


def test_ppo_targets_whiten_rewards_keeps_their_mean():
    config = PPOConfig(lam=1.0, whiten_advantages=False, whiten_rewards=True)
    batch, metrics = targets(config)
    reward = np.array([-0.025, -0.025, 1.975, 0.05, 1])
    white = (reward - reward.mean()) / reward.std(ddof=1) + reward.mean()
    np.testing.assert_allclose(batch.return_BT[0, 1:], white[:3][::-1].cumsum()[::-1], rtol=1e-4)
    np.testing.assert_allclose(metrics["reward"], reward.sum() / 2, rtol=1e-5)


def test_ppo_targets_missing_eos_penalty():
    plain, before = targets()
    batch, metrics = targets(PPOConfig(lam=1.0, whiten_advantages=False, missing_eos_penalty=3.0))
    difference = plain.return_BT - batch.return_BT
    np.testing.assert_allclose(difference, [[0] * 4, [0, 3, 3, 0]], atol=1e-6)
    assert metrics["score"] == before["score"]
    np.testing.assert_allclose(before["reward"] - metrics["reward"], 1.5, rtol=1e-5)


@pytest.mark.parametrize("excluded", ["valid", "reward"])
def test_ppo_targets_unknown_reward_poisons_nothing(excluded):
    """The first row alone, and next to a row without a reward and full of NaN."""
    roll = rollout()
    alone, metrics = targets(
        PPOConfig(), jax.tree.map(lambda x: x[:1], roll), REF[:1], REWARD[:1], VALID[:1]
    )
    bad = [x.at[1].set(jnp.nan) for x in (roll.logp_BT, REF, roll.value_BT)]
    batch, both = targets(
        PPOConfig(),
        replace(roll, logp_BT=bad[0], value_BT=bad[2]),
        bad[1],
        jnp.array([2.0, jnp.nan if excluded == "reward" else 9]),
        jnp.array([True, excluded == "reward"]),
    )
    assert_tree_close(jax.tree.map(lambda x: x[:1], batch), alone)
    for array in (batch.mask_BT, batch.weight_BT, batch.advantage_BT, batch.return_BT):
        assert (array[1] == 0).all()
    assert both.pop("valid") == 0.5
    assert metrics.pop("valid") == 1
    assert_tree_close(both, metrics)


def test_ppo_targets_no_valid_row_is_finite():
    batch, metrics = targets(PPOConfig(), valid=jnp.array([False, False]))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((batch, metrics)))
    assert (batch.weight_BT == 0).all()


def test_ppo_targets_padding_changes_nothing():
    batch, metrics = targets(PPOConfig())
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))) if x.ndim == 2 else x, rollout())
    wide = replace(wide, value_BT=wide.value_BT.at[:, -1].set(9))
    padded, same = targets(PPOConfig(), wide, jnp.pad(REF, ((0, 0), (0, 1))))
    assert_tree_close(jax.tree.map(lambda x: x[:, :-1], padded), batch)
    assert (padded.advantage_BT[:, -1] == 0).all()
    assert_tree_close(same, metrics)


def test_ppo_targets_value_argument_and_its_absence():
    value = jnp.full((2, 4), 0.25)
    batch, _ = targets(value_BT=value)
    np.testing.assert_array_equal(batch.old_value_BT, value * rollout().mask_BT)
    with pytest.raises(InputError, match="value_BT=None"):
        targets(roll=rollout(value_BT=None))


def test_ppo_targets_no_gradient():
    def total(logp, ref, reward, value):
        roll = rollout(logp_BT=logp, value_BT=value)
        batch, _ = ppo(PPOConfig()).targets(roll, ref, reward, VALID, BETA)
        return (batch.advantage_BT + batch.return_BT + batch.old_logp_BT + batch.old_value_BT).sum()

    roll = rollout()
    for gradient in jax.grad(total, (0, 1, 2, 3))(roll.logp_BT, REF, REWARD, roll.value_BT):
        assert (gradient == 0).all()


def test_ppo_loss_first_step_is_minus_the_mean_advantage():
    batch, _ = targets()
    loss, metrics = ppo(PLAIN).loss(Outputs(rollout().logp_BT), batch)
    np.testing.assert_allclose(loss, -masked.mean(batch.advantage_BT, batch.mask_BT), rtol=1e-6)
    assert metrics["policy_loss"] == loss
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == 0


def test_ppo_loss_entropy_bonus():
    batch, _ = targets()
    config = PPOConfig(entropy_coef=0.1)
    outputs = Outputs(rollout().logp_BT, entropy_BT=jnp.full((2, 4), 2.0))
    loss, metrics = ppo(config).loss(outputs, batch)
    np.testing.assert_allclose(loss - metrics["policy_loss"], -0.2, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], 2, rtol=1e-6)
    assert ppo(config).needs == {"value", "reference", "entropy"}
    assert ppo(PLAIN).needs == {"value", "reference"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip_low", 0.4), ("clip_high", 0.4), ("dual_clip", 1.2), ("aggregation", "sequence")],
)
def test_ppo_loss_reads_its_config(field, value):
    def loss(config):
        batch, _ = targets(config)
        logp = rollout().logp_BT + jnp.array([[0, -0.5, 0.5, 0.3], [0, 0.5, -0.5, 0]])
        signs = batch.advantage_BT * jnp.array([[0, 1, 1, -1], [0, -1, -1, 0]])
        return ppo(config).loss(Outputs(logp), replace(batch, advantage_BT=signs))[0]

    assert abs(loss(replace(PLAIN, **{field: value})) - loss(PLAIN)) > 1e-3


def test_ppo_value_loss_is_unweighted():
    batch, _ = targets()
    outputs = Outputs(rollout().logp_BT, value_BT=batch.old_value_BT + 10)
    algorithm = ppo(PPOConfig(value_clip=100.0, value_coef=0.1))
    loss, metrics = algorithm.value_loss(outputs, batch)
    wanted = 0.5 * masked.mean((outputs.value_BT - batch.return_BT) ** 2, batch.mask_BT)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert metrics["value_loss"] == loss


def test_ppo_value_loss_clip():
    """A jump onto the return is believed as far as value_clip allows."""
    batch, _ = targets()
    outputs = Outputs(rollout().logp_BT, value_BT=batch.return_BT)
    for clip in (0.1, 0.5):
        loss, metrics = ppo(PPOConfig(value_clip=clip)).value_loss(outputs, batch)
        left_BT = batch.return_BT - batch.old_value_BT - clip  # every return is further away
        np.testing.assert_allclose(loss, 0.5 * masked.mean(left_BT**2, batch.mask_BT), rtol=1e-5)
        np.testing.assert_allclose(metrics["value_clip_fraction"], 1, rtol=1e-6)


def test_reweight_minibatch():
    batch, _ = targets()
    second = jax.tree.map(lambda x: x[1:], batch)
    np.testing.assert_allclose(second.weight_BT, [[0, 0.2, 0.2, 0]], rtol=1e-6)
    for aggregation, weight in (("token", 0.5), ("fixed", 0.1)):
        again = reweight(second, aggregation, 10)
        np.testing.assert_allclose(again.weight_BT, [[0, weight, weight, 0]], rtol=1e-6)


def test_ppo_minibatches_and_devices_agree():
    """Targets and losses of rows split over devices equal those on one device."""
    count = 8
    roll, ref, reward, valid = jax.tree.map(
        lambda x: jnp.concatenate([x] * (count // 2)), (rollout(), REF, REWARD, VALID)
    )
    reward = jax.random.normal(jax.random.key(0), (count,))
    whole, metrics = targets(PPOConfig(), roll, ref, reward, valid)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = jax.device_put((roll, ref, reward, valid), rows)
    assert_tree_close(targets(PPOConfig(), *split), (whole, metrics))


def test_algorithms_are_made_from_their_config():
    for config in (PPOConfig(), RewardModelConfig(), SFTConfig()):
        algorithm = ALGORITHMS[config.name](config)
        assert (algorithm.targets is None) == (config.name != "ppo")
        assert callable(algorithm.loss)
