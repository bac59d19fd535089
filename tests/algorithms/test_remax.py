import jax.numpy as jnp
import numpy as np
import pytest
from responses import BASELINE, MASK, RETURNS, batch_of, loss_of, targets

from jaxrlhf.config.algorithm import ReinforceConfig, ReMaxConfig
from jaxrlhf.errors import InputError

KNOWN = MASK.at[4].set(0)


def test_remax_targets_hand_computed():
    """Rewards to come, minus 1 in the first group and ½ in the second."""
    batch, _ = targets(ReMaxConfig())
    wanted = [[0, 0.85, 0.9, 0.95], [0, 0.1, 0, 0], [0, 0.2, 0.2, 0.1], [0, -0.1, 0, 0], [0] * 4]
    np.testing.assert_allclose(
        batch.advantage_BT, [*wanted, [0, 2.6, 2.7, 0]], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(batch.weight_BT, KNOWN / 5, rtol=1e-6)


def test_remax_targets_without_baseline():
    with pytest.raises(InputError, match="baseline_B=None: remax needs"):
        targets(ReMaxConfig(), baseline_B=None)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_remax_targets_unknown_baseline(bad):
    """Such a row learns nothing; the others are as before."""
    plain, _ = targets(ReMaxConfig())
    batch, _ = targets(ReMaxConfig(), baseline_B=BASELINE.at[0].set(bad))
    assert (batch.advantage_BT[0] == 0).all()
    np.testing.assert_array_equal(batch.advantage_BT[1:], plain.advantage_BT[1:])
    np.testing.assert_array_equal(batch.weight_BT, plain.weight_BT)


def test_remax_of_one_baseline_is_reinforce_with_it():
    batch, _ = targets(ReMaxConfig(), baseline_B=jnp.full(6, 1.53))
    mean, _ = targets(ReinforceConfig())
    np.testing.assert_allclose(batch.advantage_BT, mean.advantage_BT, rtol=1e-4, atol=1e-6)
    batch, _ = targets(ReMaxConfig(), baseline_B=jnp.zeros(6))
    np.testing.assert_allclose(batch.advantage_BT, RETURNS, rtol=1e-5)


def test_remax_loss_hand_computed(rows):
    loss = loss_of(ReMaxConfig(), rows.logp, batch_of(rows, ReMaxConfig()))
    np.testing.assert_allclose(loss, 2.5, rtol=1e-6)
