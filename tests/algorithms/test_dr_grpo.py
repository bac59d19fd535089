import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import LOGP, MASK, REWARD, batch_of, loss_of, targets

from jaxrlhf.config.algorithms import DrGRPOConfig, RLOOConfig

KNOWN = MASK.at[4].set(0)


def test_dr_grpo_targets_hand_computed():
    """Returns 1.85, 1.1, 1.2 | .4, unknown, 3.1, minus the mean of their group."""
    batch, metrics = targets(DrGRPOConfig(length=10))
    wanted = jnp.array([0.4666667, -0.2833333, -0.1833333, -1.35, 0, 1.35])
    np.testing.assert_allclose(batch.advantage_BT, wanted[:, None] * KNOWN, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.weight_BT, KNOWN / 50, rtol=1e-6)
    assert metrics["groups_without_signal"] == 0


def test_dr_grpo_targets_keep_the_scale_of_scores():
    batch, _ = targets(DrGRPOConfig(), beta=0.0)
    moved, _ = targets(DrGRPOConfig(), reward=7 * REWARD - 3, beta=0.0)
    np.testing.assert_allclose(moved.advantage_BT, 7 * batch.advantage_BT, rtol=1e-4, atol=1e-5)


def test_dr_grpo_is_rloo_up_to_a_factor():
    """(G − 1)/G of its known samples: ⅔ and ½; at ratio 1, that of gradients too."""
    dr, rloo = (
        targets(config)[0] for config in (DrGRPOConfig(aggregation="sequence_sum"), RLOOConfig())
    )
    factor = jnp.array([[2 / 3]] * 3 + [[1 / 2]] * 3)
    np.testing.assert_allclose(dr.advantage_BT, factor * rloo.advantage_BT, rtol=1e-5, atol=1e-6)
    gradients = [
        jax.grad(lambda logp, c=config, b=batch: loss_of(c, logp, b))(LOGP)
        for config, batch in ((DrGRPOConfig(), dr), (RLOOConfig(), rloo))
    ]
    np.testing.assert_allclose(gradients[0], factor * gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("beta", "wanted"), [(0.0, -0.0366462), (0.1, -0.0336885)])
@pytest.mark.parametrize("length", [None, 6])
def test_dr_grpo_loss_hand_computed(rows, beta, wanted, length):
    """Divided by a fixed length: the row's width, or twice that."""
    config = DrGRPOConfig(kl_in="loss", kl_estimator="k3", length=length)
    loss = loss_of(config, rows.logp, batch_of(rows, config, beta))
    np.testing.assert_allclose(loss, wanted / (2 if length else 1), atol=1e-6)


def test_dr_grpo_loss_clips(rows):
    config = DrGRPOConfig(clip_high=0.05, clip_low=0.5)
    batch = batch_of(rows, config)
    wanted = (-1.05 - np.exp(-0.5) - 1 + 1 + np.exp(0.4)) / 6
    np.testing.assert_allclose(loss_of(config, rows.logp, batch), wanted, rtol=1e-5)
    flipped = batch.replace(advantage_BT=-batch.advantage_BT)
    wanted = (np.exp(0.1) + np.exp(-0.5) + 1 - 1 - 1.05) / 6
    np.testing.assert_allclose(loss_of(config, rows.logp, flipped), wanted, rtol=1e-5)
