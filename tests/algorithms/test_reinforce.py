import jax
import numpy as np
import pytest
from responses import LOGP, MASK, RETURNS, batch_of, loss_of, rollout, targets

from jaxrlhf.config.algorithms import ReinforceConfig

KNOWN = MASK.at[4].set(0)
NONE = ReinforceConfig(baseline="none")


def test_reinforce_targets_hand_computed():
    """Rewards to come; their mean over five first tokens is 1.53."""
    batch, _ = targets(NONE)
    np.testing.assert_allclose(batch.advantage_BT, RETURNS, rtol=1e-5)
    batch, _ = targets(ReinforceConfig())
    np.testing.assert_allclose(batch.advantage_BT, RETURNS - 1.53 * KNOWN, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.weight_BT, KNOWN / 5, rtol=1e-6)
    assert batch.return_BT is None


def test_reinforce_targets_gamma():
    """γ = ½: rewards .1 and 1; −.1 and 3.2."""
    batch, _ = targets(ReinforceConfig(baseline="none", gamma=0.5))
    np.testing.assert_allclose(batch.advantage_BT[1], [0, 0.6, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(batch.advantage_BT[5], [0, 1.5, 3.2, 0], rtol=1e-5)


def test_reinforce_targets_baseline_is_a_constant():
    """Also where a tool wrote the first token of a response, or the last."""
    for roll in (rollout(), rollout(mask_BT=MASK.at[0, 1].set(0).at[5, 2].set(0))):
        none, mean = (targets(config, roll)[0].advantage_BT for config in (NONE, ReinforceConfig()))
        known = roll.mask_BT * KNOWN
        first_B = np.array([none[row][np.argmax(known[row])] for row in (0, 1, 2, 3, 5)])
        np.testing.assert_allclose(none - mean, first_B.mean() * known, rtol=1e-4, atol=1e-6)


def test_reinforce_loss_hand_computed(rows):
    for config in (ReinforceConfig(), NONE):
        batch = batch_of(rows, config)
        np.testing.assert_allclose(loss_of(config, rows.logp, batch), 2.5, rtol=1e-6)


def test_reinforce_loss_gradient_is_minus_the_return():
    batch, _ = targets(NONE)
    gradient = jax.grad(lambda logp: loss_of(NONE, logp, batch))(LOGP)
    np.testing.assert_allclose(gradient, -RETURNS / 5, rtol=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_reinforce_loss_aggregation(rows, aggregation):
    config = ReinforceConfig(aggregation=aggregation)
    wanted = {"token": 5 / 5, "sequence": (2 - 0.5) / 2, "fixed": 5 / 6}[aggregation]
    loss = loss_of(config, rows.logp, batch_of(rows, config))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
