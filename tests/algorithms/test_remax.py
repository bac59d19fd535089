import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import (
    BASELINE,
    MASK,
    REF,
    RETURNS,
    REWARD,
    VALID,
    batch_of,
    loss_of,
    rollout,
    targets,
)

from jaxrlhf.algorithms import greedy_baseline
from jaxrlhf.config.algorithms import ReinforceConfig, ReMaxConfig
from jaxrlhf.core.errors import InputError

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
    """Such a row is out, like one without a reward; the others share its weight."""
    batch, metrics = targets(ReMaxConfig(), baseline_B=BASELINE.at[0].set(bad))
    wanted, like = targets(ReMaxConfig(), reward=REWARD.at[0].set(bad))
    jax.tree.map(np.testing.assert_array_equal, (batch, metrics), (wanted, like))
    plain, _ = targets(ReMaxConfig())
    assert (batch.advantage_BT[0] == 0).all()
    np.testing.assert_array_equal(batch.advantage_BT[1:], plain.advantage_BT[1:])
    np.testing.assert_allclose(batch.weight_BT, KNOWN.at[0].set(0) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"missing_eos_penalty": 1.0},
        {"overlong_buffer": 2},
        {"missing_eos_penalty": 1.0, "overlong_buffer": 2},
    ],
)
def test_remax_of_a_sample_that_is_the_greedy_response(changes):
    """Both get ½, both are cut off, both pay for it: neither is better."""
    config = ReMaxConfig(**changes)
    roll, greedy = rollout(), jax.tree.map(lambda x: x[2:3], rollout())
    roll = jax.tree.map(lambda x: jnp.repeat(x[2:3], 2, axis=0), roll)
    baseline_B = greedy_baseline(config, greedy, jnp.array([0.5]), 2)
    batch, _ = targets(
        config, roll, REF[:2], jnp.full(2, 0.5), VALID[:2], beta=0.0, baseline_B=baseline_B
    )
    np.testing.assert_allclose(batch.advantage_BT, 0, atol=1e-6)
    assert (batch.weight_BT[:, 1:] > 0).all()


def test_greedy_baseline_repeats_a_prompt():
    greedy = jax.tree.map(lambda x: x[1:3], rollout())
    config = ReMaxConfig(missing_eos_penalty=0.25)
    baseline_B = greedy_baseline(config, greedy, jnp.array([jnp.nan, 1.0]), 3)
    np.testing.assert_array_equal(baseline_B, [jnp.nan] * 3 + [0.75] * 3)


def test_remax_of_one_baseline_is_reinforce_with_it():
    batch, _ = targets(ReMaxConfig(), baseline_B=jnp.full(6, 1.53))
    mean, _ = targets(ReinforceConfig())
    np.testing.assert_allclose(batch.advantage_BT, mean.advantage_BT, rtol=1e-4, atol=1e-6)
    batch, _ = targets(ReMaxConfig(), baseline_B=jnp.zeros(6))
    np.testing.assert_allclose(batch.advantage_BT, RETURNS, rtol=1e-5)


def test_remax_loss_hand_computed(rows):
    loss = loss_of(ReMaxConfig(), rows.logp, batch_of(rows, ReMaxConfig()))
    np.testing.assert_allclose(loss, 2.5, rtol=1e-6)
