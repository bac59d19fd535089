from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from responses import LOGP, MASK, REF, group_of, one_pair, rollout, targets

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import DPOConfig, OnlineDPOConfig

PLAIN = OnlineDPOConfig()


def test_online_dpo_targets_hand_computed():
    """Scores 2, 1, 1.2 | .5, unknown, 3: rows 0 over 1 and 5 over 3."""
    batch, metrics = targets(PLAIN, beta=0.0)
    rows = jnp.array([[0, 1], [5, 3]])
    np.testing.assert_array_equal(batch.token_BCT, rollout().token_BT[rows])
    np.testing.assert_array_equal(batch.attention_mask_BCT, rollout().attention_mask_BT[rows])
    np.testing.assert_array_equal(batch.mask_BCT, MASK[rows])
    np.testing.assert_array_equal(batch.ref_logp_BCT, REF[rows])
    np.testing.assert_array_equal(batch.weight_B, [0.5, 0.5])
    np.testing.assert_array_equal(batch.margin_B, [0, 0])
    assert metrics["pairs"] == 2
    np.testing.assert_allclose(metrics["gap"], (1 + 2.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["score"], 1.54, rtol=1e-5)


def test_online_dpo_targets_rank_by_what_tokens_earn():
    """The KL in the reward is charged, and so are penalties: row 0 goes from first to last."""
    batch, metrics = targets(PLAIN, ref=REF.at[0].add(-20), beta=0.1)
    np.testing.assert_array_equal(batch.token_BCT[0, :, 0], [8, 0])
    np.testing.assert_allclose(metrics["gap"], (1.2 - (1.85 - 6) + 2.7) / 2, rtol=1e-5)
    batch, _ = targets(OnlineDPOConfig(missing_eos_penalty=5.0))
    np.testing.assert_array_equal(batch.token_BCT[0, :, 0], [0, 8])


@pytest.mark.parametrize(("gap", "pairs"), [(0.9, 2), (1.0, 1), (2.5, 0)])
def test_online_dpo_targets_min_gap(gap, pairs):
    """Scores differ by 1 and by 2.5; no more than the gap is too little."""
    batch, metrics = targets(OnlineDPOConfig(min_gap=gap), beta=0.0)
    wanted = {2: [0.5, 0.5], 1: [0, 1], 0: [0, 0]}[pairs]
    np.testing.assert_array_equal(batch.weight_B, wanted)
    assert metrics["pairs"] == pairs
    np.testing.assert_allclose(metrics["gap"], {2: 1.75, 1: 2.5, 0: 0}[pairs], rtol=1e-6)


@pytest.mark.parametrize(
    ("reward", "valid"),
    [
        ([1.0, 1, 1], [1, 1, 1]),
        ([1.0, 2, 3], [0, 1, 0]),
        ([1.0, jnp.nan, jnp.inf], [1, 1, 1]),
        ([1.0, 2, 3], [0, 0, 0]),
        ([-5.0, 1, 2], [1, 0, 0]),
    ],
)
def test_online_dpo_targets_prompts_without_a_pair(reward, valid):
    """All equal, or fewer than two known: weight 0, and everything is finite."""
    roll, ref, reward, _ = group_of(reward)
    batch, metrics = targets(PLAIN, roll, ref, reward, jnp.array(valid))
    assert batch.weight_B[0] == 0
    assert metrics["pairs"] == 0
    assert metrics["gap"] == 0
    assert all(np.isfinite(x) for x in metrics.values())
    loss, _ = ALGORITHMS["online_dpo"](PLAIN).loss(jnp.zeros((1, 2, 2)), batch)
    assert loss == 0


@pytest.mark.parametrize("unknown", [-9.0, 9.0, jnp.nan])
def test_online_dpo_targets_unknown_rewards_are_never_picked(unknown):
    """Negative rewards on both sides of it, and of 0."""
    roll, ref, reward, _ = group_of([-1.0, unknown, -3, -2])
    roll = replace(roll, token_BT=roll.token_BT.at[:, 0].set(jnp.arange(4)))
    batch, _ = targets(PLAIN, roll, ref, reward, jnp.array([1, 0, 1, 1]))
    np.testing.assert_array_equal(batch.token_BCT[0, :, 0], [0, 2])
    assert batch.weight_B[0] == 1


def test_online_dpo_targets_of_one_sample():
    with pytest.raises(ValueError, match=r"sample\.n=1"):
        targets(PLAIN, rollout(n=1))


def test_online_dpo_loss_hand_computed():
    logp, batch = one_pair()
    for config, wanted in (
        (PLAIN, 0.6443967),
        (OnlineDPOConfig(beta=0.5), np.log1p(np.exp(-0.5))),
        (OnlineDPOConfig(kind="hinge"), 0.9),
        (OnlineDPOConfig(kind="ipo"), 16),
    ):
        loss, metrics = ALGORITHMS["online_dpo"](config).loss(logp, batch)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        assert metrics["accuracy"] == 1


def test_online_dpo_loss_is_dpo_on_the_picked_pairs():
    batch, _ = targets(PLAIN, beta=0.0)
    logp = LOGP[jnp.array([[0, 1], [5, 3]])] - 0.2
    online, _ = ALGORITHMS["online_dpo"](PLAIN).loss(logp, batch)
    dpo, _ = ALGORITHMS["dpo"](DPOConfig()).loss(logp, batch)
    assert online == dpo
    # d of the answers: .9 and −1.4 | −1.4 and .8
    margin = 0.1 * np.array([0.9 + 1.4, -1.4 - 0.8])
    np.testing.assert_allclose(online, np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
