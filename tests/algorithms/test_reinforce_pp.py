import jax.numpy as jnp
import numpy as np
import pytest
from responses import MASK, RETURNS, REWARD, batch_of, loss_of, targets

from jaxrlhf.config.algorithms import ReinforcePPConfig

KNOWN = np.asarray(MASK.at[4].set(0))


def test_reinforce_pp_targets_hand_computed():
    """Rewards to come, to mean 0 and variance 1 over 11 tokens."""
    batch, _ = targets(ReinforcePPConfig())
    token = np.asarray(RETURNS)[KNOWN == 1]
    wanted = np.zeros((6, 4))
    wanted[KNOWN == 1] = (token - token.mean()) / token.std(ddof=1)
    np.testing.assert_allclose(batch.advantage_BT, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.weight_BT, KNOWN / 11, rtol=1e-6)


def test_reinforce_pp_targets_ignores_scale_and_shift_of_scores():
    batch, _ = targets(ReinforcePPConfig(), beta=0.0)
    moved, _ = targets(ReinforcePPConfig(), reward=7 * REWARD - 3, beta=0.0)
    np.testing.assert_allclose(moved.advantage_BT, batch.advantage_BT, rtol=1e-4, atol=1e-5)


def test_reinforce_pp_targets_statistics_are_before_truncated_rows_leave():
    plain, _ = targets(ReinforcePPConfig())
    batch, _ = targets(ReinforcePPConfig(mask_truncated=True))
    np.testing.assert_array_equal(batch.advantage_BT, plain.advantage_BT.at[2].set(0))


def test_reinforce_pp_targets_equal_returns():
    batch, _ = targets(ReinforcePPConfig(), reward=jnp.full(6, 0.1), beta=0.0)
    np.testing.assert_allclose(batch.advantage_BT, 0, atol=1e-6)


def test_reinforce_pp_loss_hand_computed(rows):
    config = ReinforcePPConfig()
    loss = loss_of(config, rows.logp, batch_of(rows, config))
    np.testing.assert_allclose(loss, -0.0439754, atol=1e-6)


@pytest.mark.parametrize(
    ("clip", "wanted"),
    [({"clip_high": 0.05}, -1.05), ({"clip_high": 0.5}, -np.exp(0.1)), ({"clip_low": 0.5}, None)],
)
def test_reinforce_pp_loss_clips(rows, clip, wanted):
    """Token 0 of row 0 has ratio e^.1 and A = 1; with A = −1, token 1 has e^−.5."""
    config = ReinforcePPConfig(**clip)
    batch = batch_of(rows, config)
    if wanted is None:
        wanted, sign, column = np.exp(-0.5), -1, 1
    else:
        sign, column = 1, 0
    one = jnp.zeros((2, 3)).at[0, column].set(1)
    alone = batch.replace(weight_BT=one, advantage_BT=sign * jnp.ones((2, 3)))
    np.testing.assert_allclose(loss_of(config, rows.logp, alone), wanted, rtol=1e-5)
