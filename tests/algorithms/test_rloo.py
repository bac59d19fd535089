from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import LOGP, MASK, REF, batch_of, group_of, loss_of, rollout, targets

from jaxrlhf.config.algorithms import ReinforceConfig, RLOOConfig

KNOWN = MASK.at[4].set(0)


def test_rloo_targets_hand_computed():
    """Returns 1.85, 1.1, 1.2 | .4, unknown, 3.1: each minus the mean of the others, per token."""
    batch, _ = targets(RLOOConfig())
    wanted = jnp.array([0.7, -0.425, -0.275, -2.7, 0, 2.7])
    np.testing.assert_allclose(batch.advantage_BT, wanted[:, None] * KNOWN, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.weight_BT, KNOWN / 5, rtol=1e-6)


def test_rloo_targets_reads_the_kl_of_the_whole_response():
    """A nat on any token of row 0 lowers its own advantage by β and raises the others' by β/2."""
    plain, _ = targets(RLOOConfig())
    for column in (1, 2, 3):
        batch, _ = targets(RLOOConfig(), ref=REF.at[0, column].add(-1))
        difference = (batch.advantage_BT - plain.advantage_BT)[:, 1]
        np.testing.assert_allclose(difference, [-0.1, 0.05, 0.05, 0, 0, 0], atol=1e-6)


def test_rloo_targets_hand_computed_on_scores():
    batch, _ = targets(RLOOConfig(), *group_of([1.0, 0, 1, 1]))
    np.testing.assert_allclose(batch.advantage_BT[:, 0], [1 / 3, -1, 1 / 3, 1 / 3], rtol=1e-5)
    batch, _ = targets(RLOOConfig(), *group_of([3.0, 3, 3, 3]))
    assert (batch.advantage_BT == 0).all()


def test_rloo_targets_of_one_sample():
    with pytest.raises(ValueError, match=r"sample\.n=1"):
        targets(RLOOConfig(), rollout(n=1))


def test_rloo_targets_of_two_samples_are_their_difference():
    batch, _ = targets(RLOOConfig(), replace(rollout(), n=2), valid=jnp.ones(6, bool), beta=0.0)
    np.testing.assert_allclose(batch.advantage_BT[:, 1], [1, -1, 0.7, -0.7, 0, 0], rtol=1e-5)


def test_rloo_loss_hand_computed(rows):
    loss = loss_of(RLOOConfig(), rows.logp, batch_of(rows, RLOOConfig()))
    np.testing.assert_allclose(loss, 2.5, rtol=1e-6)


def test_rloo_gradient_is_reinforce_up_to_constants_of_the_prompt():
    """With β = 0 credit is the same on every token: R_i − mean of the others, on log π(y|x)."""
    rloo, none = (
        targets(config, beta=0.0)[0] for config in (RLOOConfig(), ReinforceConfig(baseline="none"))
    )
    returns = np.array([2, 1, 1.2, 0.5, 0, 3])
    baseline = np.array([1.1, 1.6, 1.5, 3, 0, 0.5])
    np.testing.assert_allclose(none.advantage_BT[:, 1], returns, rtol=1e-6)
    gradient = jax.grad(lambda logp: loss_of(RLOOConfig(), logp, rloo))(LOGP)
    np.testing.assert_allclose(
        gradient, -(returns - baseline)[:, None] * KNOWN / 5, rtol=1e-5, atol=1e-6
    )
