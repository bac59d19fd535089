import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import MASK, batch_of, loss_of, targets

from jaxrlhf.config.algorithms import DAPOConfig

KNOWN = MASK.at[4].set(0)


def test_dapo_targets_hand_computed():
    """GRPO's advantages, token means: scores 2, 1, 1.2 | .5, unknown, 3."""
    batch, metrics = targets(DAPOConfig(), beta=0.0)
    wanted = jnp.array([1.1338913, -0.7559276, -0.3779638, -0.7071064, 0, 0.7071064])
    np.testing.assert_allclose(batch.advantage_BT, wanted[:, None] * KNOWN, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.weight_BT, KNOWN / 11, rtol=1e-6)
    assert metrics["groups_without_signal"] == 0


def test_dapo_targets_overlong_responses():
    """3 tokens cost 1 and 2 cost ½: scores 1, .5, .2 | .5, unknown, 2.5; the cut-off row leaves."""
    config = DAPOConfig(overlong_buffer=2, mask_truncated=True)
    batch, metrics = targets(config, beta=0.0)
    spread = np.std([1, 0.5, 0.2], ddof=1)
    wanted = [1.3 / 3 / spread, -0.2 / 3 / spread, 0, -0.707106, 0, 0.707106]
    np.testing.assert_allclose(batch.advantage_BT[:, 1], wanted, rtol=1e-4, atol=1e-6)
    assert (batch.mask_BT[2] == 0).all()
    np.testing.assert_allclose(batch.weight_BT, batch.mask_BT / 8, rtol=1e-6)
    np.testing.assert_allclose(metrics["score"], 1.54, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward"], 4.7 / 5, rtol=1e-5)


@pytest.mark.parametrize(("beta", "wanted"), [(0.0, -0.0439754), (0.1, -0.0404262)])
def test_dapo_loss_hand_computed(rows, beta, wanted):
    config = DAPOConfig(kl_in="loss", kl_estimator="k3")
    loss = loss_of(config, rows.logp, batch_of(rows, config, beta))
    np.testing.assert_allclose(loss, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.25, 1, -1.25, -1.25),  # beyond PPO's bound
        (1.3, 1, -1.28, 0),
        (0.81, -1, 0.81, 0.81),
        (0.75, -1, 0.8, 0),
    ],
)
def test_dapo_loss_clips_higher_than_low(rows, ratio, advantage, loss, slope):
    """On one token that has all the weight."""
    config = DAPOConfig()
    one = jnp.zeros((2, 3)).at[0, 1].set(1)
    batch = batch_of(rows, config).replace(weight_BT=one, advantage_BT=advantage * one)
    logp = rows.old + np.log(ratio)
    value, gradient = jax.value_and_grad(lambda logp: loss_of(config, logp, batch))(logp)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope * one, rtol=1e-5)
