import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import MASK, REWARD, batch_of, loss_of, rollout, targets

from jaxrlhf.config.algorithms import GRPOConfig

KNOWN = MASK.at[4].set(0)


def assert_spread(batch, advantage):
    """The same on every token of a response."""
    wanted = jnp.array(advantage)[:, None] * batch.mask_BT
    np.testing.assert_allclose(batch.advantage_BT, wanted, rtol=1e-4, atol=1e-6)


def test_grpo_targets_hand_computed():
    """Scores 2, 1, 1.2 | .5, unknown, 3: .6, −.4, −.2 over √.28, and ∓1.25 over 1.25·√2."""
    batch, metrics = targets(GRPOConfig())
    assert_spread(batch, [1.1338913, -0.7559276, -0.3779638, -0.7071064, 0, 0.7071064])
    np.testing.assert_allclose(batch.weight_BT, KNOWN / (5 * MASK.sum(1, keepdims=True)), rtol=1e-6)
    np.testing.assert_array_equal(batch.kl_coef_B, jnp.full(6, 0.1))
    assert metrics["groups_without_signal"] == 0


def test_grpo_targets_kl_in_reward():
    """Returns 1.85, 1.1, 1.2 | .4, unknown, 3.1."""
    batch, _ = targets(GRPOConfig(kl_in="reward", kl_estimator="k1"))
    assert_spread(batch, [1.145964, -0.695764, -0.450200, -0.707106, 0, 0.707106])
    assert batch.ref_logp_BT is None


def test_grpo_targets_groups_without_signal():
    """Equal rewards, or a single known one: half of the groups, then all."""
    for reward, silent in (([1, 1, 1, 2, 3, 4], 0.5), ([1, 1, 1, 2, jnp.nan, jnp.nan], 1)):
        valid = jnp.ones(6, bool)
        batch, metrics = targets(GRPOConfig(), reward=jnp.array(reward, jnp.float32), valid=valid)
        assert metrics["groups_without_signal"] == silent
        assert (batch.advantage_BT[:3] == 0).all()
        assert (batch.weight_BT[:3] > 0).any()  # they still count, with their KL


def test_grpo_targets_of_one_sample():
    with pytest.raises(ValueError, match=r"sample\.n=1"):
        targets(GRPOConfig(), rollout(n=1))


def test_grpo_targets_truncated_rewards_still_count_in_their_group():
    plain, _ = targets(GRPOConfig())
    batch, _ = targets(GRPOConfig(mask_truncated=True))
    np.testing.assert_array_equal(batch.advantage_BT, plain.advantage_BT.at[2].set(0))
    np.testing.assert_array_equal(batch.mask_BT, KNOWN.at[2].set(0))
    other, _ = targets(GRPOConfig(mask_truncated=True), reward=REWARD.at[2].set(9))
    assert abs(other.advantage_BT - batch.advantage_BT).max() > 0.1


def test_grpo_targets_ignores_scale_and_shift_of_a_groups_scores():
    batch, _ = targets(GRPOConfig())
    scale, shift = jnp.array([2, 2, 2, 5, 5, 5]), jnp.array([1, 1, 1, -4, -4, -4])
    moved, _ = targets(GRPOConfig(), reward=scale * REWARD + shift)
    np.testing.assert_allclose(moved.advantage_BT, batch.advantage_BT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("beta", "wanted"), [(0.0, 0.1710059), (0.1, 0.1740470)])
def test_grpo_loss_hand_computed(rows, beta, wanted):
    config = GRPOConfig()
    loss = loss_of(config, rows.logp, batch_of(rows, config, beta))
    np.testing.assert_allclose(loss, wanted, atol=1e-6)


def test_grpo_loss_clips(rows):
    """A = 1: e^.1 is above 1 + .05; A = −1: nothing is below 1 − .2, e^.4 stays."""
    config = GRPOConfig(clip_high=0.05)
    batch = batch_of(rows, config)
    wanted = (-(1.05 + np.exp(-0.5) + 1) / 3 + (1 + np.exp(0.4)) / 2) / 2
    np.testing.assert_allclose(loss_of(config, rows.logp, batch), wanted, rtol=1e-5)
    gradient = jax.grad(lambda logp: loss_of(config, logp, batch))(rows.logp)
    assert gradient[0, 0] == 0
    config = GRPOConfig(clip_low=0.5)
    flipped = batch.replace(advantage_BT=-batch.advantage_BT)
    wanted = ((np.exp(0.1) + np.exp(-0.5) + 1) / 3 - (1 + 1.2) / 2) / 2
    np.testing.assert_allclose(loss_of(config, rows.logp, flipped), wanted, rtol=1e-5)
