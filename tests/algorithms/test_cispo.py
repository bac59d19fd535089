import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import LOGP, batch_of, loss_of, targets

from jaxrlhf.config.algorithms import CISPOConfig, DAPOConfig


def test_cispo_targets_are_those_of_dapo():
    """GRPO's advantages, token means."""
    cispo, dapo = (targets(config)[0] for config in (CISPOConfig(), DAPOConfig()))
    jax.tree.map(np.testing.assert_array_equal, cispo, dapo)
    assert (cispo.advantage_BT != 0).sum() == 11


def test_cispo_loss_hand_computed(rows):
    """Weights e^.1, e^−.5, 1 | 1, 1.2; log-probs −1, −2, −3 | −.5, −.5."""
    config = CISPOConfig()
    loss = loss_of(config, rows.logp, batch_of(rows, config))
    np.testing.assert_allclose(loss, (1.1051709 + 2 * 0.6065307 + 3 - 0.5 - 0.6) / 5, rtol=1e-6)


def test_cispo_loss_with_kl(rows):
    config = CISPOConfig(kl_in="loss", kl_estimator="k3")
    losses = [loss_of(config, rows.logp, batch_of(rows, config, beta)) for beta in (0.0, 0.1)]
    np.testing.assert_allclose(losses[1] - losses[0], 0.0439754 - 0.0404262, atol=1e-6)


@pytest.mark.parametrize(
    ("clip", "weight"),
    [
        ({}, [1.1051709, 0.6065307, 1, 1, 1.2]),
        ({"clip_low": 0.3}, [1.1051709, 0.7, 1, 1, 1.2]),
        ({"clip_high": 0.05}, [1.05, 0.6065307, 1, 1, 1.05]),
    ],
)
def test_cispo_loss_gradient_never_stops(rows, clip, weight):
    """−w·A/5 on every token: where PPO would stop one, its weight is bounded."""
    config = CISPOConfig(**clip)
    batch = batch_of(rows, config)
    gradient = jax.grad(lambda logp: loss_of(config, logp, batch))(rows.logp)
    wanted = jnp.array([weight[:3], [*weight[3:], 0]]) * -batch.advantage_BT / 5
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


def test_cispo_gradient_is_dapo_at_ratio_one():
    gradients = []
    for config in (CISPOConfig(), DAPOConfig()):
        batch, _ = targets(config)
        gradients.append(jax.grad(lambda logp, c=config, b=batch: loss_of(c, logp, b))(LOGP))
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-7)
