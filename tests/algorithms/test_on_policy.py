"""Prices, penalties, importance weights and learnable batches, by hand."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import (
    KL,
    KNOWN,
    LOGP,
    MASK,
    REF,
    RETURNS,
    REWARD,
    VALID,
    assert_tree_close,
    batch_of,
    rollout,
)

from jaxrlhf.algorithms import cispo_loss, policy_gradient_loss, ppo_policy_loss
from jaxrlhf.algorithms.on_policy import (
    Credit,
    importance_weights,
    learnable,
    overlong_penalty,
    penalised,
    price,
    score_penalty,
    spread,
)
from jaxrlhf.config.algorithms import OnPolicyConfig, RewardedConfig, TokenLossConfig
from jaxrlhf.core.types import Outputs


@dataclass(frozen=True)
class PlainConfig(TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """No algorithm's: the settings of every loss on tokens, at their defaults."""


PLAIN = PlainConfig()
BAD = (jnp.nan, jnp.inf, -jnp.inf)


def priced(config=PLAIN, roll=None, ref=REF, reward=REWARD, valid=VALID, beta=0.1):
    roll = rollout() if roll is None else roll
    return price(config, roll, ref, reward, valid, {"kl_coef": jnp.float32(beta)})


def test_price_hand_computed():
    """−.1·d on every token, the score on the last one; nothing where there is no reward."""
    result = priced()
    score = jnp.zeros((6, 4)).at[0, 3].set(2).at[1, 2].set(1).at[2, 3].set(1.2)
    score = score.at[3, 1].set(0.5).at[5, 2].set(3)
    np.testing.assert_allclose(result.reward_BT, score - 0.1 * KL, atol=1e-6)
    np.testing.assert_allclose(result.returns(), RETURNS[:, 1], rtol=1e-5)
    np.testing.assert_array_equal(result.mask_BT, KNOWN)
    np.testing.assert_array_equal(result.logp_BT, LOGP * KNOWN)
    np.testing.assert_array_equal(result.ref_logp_BT, REF * KNOWN)
    np.testing.assert_array_equal(result.valid_B, VALID)
    assert result.kl_coef == jnp.float32(0.1)


def test_price_metrics_hand_computed():
    """Over five rows of 3, 2, 3, 1 and 2 tokens."""
    wanted = {
        "score": 1.54,
        "score_std": np.std([2, 1, 1.2, 0.5, 3], ddof=1),
        "reward": 1.53,
        "kl": 0.1,
        "kl_reward": -0.01,
        "length": 2.2,
        "ended": 0.8,
        "entropy_estimate": 14.5 / 11,
        "sample_ratio": 1,
        "sample_gap": 0,
        "valid": 5 / 6,
    }
    got = {name: float(value) for name, value in priced().metrics.items()}
    assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kl_in", ["loss", "exact_loss"])
def test_price_kl_in_the_loss_is_not_in_the_reward(kl_in):
    result = priced(PlainConfig(kl_in=kl_in, kl_estimator="k3"))
    np.testing.assert_allclose(result.returns(), [2, 1, 1.2, 0.5, 0, 3], rtol=1e-6)
    assert result.metrics["kl_reward"] == 0
    np.testing.assert_allclose(result.metrics["kl"], 0.1, rtol=1e-5)
    assert result.kl_coef == jnp.float32(0.1)


@pytest.mark.parametrize(
    ("kind", "of_one", "of_minus_one"), [("k2", 0.5, 0.5), ("k3", np.exp(-1), np.e - 2)]
)
def test_price_kl_estimator(kind, of_one, of_minus_one):
    result = priced(PlainConfig(kl_estimator=kind))
    np.testing.assert_allclose(result.reward_BT[3, 1], 0.5 - 0.1 * of_one, rtol=1e-5)
    np.testing.assert_allclose(result.reward_BT[1, 1], -0.1 * of_minus_one, rtol=1e-5)
    np.testing.assert_allclose(result.metrics["kl"], 0.1, rtol=1e-5)  # always k1


def test_price_penalties():
    """On the last token; up to 3, of which the last 2 cost, and .7 for the one cut off."""
    config = PlainConfig(overlong_buffer=2, missing_eos_penalty=0.7)
    plain, result = priced(), priced(config)
    difference = plain.returns() - result.returns()
    np.testing.assert_allclose(difference, [1, 0.5, 1.7, 0, 0, 0.5], atol=1e-6)
    last = (plain.reward_BT - result.reward_BT)[jnp.arange(6), jnp.array([3, 2, 3, 1, 2, 2])]
    np.testing.assert_allclose(last, difference, atol=1e-6)
    assert result.metrics["score"] == plain.metrics["score"]
    reward = plain.metrics["reward"] - result.metrics["reward"]
    np.testing.assert_allclose(reward, 3.7 / 5, rtol=1e-4)


@pytest.mark.parametrize("reward", [9.0, *BAD])
def test_price_unknown_reward(reward):
    """A row is out if it is said to be or its reward is not finite, and is then never read."""
    wanted = priced()
    roll = rollout(logp_BT=LOGP.at[4].set(jnp.nan), sample_logp_BT=LOGP.at[4].set(jnp.inf))
    valid = VALID.at[4].set(not np.isfinite(reward))
    result = priced(
        roll=roll, ref=REF.at[4].set(jnp.nan), reward=REWARD.at[4].set(reward), valid=valid
    )
    assert_tree_close(result[1:], wanted[1:], rtol=1e-6)
    assert (result.reward_BT[4] == 0).all()


def test_price_integers_and_flags():
    """Rewards of integers become floats; ``valid_B`` may be of numbers."""
    reward, valid = jnp.arange(6), jnp.array([1, 1, 1, 1, 0, 1])
    result = priced(reward=reward, valid=valid, beta=0.25)
    returns = jnp.where(valid == 1, reward - 0.25 * KL.sum(1), 0)
    np.testing.assert_allclose(result.returns(), returns, rtol=1e-6)
    assert result.reward_BT.dtype == jnp.float32
    assert result.valid_B.dtype == jnp.bool_


def test_price_columns_under_the_mask_are_never_read():
    """A gap in row 0 (a tool's token) and padding: neither prices nor metrics see them."""
    gap = rollout(mask_BT=MASK.at[0, 2].set(0))
    wanted = priced(roll=gap)
    np.testing.assert_allclose(wanted.reward_BT[0], [0, -0.05, 0, 1.95], rtol=1e-5)
    np.testing.assert_allclose(wanted.metrics["length"], 2, rtol=1e-6)
    for bad in BAD:
        logp = jnp.where(gap.mask_BT == 1, LOGP, bad)
        roll = replace(gap, logp_BT=logp, sample_logp_BT=logp)
        result = priced(roll=roll, ref=jnp.where(gap.mask_BT == 1, REF, -bad))
        assert_tree_close(result[1:], wanted[1:], rtol=1e-6)


def test_price_sample_ratio_and_gap():
    """exp(d) and |d|, d = logp − sample_logp: log 2 up on one of 11 tokens and down on another."""
    sample = LOGP.at[3, 1].add(-jnp.log(2)).at[0, 1].add(jnp.log(2))
    metrics = priced(roll=rollout(sample_logp_BT=sample)).metrics
    np.testing.assert_allclose(metrics["sample_ratio"], (9 + 2 + 0.5) / 11, rtol=1e-6)
    np.testing.assert_allclose(metrics["sample_gap"], 2 * np.log(2) / 11, rtol=1e-6)


def test_learnable_hand_computed():
    advantage = jnp.arange(24.0).reshape(6, 4) + 1
    result = priced()
    batch = learnable(PLAIN, result, Credit(advantage, advantage + 1, advantage + 2))
    np.testing.assert_array_equal(batch.mask_BT, KNOWN)
    np.testing.assert_array_equal(batch.advantage_BT, advantage * KNOWN)
    np.testing.assert_allclose(batch.weight_BT, KNOWN / 11, rtol=1e-6)
    np.testing.assert_array_equal(batch.old_logp_BT, LOGP * KNOWN)
    np.testing.assert_array_equal(batch.return_BT, advantage + 1)
    np.testing.assert_array_equal(batch.old_value_BT, advantage + 2)
    np.testing.assert_array_equal(batch.token_BT, rollout().token_BT)
    np.testing.assert_array_equal(batch.attention_mask_BT, rollout().attention_mask_BT)


@pytest.mark.parametrize("kl_in", ["reward", "loss", "exact_loss"])
def test_learnable_reference_only_where_the_kl_is_in_the_loss(kl_in):
    batch = learnable(PlainConfig(kl_in=kl_in), priced(beta=0.3), Credit(jnp.ones((6, 4))))
    if kl_in == "reward":
        assert batch.ref_logp_BT is None
        assert batch.kl_coef_B is None
    else:
        np.testing.assert_array_equal(batch.ref_logp_BT, REF * KNOWN)
        np.testing.assert_array_equal(batch.kl_coef_B, jnp.full(6, 0.3))


def test_learnable_aggregation():
    credit = Credit(jnp.ones((6, 4)))
    weight_BT = learnable(PlainConfig(aggregation="sequence"), priced(), credit).weight_BT
    np.testing.assert_allclose(weight_BT, KNOWN / (5 * MASK.sum(1, keepdims=True)), rtol=1e-6)
    config = PlainConfig(aggregation="fixed", length=7)
    np.testing.assert_allclose(learnable(config, priced(), credit).weight_BT, KNOWN / 35, rtol=1e-6)


def test_learnable_mask_truncated():
    batch = learnable(PlainConfig(mask_truncated=True), priced(), Credit(jnp.ones((6, 4))))
    mask = KNOWN.at[2].set(0)
    np.testing.assert_array_equal(batch.mask_BT, mask)
    np.testing.assert_array_equal(batch.advantage_BT, mask)
    np.testing.assert_allclose(batch.weight_BT, mask / 8, rtol=1e-6)


def test_learnable_off_policy_hand_computed():
    """π/μ of row 1: 1.5 and ½; of row 3: 4. In rows without reward, nothing is read."""
    sample = LOGP.at[1].add(jnp.log(jnp.array([1, 1 / 1.5, 2, 1]))).at[3, 1].add(-jnp.log(4))
    result = priced(roll=rollout(sample_logp_BT=sample.at[4].set(jnp.nan)))
    for off_policy, row1, row3 in (
        ("none", [0, 3, 3, 0], 3),
        ("token", [0, 4.5, 1.5, 0], 6),
        ("token_mask", [0, 4.5, 1.5, 0], 0),
        ("sequence", [0, 2.25, 2.25, 0], 6),
        ("sequence_mask", [0, 2.25, 2.25, 0], 0),
    ):
        batch = learnable(PlainConfig(off_policy=off_policy), result, Credit(jnp.full((6, 4), 3.0)))
        np.testing.assert_allclose(batch.advantage_BT[1], row1, rtol=1e-5)
        np.testing.assert_allclose(batch.advantage_BT[3], [0, row3, 0, 0], rtol=1e-5)
        np.testing.assert_array_equal(batch.advantage_BT[0], [0, 3, 3, 3])
        assert (batch.advantage_BT[4] == 0).all()
        np.testing.assert_allclose(batch.weight_BT, KNOWN / 11, rtol=1e-6)  # never in here


def test_learnable_off_policy_cap():
    sample = LOGP.at[3, 1].add(-jnp.log(4))
    for cap, weight in ((3.0, 3), (5.0, 4)):
        config = PlainConfig(off_policy="token", off_policy_cap=cap)
        batch = learnable(
            config, priced(roll=rollout(sample_logp_BT=sample)), Credit(jnp.ones((6, 4)))
        )
        np.testing.assert_allclose(batch.advantage_BT[3, 1], weight, rtol=1e-5)


OFF_POLICY_LOSSES = {
    "ppo": ppo_policy_loss,
    "ppo dual clip": lambda *args, weight_BT: ppo_policy_loss(
        *args, dual_clip=1.1, weight_BT=weight_BT
    ),
    "ppo sequence": lambda *args, weight_BT: ppo_policy_loss(
        *args, ratio="sequence", weight_BT=weight_BT
    ),
    "cispo": cispo_loss,
    "policy gradient": lambda logp, old, *rest, weight_BT: policy_gradient_loss(
        logp, *rest, weight_BT=weight_BT
    ),
}


@pytest.mark.parametrize("loss", OFF_POLICY_LOSSES)
@pytest.mark.parametrize("off_policy", ["token", "sequence", "token_mask", "sequence_mask"])
def test_learnable_off_policy_weighs_the_terms_of_the_loss(loss, off_policy):
    """In the advantage, clipped terms are weighed like any other."""
    noise = jax.random.normal(jax.random.key(1), (3, 6, 4))
    sample = LOGP + 0.4 * noise[0]
    result = priced(roll=rollout(sample_logp_BT=sample))
    config = PlainConfig(off_policy=off_policy, off_policy_cap=1.5)
    level, _, mode = off_policy.partition("_")
    weight = importance_weights(LOGP, sample, KNOWN, level, mode or "truncate", 1.5)
    assert jnp.unique(weight).size > 3

    def value(logp, batch, factor):
        arrays = (logp, batch.old_logp_BT, batch.advantage_BT, batch.mask_BT)
        return OFF_POLICY_LOSSES[loss](*arrays, weight_BT=batch.weight_BT * factor)[0]

    plain, folded = (learnable(c, result, Credit(noise[1])) for c in (PLAIN, config))
    logp = LOGP + 0.5 * noise[2]
    wanted = jax.value_and_grad(value)(logp, plain, weight)
    assert_tree_close(jax.value_and_grad(value)(logp, folded, 1.0), wanted)


def test_spread():
    spread_BT = spread(jnp.array([2.0, jnp.nan]), jnp.array([[0, 1, 0, 1], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(spread_BT, [[0, 2, 0, 2], [0] * 4])


@pytest.mark.parametrize(
    ("changes", "kl"),
    [
        ({}, 0.00354921),
        ({"kl_estimator": "k2"}, 0.0031),
        ({"kl_in": "exact_loss"}, 0.00354921),
        ({"kl_in": "exact_loss", "kl_estimator": "k1"}, -0.006),
    ],
)
def test_penalised_is_the_sum_of_its_parts(rows, changes, kl):
    """5 + .1·KL − .01·2, all means over tokens."""
    config = replace(PlainConfig(kl_in="loss", kl_estimator="k3", entropy_coef=0.01), **changes)
    outputs = Outputs(rows.logp, jnp.where(rows.mask == 1, 2.0, jnp.nan))
    loss, metrics = penalised(
        config, jnp.float32(5), {"weight": 1.0}, outputs, batch_of(rows, config, 0.1)
    )
    np.testing.assert_allclose(loss, 5 + kl - 0.02, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl_loss"], kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], 2, rtol=1e-6)
    assert metrics["policy_loss"] == 5
    assert metrics["weight"] == 1


def test_penalised_entropy_raises_entropy(rows):
    config = PlainConfig(entropy_coef=0.01)

    def loss(entropy):
        return penalised(config, 0.0, {}, Outputs(rows.logp, entropy), batch_of(rows, config))[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones((2, 3))), -0.01 * rows.mask / 5, rtol=1e-6)


def test_penalised_coefficient_of_each_row(rows):
    config = PlainConfig(kl_in="loss", kl_estimator="k2")
    batch = replace(batch_of(rows, config), kl_coef_B=jnp.array([1.0, 10]))
    loss, _ = penalised(config, jnp.float32(0), {}, Outputs(rows.logp), batch)
    np.testing.assert_allclose(loss, (0.145 + 10 * 0.01) / 5, rtol=1e-5)


def test_penalised_without_penalties(rows):
    batch = replace(batch_of(rows, PLAIN), ref_logp_BT=None, kl_coef_B=None)
    loss, metrics = penalised(PLAIN, jnp.float32(5), {}, Outputs(rows.logp), batch)
    assert loss == 5
    assert set(metrics) == {"policy_loss"}


def test_overlong_penalty_hand_computed():
    """At most 6 tokens after a prompt of 2 columns, the last 4 of which cost."""
    for prompt in (0, 2):
        mask = jnp.arange(6) < jnp.arange(7)[:, None]
        mask = jnp.pad(mask, ((0, 0), (prompt, 0))).astype(jnp.float32)
        penalty = overlong_penalty(mask, 4)
        np.testing.assert_allclose(penalty, [0, 0, 0, 0.25, 0.5, 0.75, 1], rtol=1e-6)
        assert penalty.dtype == jnp.float32
    np.testing.assert_allclose(overlong_penalty(mask, 1), [0] * 6 + [1])


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [0] * 6),
        ({"missing_eos_penalty": 0.7}, [0, 0, 0.7, 0, 0, 0]),
        ({"overlong_buffer": 2}, [1, 0.5, 1, 0, 0.5, 0.5]),
        ({"missing_eos_penalty": 0.7, "overlong_buffer": 2}, [1, 0.5, 1.7, 0, 0.5, 0.5]),
    ],
)
def test_score_penalty(changes, wanted):
    """Lengths 3, 2, 3, 1, 2, 2 of at most 3; row 2 was cut off."""
    penalty = score_penalty(PlainConfig(**changes), rollout())
    np.testing.assert_allclose(penalty, wanted, rtol=1e-6)
    assert penalty.dtype == jnp.float32


def weights(rows, *args, **options):
    """Of the shared rows; log-ratios .1, −.5, 0 | 0, .4 and one masked column."""
    return importance_weights(rows.logp, rows.old, rows.mask, *args, **options)


@pytest.mark.parametrize(
    ("level", "mode", "cap", "wanted"),
    [
        ("token", "truncate", 2.0, [[1.1051709, 0.6065307, 1], [1, 1.4918247, 0]]),
        ("token", "truncate", 1.2, [[1.1051709, 0.6065307, 1], [1, 1.2, 0]]),
        ("token", "truncate", 0.5, [[0.5, 0.5, 0.5], [0.5, 0.5, 0]]),
        ("token", "mask", 2.0, [[1.1051709, 0.6065307, 1], [1, 1.4918247, 0]]),
        ("token", "mask", 1.2, [[1.1051709, 0, 1], [1, 0, 0]]),
        ("token", "mask", 1.0, [[0, 0, 1], [1, 0, 0]]),
        ("sequence", "truncate", 2.0, [[0.6703200] * 3, [1.4918247, 1.4918247, 0]]),
        ("sequence", "truncate", 1.2, [[0.6703200] * 3, [1.2, 1.2, 0]]),
        ("sequence", "mask", 1.495, [[0.6703200] * 3, [1.4918247, 1.4918247, 0]]),
        ("sequence", "mask", 1.49, [[0] * 3, [0] * 3]),
    ],
)
def test_importance_weights_hand_computed(rows, level, mode, cap, wanted):
    weight = weights(rows, level, mode, cap)
    np.testing.assert_allclose(weight, wanted, rtol=1e-5)
    assert weight.dtype == jnp.float32


def test_importance_weights_same_policy_is_one(rows):
    for level in ("token", "sequence"):
        for mode in ("truncate", "mask"):
            weight = importance_weights(rows.logp, rows.logp, rows.mask, level, mode)
            np.testing.assert_array_equal(weight, rows.mask)


def test_importance_weights_sequence_is_the_product_of_tokens(rows):
    """Not the geometric mean: that, to the number of tokens."""
    token = np.asarray(weights(rows, "token", cap=100.0))
    row = weights(rows, "sequence", cap=100.0)
    np.testing.assert_allclose(row[:, 0], [token[0].prod(), token[1, :2].prod()], rtol=1e-5)


def test_importance_weights_unbiased_where_nothing_is_capped():
    """E_μ[w·f] = E_π[f], over all pairs of tokens of a vocabulary of 3."""
    policy, behaviour = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (2, 3)))
    token_BT = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(3)), axis=-1).reshape(9, 2)
    f_B = jax.random.normal(jax.random.key(1), (9,))
    logp_BT, behaviour_BT = policy[token_BT], behaviour[token_BT]
    weight_BT = importance_weights(logp_BT, behaviour_BT, jnp.ones((9, 2)), "sequence", cap=1e6)
    estimate = (jnp.exp(behaviour_BT.sum(1)) * weight_BT[:, 0] * f_B).sum()
    np.testing.assert_allclose(estimate, (jnp.exp(logp_BT.sum(1)) * f_B).sum(), rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_masked_columns_are_never_read(rows, level, mode):
    wanted = weights(rows, level, mode)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        logp, old = rows.logp.at[1, 2].set(bad), rows.old.at[1, 2].set(-bad)
        np.testing.assert_array_equal(importance_weights(logp, old, rows.mask, level, mode), wanted)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_no_gradient(rows, level, mode):
    def total(logp, old):
        return (importance_weights(logp, old, rows.mask, level, mode) ** 2).sum()

    for gradient in jax.grad(total, (0, 1))(rows.logp, rows.old):
        np.testing.assert_array_equal(gradient, jnp.zeros((2, 3)))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_extreme_ratios_are_finite(level):
    logp, old = jnp.array([[0.0], [-1e5]]), jnp.array([[-1e5], [0.0]])
    mask = jnp.ones((2, 1))
    np.testing.assert_array_equal(importance_weights(logp, old, mask, level), [[2], [0]])
    np.testing.assert_array_equal(importance_weights(logp, old, mask, level, "mask"), [[0], [0]])
    free = importance_weights(logp, old, mask, level, cap=float("inf"))
    np.testing.assert_allclose(free, [[np.exp(20) * (1e5 - 19)], [0]], rtol=1e-5)


def test_importance_weights_errors(rows):
    with pytest.raises(ValueError, match="level='row': choose token or sequence"):
        weights(rows, "row")
    with pytest.raises(ValueError, match="mode='clip': choose truncate or mask"):
        weights(rows, mode="clip")
    for mode, cap in (("truncate", 0.0), ("mask", 0.9), ("truncate", float("nan"))):
        with pytest.raises(ValueError, match="cap="):
            weights(rows, mode=mode, cap=cap)
    with pytest.raises(AssertionError):
        importance_weights(rows.logp, rows.old[:, :2], rows.mask)
