"""REINFORCE, REINFORCE++, RLOO and ReMax: targets and losses by hand, and where they agree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import (
    BASELINE,
    KNOWN,
    LOGP,
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
from jaxrlhf.config.algorithms import ReinforceConfig, ReinforcePPConfig, ReMaxConfig, RLOOConfig
from jaxrlhf.core.errors import InputError

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


@pytest.mark.parametrize(
    ("clip", "sign", "column", "wanted"),
    [
        ({"clip_high": 0.05}, 1, 0, -1.05),
        ({"clip_high": 0.5}, 1, 0, -np.exp(0.1)),
        ({"clip_low": 0.5}, -1, 1, np.exp(-0.5)),
    ],
)
def test_reinforce_pp_loss_clips(rows, clip, sign, column, wanted):
    """Token 0 of row 0 has ratio e^.1 and A = 1; with A = −1, token 1 has e^−.5."""
    config = ReinforcePPConfig(**clip)
    one = jnp.zeros((2, 3)).at[0, column].set(1)
    batch = batch_of(rows, config).replace(weight_BT=one, advantage_BT=sign * jnp.ones((2, 3)))
    np.testing.assert_allclose(loss_of(config, rows.logp, batch), wanted, rtol=1e-5)


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


def test_rloo_targets_of_two_samples_are_their_difference():
    batch, _ = targets(RLOOConfig(), replace(rollout(), n=2), valid=jnp.ones(6, bool), beta=0.0)
    np.testing.assert_allclose(batch.advantage_BT[:, 1], [1, -1, 0.7, -0.7, 0, 0], rtol=1e-5)


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
