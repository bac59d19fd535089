"""The GRPO family: targets and losses by hand, and where its members agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import KNOWN, LOGP, MASK, REWARD, batch_of, loss_of, targets

from jaxrlhf.config.algorithms import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    RLOOConfig,
)

SCALED = [1.1338913, -0.7559276, -0.3779638, -0.7071064, 0, 0.7071064]


@pytest.mark.parametrize(
    ("config", "beta", "advantage", "weight"),
    [
        # scores 2, 1, 1.2 | .5, unknown, 3: .6, −.4, −.2 over √.28, and ∓1.25 over 1.25·√2
        (GRPOConfig(), 0.1, SCALED, KNOWN / (5 * MASK.sum(1, keepdims=True))),
        (DAPOConfig(), 0.0, SCALED, KNOWN / 11),
        # returns 1.85, 1.1, 1.2 | .4, unknown, 3.1
        (
            GRPOConfig(kl_in="reward", kl_estimator="k1"),
            0.1,
            [1.145964, -0.695764, -0.450200, -0.707106, 0, 0.707106],
            KNOWN / (5 * MASK.sum(1, keepdims=True)),
        ),
        (
            DrGRPOConfig(length=10),
            0.1,
            [0.4666667, -0.2833333, -0.1833333, -1.35, 0, 1.35],
            KNOWN / 50,
        ),
    ],
)
def test_group_targets_hand_computed(config, beta, advantage, weight):
    """The same on every token of a response."""
    batch, metrics = targets(config, beta=beta)
    wanted = jnp.array(advantage)[:, None] * KNOWN
    np.testing.assert_allclose(batch.advantage_BT, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.weight_BT, weight, rtol=1e-6)
    assert metrics["groups_without_signal"] == 0
    if config.kl_in == "loss":
        np.testing.assert_array_equal(batch.kl_coef_B, jnp.full(6, 0.1))
    else:
        assert batch.ref_logp_BT is None


def test_grpo_targets_groups_without_signal():
    """Equal rewards, or a single known one: half of the groups, then all."""
    for reward, silent in (([1, 1, 1, 2, 3, 4], 0.5), ([1, 1, 1, 2, jnp.nan, jnp.nan], 1)):
        valid = jnp.ones(6, bool)
        batch, metrics = targets(GRPOConfig(), reward=jnp.array(reward, jnp.float32), valid=valid)
        assert metrics["groups_without_signal"] == silent
        assert (batch.advantage_BT[:3] == 0).all()
        assert (batch.weight_BT[:3] > 0).any()  # they still count, with their KL


def test_grpo_targets_truncated_rewards_still_count_in_their_group():
    plain, _ = targets(GRPOConfig())
    batch, _ = targets(GRPOConfig(mask_truncated=True))
    np.testing.assert_array_equal(batch.advantage_BT, plain.advantage_BT.at[2].set(0))
    np.testing.assert_array_equal(batch.mask_BT, KNOWN.at[2].set(0))
    other, _ = targets(GRPOConfig(mask_truncated=True), reward=REWARD.at[2].set(9))
    assert abs(other.advantage_BT - batch.advantage_BT).max() > 0.1


def test_grpo_targets_ignores_scale_and_shift_of_a_groups_scores():
    batch, _ = targets(GRPOConfig())
    scale, shift = jnp.array([2, 2, 2, 5, 5, 5]), jnp.array([1, 1, 1, -4, -4, -4])
    moved, _ = targets(GRPOConfig(), reward=scale * REWARD + shift)
    np.testing.assert_allclose(moved.advantage_BT, batch.advantage_BT, rtol=1e-4, atol=1e-5)


SCORES = jnp.array([[1, 0], [0, 4], [0.2, 5], [0.5, jnp.nan], [jnp.nan, 1], [3, jnp.nan]])
"""Of two sources: the first has failed on row 4, which has no reward; the second does not apply to
the others of that group."""


@pytest.mark.parametrize(
    "config",
    [GRPOConfig(normalise="each"), DAPOConfig(normalise="each"), CISPOConfig(normalise="each")],
)
def test_targets_of_scores_normalised_each_hand_computed(config):
    """Each source within the group over the rows that it applies to, then the sum over the rollout:
    first (1, 0, .2) and (.5, 3), second (0, 4, 5) and nothing."""
    one, two = np.array([1, 0, 0.2]), np.array([0, 4, 5.0])
    group = (one - 0.4) / one.std(ddof=1) + 0.25 * (two - 3) / two.std(ddof=1)
    known = np.array([*group, -(0.5**0.5), 0.5**0.5])
    wanted = np.insert((known - known.mean()) / known.std(ddof=1), 4, 0)
    given = {"score_BS": SCORES, "weight_S": jnp.array([1, 0.25])}
    batch, metrics = targets(config, beta=0.0, **given)
    np.testing.assert_allclose(batch.advantage_BT, wanted[:, None] * KNOWN, rtol=1e-4, atol=1e-5)
    assert metrics["groups_without_signal"] == 0
    plain, raw = targets(type(config)(), beta=0.0)
    np.testing.assert_array_equal(batch.weight_BT, plain.weight_BT)
    assert metrics["score"] == raw["score"]  # as it came


def test_targets_of_one_source_normalised_each_are_those_of_grpo_up_to_a_scale():
    given = {"score_BS": REWARD[:, None], "weight_S": jnp.array([3.0])}
    each, metrics = targets(GRPOConfig(normalise="each"), **given)
    plain, _ = targets(GRPOConfig())
    scale = np.std(np.delete(SCALED, 4), ddof=1)
    np.testing.assert_allclose(scale * each.advantage_BT, plain.advantage_BT, rtol=1e-4, atol=1e-5)
    assert metrics["groups_without_signal"] == 0
    equal = {"score_BS": jnp.ones((6, 1)), "weight_S": jnp.ones(1)}
    each, metrics = targets(GRPOConfig(normalise="each"), **equal)
    assert metrics["groups_without_signal"] == 1
    assert (each.advantage_BT == 0).all()


def test_grpo_loss_clips(rows):
    """A = 1: e^.1 is above 1 + .05; A = −1: nothing is below 1 − .2, e^.4 stays."""
    config = GRPOConfig(clip_high=0.05)
    batch = batch_of(rows, config)
    wanted = (-(1.05 + np.exp(-0.5) + 1) / 3 + (1 + np.exp(0.4)) / 2) / 2
    np.testing.assert_allclose(loss_of(config, rows.logp, batch), wanted, rtol=1e-5)
    gradient = jax.grad(lambda logp: loss_of(config, logp, batch))(rows.logp)
    assert gradient[0, 0] == 0
    config = GRPOConfig(clip_low=0.5)
    flipped = batch.replace(advantage_BT=-batch.advantage_BT)
    wanted = ((np.exp(0.1) + np.exp(-0.5) + 1) / 3 - (1 + 1.2) / 2) / 2
    np.testing.assert_allclose(loss_of(config, rows.logp, flipped), wanted, rtol=1e-5)


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


def test_gspo_targets_are_those_of_grpo():
    gspo, grpo = (
        targets(config)[0]
        for config in (GSPOConfig(), GRPOConfig(kl_in="reward", kl_estimator="k1"))
    )
    jax.tree.map(np.testing.assert_array_equal, gspo, grpo)
    assert (gspo.advantage_BT != 0).sum() == 11


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


def test_cispo_targets_are_those_of_dapo():
    """GRPO's advantages, token means."""
    cispo, dapo = (targets(config)[0] for config in (CISPOConfig(), DAPOConfig()))
    jax.tree.map(np.testing.assert_array_equal, cispo, dapo)
    assert (cispo.advantage_BT != 0).sum() == 11


@pytest.mark.parametrize(
    ("clip", "weight"),
    [
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
