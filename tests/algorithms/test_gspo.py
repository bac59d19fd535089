import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import MASK, batch_of, loss_of, targets

from jaxrlhf.config.algorithms import GRPOConfig, GSPOConfig

KNOWN = MASK.at[4].set(0)


def test_gspo_targets_are_those_of_grpo():
    gspo, grpo = (
        targets(config)[0]
        for config in (GSPOConfig(), GRPOConfig(kl_in="reward", kl_estimator="k1"))
    )
    jax.tree.map(np.testing.assert_array_equal, gspo, grpo)
    assert (gspo.advantage_BT != 0).sum() == 11


@pytest.mark.parametrize("clip", [{}, {"clip_low": 0.2, "clip_high": 0.2}])
def test_gspo_loss_hand_computed(rows, clip):
    """Row ratios e^−.13333 with A = 1, and e^.2 with A = −1: neither bound holds them."""
    config = GSPOConfig(**clip)
    loss = loss_of(config, rows.logp, batch_of(rows, config))
    np.testing.assert_allclose(loss, 0.1731147, atol=1e-6)


def test_gspo_loss_with_kl(rows):
    """The KL stays a token's: that of GRPO, .0030411 for β = .1."""
    config = GSPOConfig(kl_in="loss", kl_estimator="k3")
    loss = loss_of(config, rows.logp, batch_of(rows, config, 0.1))
    np.testing.assert_allclose(loss, 0.1731147 + 0.1740470 - 0.1710059, atol=1e-6)


def test_gspo_loss_clips_whole_responses(rows):
    """Row ratios 1.001 and .999: beyond the bounds with A = 1 and −1, within with −1 and 1."""
    config = GSPOConfig()
    batch = batch_of(rows, config)
    # tokens move by −.5 … .5 nats, and on average over their row by ±.001
    shift = jnp.array([[0.5, -0.497, 0], [0.5, -0.502, 7]])
    logp = rows.old + shift

    def value(logp, sign):
        return loss_of(config, logp, batch.replace(advantage_BT=sign * batch.advantage_BT))

    loss, gradient = jax.value_and_grad(value)(logp, 1)
    np.testing.assert_allclose(loss, (-1.0004 + 0.9997) / 2, atol=1e-6)
    assert (gradient == 0).all()
    loss, gradient = jax.value_and_grad(value)(logp, -1)
    ratio = np.exp([0.001, -0.001])
    np.testing.assert_allclose(loss, (ratio[0] - ratio[1]) / 2, atol=1e-6)
    wanted = [[ratio[0] / 6] * 3, [-ratio[1] / 4] * 2 + [0]]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4)


def test_gspo_of_one_token_is_grpo(rows):
    """A response of a single token has one ratio anyway."""
    gspo, grpo = GSPOConfig(clip_low=0.2, clip_high=0.2), GRPOConfig()
    mask = jnp.array([[0.0, 1, 0], [1, 0, 0]])
    batch = batch_of(rows, gspo).replace(mask_BT=mask, weight_BT=mask / 2)
    both = [
        jax.value_and_grad(lambda logp, c=config: loss_of(c, logp, batch))(rows.logp)
        for config in (gspo, grpo)
    ]
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-6)
    np.testing.assert_allclose(both[0][1], both[1][1], rtol=1e-6)
