"""What every algorithm that samples has in common; first by hand, then for all of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import (
    BASELINE,
    KL,
    LOGP,
    MASK,
    POLICIES,
    REF,
    RETURNS,
    REWARD,
    VALID,
    VALUE,
    batch_of,
    group_of,
    rollout,
    targets,
)

from jaxrlhf.algorithms import (
    ALGORITHMS,
    cispo_loss,
    importance_weights,
    policy_gradient_loss,
    ppo_policy_loss,
)
from jaxrlhf.algorithms.on_policy import (
    critic_loss,
    groups,
    learnable,
    needs,
    penalised,
    price,
    spread,
    to_go,
)
from jaxrlhf.config import (
    Config,
    DataConfig,
    ModelConfig,
    OnlineDPOConfig,
    RewardConfig,
    SampleConfig,
    check,
)
from jaxrlhf.config.algorithms import OnPolicyConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Batch, Outputs

PLAIN = OnPolicyConfig()
KNOWN = MASK.at[4].set(0)
"""1 on the tokens of rows whose reward is known."""

ALL = pytest.mark.parametrize("name", sorted(POLICIES))
SAMPLED = pytest.mark.parametrize("name", [*sorted(POLICIES), "online_dpo"])
BAD = (jnp.nan, jnp.inf, -jnp.inf)


def priced(config=PLAIN, roll=None, ref=REF, reward=REWARD, valid=VALID, beta=0.1):
    roll = rollout() if roll is None else roll
    return price(config, roll, ref, reward, valid, {"kl_coef": jnp.float32(beta)})


def config_of(name):
    return OnlineDPOConfig() if name == "online_dpo" else POLICIES[name]


def run_of(algorithm):
    """A run of it that ``check`` has nothing else to say about."""
    return Config(
        algorithm=algorithm,
        model=ModelConfig(path="smollm2"),
        rewards=(RewardConfig(function="sentiment"),),
        data=DataConfig(train="prompts.jsonl"),
        sample=SampleConfig(n=2),
    )


def whole(name, **changes):
    """An algorithm with every term in its loss."""
    changes = {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1, **changes}
    return replace(POLICIES[name], **changes)


def outputs_of(seed=0):
    """Of a policy that has moved a little since it sampled."""
    noise = 0.3 * jax.random.normal(jax.random.key(seed), (3, 6, 4))
    return Outputs(LOGP + noise[0], jnp.exp(noise[1]), VALUE + noise[2])


def total(config, outputs, batch):
    """Policy loss and value loss, if it has one, and their metrics."""
    algorithm = ALGORITHMS[config.name](config)
    value, metrics = algorithm.loss(outputs, batch)
    if algorithm.value_loss is not None:
        more, other = algorithm.value_loss(outputs, batch)
        value, metrics = value + more, {**metrics, **other}
    return value, metrics


def assert_tree_close(left, right, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def columns(tree, change):
    """Every [B, T] array of a tree through ``change``."""
    return jax.tree.map(lambda x: change(x) if x.ndim == 2 else x, tree)


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
    result = priced(OnPolicyConfig(kl_in=kl_in, kl_estimator="k3"))
    np.testing.assert_allclose(result.returns(), [2, 1, 1.2, 0.5, 0, 3], rtol=1e-6)
    assert result.metrics["kl_reward"] == 0
    np.testing.assert_allclose(result.metrics["kl"], 0.1, rtol=1e-5)
    assert result.kl_coef == jnp.float32(0.1)


@pytest.mark.parametrize(
    ("kind", "of_one", "of_minus_one"), [("k2", 0.5, 0.5), ("k3", np.exp(-1), np.e - 2)]
)
def test_price_kl_estimator(kind, of_one, of_minus_one):
    result = priced(OnPolicyConfig(kl_estimator=kind))
    np.testing.assert_allclose(result.reward_BT[3, 1], 0.5 - 0.1 * of_one, rtol=1e-5)
    np.testing.assert_allclose(result.reward_BT[1, 1], -0.1 * of_minus_one, rtol=1e-5)
    np.testing.assert_allclose(result.metrics["kl"], 0.1, rtol=1e-5)  # always k1


def test_price_missing_eos_penalty():
    """On the last token of the response that was cut off."""
    plain, result = priced(), priced(OnPolicyConfig(missing_eos_penalty=0.7))
    difference = np.zeros((6, 4))
    difference[2, 3] = 0.7
    np.testing.assert_allclose(plain.reward_BT - result.reward_BT, difference, atol=1e-6)
    assert result.metrics["score"] == plain.metrics["score"]
    reward = plain.metrics["reward"] - result.metrics["reward"]
    np.testing.assert_allclose(reward, 0.7 / 5, rtol=1e-4)


def test_price_overlong_penalty():
    """Up to 3 tokens, of which the last 2 cost: lengths 3, 2, 3, 1, (2), 2."""
    plain, result = priced(), priced(OnPolicyConfig(overlong_buffer=2))
    difference = plain.returns() - result.returns()
    np.testing.assert_allclose(difference, [1, 0.5, 1, 0, 0, 0.5], atol=1e-6)
    last = (plain.reward_BT - result.reward_BT)[jnp.arange(6), jnp.array([3, 2, 3, 1, 2, 2])]
    np.testing.assert_allclose(last, difference, atol=1e-6)


def test_price_penalties_add():
    result = priced(OnPolicyConfig(overlong_buffer=2, missing_eos_penalty=0.7), beta=0.0)
    np.testing.assert_allclose(result.returns(), [1, 0.5, -0.5, 0.5, 0, 2.5], atol=1e-6)


@pytest.mark.parametrize("reward", [9.0, *BAD])
def test_price_unknown_reward(reward):
    """A row is out if it is said to be or its reward is not finite, and is then never read."""
    wanted = priced()
    roll = rollout(logp_BT=LOGP.at[4].set(jnp.nan), sample_logp_BT=LOGP.at[4].set(jnp.inf))
    valid = VALID.at[4].set(bool(jnp.isnan(reward)))
    result = priced(
        roll=roll, ref=REF.at[4].set(jnp.nan), reward=REWARD.at[4].set(reward), valid=valid
    )
    assert_tree_close(result[1:], wanted[1:], rtol=1e-6)
    assert (result.reward_BT[4] == 0).all()


@pytest.mark.parametrize("reward", BAD)
def test_price_reward_that_is_not_finite_is_unknown(reward):
    result = priced(reward=REWARD.at[4].set(reward), valid=jnp.ones(6, bool))
    assert_tree_close(result[1:], priced()[1:], rtol=1e-6)


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


def test_price_sample_ratio():
    """exp(logp − sample_logp): 2 on one of 11 tokens."""
    roll = rollout(sample_logp_BT=LOGP.at[3, 1].add(-jnp.log(2)))
    np.testing.assert_allclose(priced(roll=roll).metrics["sample_ratio"], 12 / 11, rtol=1e-6)


def test_price_sample_gap():
    """|logp − sample_logp|: log 2 up on one of 11 tokens and down on another."""
    gap = LOGP.at[3, 1].add(-jnp.log(2)).at[0, 1].add(jnp.log(2))
    metrics = priced(roll=rollout(sample_logp_BT=gap)).metrics
    np.testing.assert_allclose(metrics["sample_gap"], 2 * np.log(2) / 11, rtol=1e-6)


def test_learnable_hand_computed():
    advantage = jnp.arange(24.0).reshape(6, 4) + 1
    result = priced()
    batch = learnable(PLAIN, result, advantage, advantage + 1, advantage + 2)
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
    batch = learnable(OnPolicyConfig(kl_in=kl_in), priced(beta=0.3), jnp.ones((6, 4)))
    if kl_in == "reward":
        assert batch.ref_logp_BT is None
        assert batch.kl_coef_B is None
    else:
        np.testing.assert_array_equal(batch.ref_logp_BT, REF * KNOWN)
        np.testing.assert_array_equal(batch.kl_coef_B, jnp.full(6, 0.3))


def test_learnable_aggregation():
    advantage = jnp.ones((6, 4))
    weight_BT = learnable(OnPolicyConfig(aggregation="sequence"), priced(), advantage).weight_BT
    np.testing.assert_allclose(weight_BT, KNOWN / (5 * MASK.sum(1, keepdims=True)), rtol=1e-6)
    config = OnPolicyConfig(aggregation="fixed", length=7)
    np.testing.assert_allclose(
        learnable(config, priced(), advantage).weight_BT, KNOWN / 35, rtol=1e-6
    )


def test_learnable_mask_truncated():
    batch = learnable(OnPolicyConfig(mask_truncated=True), priced(), jnp.ones((6, 4)))
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
        batch = learnable(OnPolicyConfig(off_policy=off_policy), result, jnp.full((6, 4), 3.0))
        np.testing.assert_allclose(batch.advantage_BT[1], row1, rtol=1e-5)
        np.testing.assert_allclose(batch.advantage_BT[3], [0, row3, 0, 0], rtol=1e-5)
        np.testing.assert_array_equal(batch.advantage_BT[0], [0, 3, 3, 3])
        assert (batch.advantage_BT[4] == 0).all()
        np.testing.assert_allclose(batch.weight_BT, KNOWN / 11, rtol=1e-6)  # never in here


def test_learnable_off_policy_cap():
    sample = LOGP.at[3, 1].add(-jnp.log(4))
    for cap, weight in ((3.0, 3), (5.0, 4)):
        config = OnPolicyConfig(off_policy="token", off_policy_cap=cap)
        batch = learnable(config, priced(roll=rollout(sample_logp_BT=sample)), jnp.ones((6, 4)))
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
    config = OnPolicyConfig(off_policy=off_policy, off_policy_cap=1.5)
    level, _, mode = off_policy.partition("_")
    weight = importance_weights(LOGP, sample, KNOWN, level, mode or "truncate", 1.5)
    assert jnp.unique(weight).size > 3

    def value(logp, batch, factor):
        arrays = (logp, batch.old_logp_BT, batch.advantage_BT, batch.mask_BT)
        return OFF_POLICY_LOSSES[loss](*arrays, weight_BT=batch.weight_BT * factor)[0]

    plain, folded = (learnable(c, result, noise[1]) for c in (PLAIN, config))
    logp = LOGP + 0.5 * noise[2]
    wanted = jax.value_and_grad(value)(logp, plain, weight)
    assert_tree_close(jax.value_and_grad(value)(logp, folded, 1.0), wanted)


def test_spread():
    spread_BT = spread(jnp.array([2.0, jnp.nan]), jnp.array([[0, 1, 0, 1], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(spread_BT, [[0, 2, 0, 2], [0] * 4])


def test_groups_are_consecutive_rows():
    np.testing.assert_array_equal(groups(jnp.arange(6), rollout()), [[0, 1, 2], [3, 4, 5]])


def test_groups_of_one():
    with pytest.raises(ValueError, match=r"sample\.n=1: a group needs at least 2"):
        groups(jnp.arange(6), rollout(n=1))


def test_to_go_hand_computed():
    """γ = ½; the gap in row 1 costs no discount, and what it holds is not read."""
    reward = jnp.array([[9.0, 1, 2, 4], [9, 1, jnp.nan, 4], [jnp.inf] * 4])
    mask = jnp.array([[0, 1, 1, 1], [0, 1, 0, 1], [0] * 4])
    wanted = [[0, 7, 6, 4], [0, 5, 0, 4], [0] * 4]
    np.testing.assert_array_equal(to_go(reward, mask), wanted)
    wanted = [[0, 3, 4, 4], [0, 3, 0, 4], [0] * 4]
    np.testing.assert_array_equal(to_go(reward, mask, 0.5), wanted)


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
    config = replace(OnPolicyConfig(kl_in="loss", kl_estimator="k3", entropy_coef=0.01), **changes)
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
    config = OnPolicyConfig(entropy_coef=0.01)

    def loss(entropy):
        return penalised(config, 0.0, {}, Outputs(rows.logp, entropy), batch_of(rows, config))[0]

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones((2, 3))), -0.01 * rows.mask / 5, rtol=1e-6)


def test_penalised_exact_loss_gradient(rows):
    """β·w·ρ·Σ d: of row 0, Σ d is −.3 and ρ e^.1, e^−.5, 1; of row 1 they are 0."""
    config = OnPolicyConfig(kl_in="exact_loss")

    def loss(logp):
        return penalised(config, 0.0, {}, Outputs(logp), batch_of(rows, config, 0.1))[0]

    wanted = [[-0.006 * x for x in (1.1051709, 0.6065307, 1)], [0] * 3]
    np.testing.assert_allclose(jax.grad(loss)(rows.logp), wanted, atol=1e-7)


def test_penalised_coefficient_of_each_row(rows):
    config = OnPolicyConfig(kl_in="loss", kl_estimator="k2")
    batch = replace(batch_of(rows, config), kl_coef_B=jnp.array([1.0, 10]))
    loss, _ = penalised(config, jnp.float32(0), {}, Outputs(rows.logp), batch)
    np.testing.assert_allclose(loss, (0.145 + 10 * 0.01) / 5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"mask_truncated": True}, {"aggregation": "sequence"}])
def test_online_dpo_settings_are_read_or_refused(changes):
    config = OnlineDPOConfig(**changes)
    batch, _ = targets(config, reward=REWARD.at[2].set(9))  # the truncated row is the best
    plain, _ = targets(OnlineDPOConfig(), reward=REWARD.at[2].set(9))
    if all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (batch, plain)), strict=True)):
        with pytest.raises(InputError):
            check(run_of(config))


def test_penalised_without_penalties(rows):
    batch = replace(batch_of(rows, PLAIN), ref_logp_BT=None, kl_coef_B=None)
    loss, metrics = penalised(PLAIN, jnp.float32(5), {}, Outputs(rows.logp), batch)
    assert loss == 5
    assert set(metrics) == {"policy_loss"}


@pytest.mark.parametrize(("clip", "wanted"), [(None, 0.5), (0.2, 0.75875)])
def test_critic_loss_hand_computed(clip, wanted):
    """Errors −1 and 1, clipped 1.3 and 1, under weights ¾ and ¼."""
    zero = jnp.zeros((1, 2))
    batch = Batch(
        token_BT=zero,
        attention_mask_BT=zero,
        mask_BT=zero + 1,
        old_logp_BT=zero,
        advantage_BT=zero,
        weight_BT=jnp.array([[0.75, 0.25]]),
        return_BT=jnp.array([[0.0, 3]]),
        old_value_BT=jnp.array([[1.5, 2]]),
    )
    loss, metrics = critic_loss(Outputs(zero, value_BT=jnp.array([[1.0, 2]])), batch, clip)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert metrics["value_loss"] == loss
    np.testing.assert_allclose(metrics["value_clip_fraction"], 0 if clip is None else 0.75)


def test_needs():
    assert needs(PLAIN) == {"reference"}
    assert needs(PLAIN, "value") == {"reference", "value"}
    assert needs(OnPolicyConfig(entropy_coef=0.1)) == {"reference", "entropy"}


@SAMPLED
def test_record(name):
    """Only critics have a value loss; ReMax asks for the greedy response."""
    algorithm = ALGORITHMS[name](config_of(name))
    critic = name in ("ppo", "a2c")
    extra = {"value"} if critic else {"greedy"} if name == "remax" else set()
    assert algorithm.needs == {"reference", *extra}
    assert (algorithm.value_loss is not None) == critic
    assert algorithm.reads == ("pairs" if name == "online_dpo" else "outputs")
    if name != "online_dpo":
        assert ALGORITHMS[name](whole(name)).needs == {"reference", "entropy", *extra}


@SAMPLED
def test_targets_no_gradient(name):
    """Whatever the old policy, the reference, the rewards or the critic hold is a number."""

    def numbers(logp, ref, reward, value):
        roll = rollout(logp_BT=logp, sample_logp_BT=logp, value_BT=value)
        result = targets(config_of(name), roll, ref, reward)
        floats = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((x**2).sum() for x in floats)

    arguments = (LOGP, REF, REWARD, VALUE)
    for gradient in jax.grad(numbers, range(4))(*arguments):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


@ALL
def test_targets_unknown_rewards_are_finite(name):
    """One row without, with numbers that are none in it; then all rows without."""
    config = whole(name, mask_truncated=True, off_policy="token")
    roll = rollout(logp_BT=LOGP.at[4].set(jnp.nan), value_BT=VALUE.at[4].set(jnp.inf))
    wanted = targets(config)
    result = targets(config, roll, REF.at[4].set(jnp.nan))
    assert_tree_close(result, wanted)
    nothing, metrics = targets(config, valid=jnp.zeros(6, bool))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((nothing, metrics)))
    assert (nothing.weight_BT == 0).all()
    loss, gradient = jax.value_and_grad(lambda o: total(config, o, nothing)[0])(outputs_of())
    assert loss == 0
    assert all((x == 0).all() for x in jax.tree.leaves(gradient))


@ALL
@pytest.mark.parametrize("kl_in", ["reward", "loss", "exact_loss"])
def test_targets_padding_changes_nothing(name, kl_in):
    """One column on the left and two on the right, of whatever they hold."""
    config = replace(whole(name, kl_in=kl_in), off_policy="sequence", length=3)

    def pad(x):
        bad = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 9
        return jnp.pad(x, ((0, 0), (1, 2)), constant_values=bad)

    clean, roll = rollout(), columns(rollout(), pad)
    zeros = {
        k: jnp.pad(getattr(clean, k), ((0, 0), (1, 2))) for k in ("mask_BT", "attention_mask_BT")
    }
    wanted, metrics = targets(config, clean)
    batch, same = targets(config, replace(roll, **zeros), pad(REF))
    assert_tree_close(same, metrics)
    assert_tree_close(
        columns(batch, lambda x: x[:, 1:-2]), replace(wanted, token_BT=batch.token_BT[:, 1:-2])
    )
    for array in (batch.mask_BT, batch.weight_BT, batch.advantage_BT):
        assert (array[:, [0, -2, -1]] == 0).all()
    loss = total(config, columns(outputs_of(), pad), batch)
    assert_tree_close(loss, total(config, outputs_of(), wanted))


@SAMPLED
@pytest.mark.parametrize(
    "row_B", [[3, 4, 5, 0, 1, 2], [2, 0, 1, 5, 3, 4]], ids=["prompts", "samples"]
)
def test_targets_permuted(name, row_B):
    """Prompts, and the samples of a prompt, in another order: the same for each row."""
    row_B = jnp.array(row_B)
    config = config_of(name)
    batch, metrics = targets(config)
    roll = jax.tree.map(lambda x: x[row_B], rollout())
    more = {"baseline_B": BASELINE[row_B]} if name == "remax" else {}
    moved, same = targets(config, roll, REF[row_B], REWARD[row_B], VALID[row_B], **more)
    assert_tree_close(same, metrics)
    if name == "online_dpo":  # its rows are prompts
        row_B = row_B[::3] // 3
    assert_tree_close(moved, jax.tree.map(lambda x: x[row_B], batch))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("rloo", [[1, -1, 0, 0], [0.5, 0, -1, 0.5]]),
        ("dr_grpo", [[0.5, -0.5, 0, 0], [1 / 3, 0, -2 / 3, 1 / 3]]),
        *((n, [[0.7071, -0.7071, 0, 0], [0.5773, 0, -1.1547, 0.5773]])
          for n in ("grpo", "dapo", "gspo", "cispo")),
    ],
)  # fmt: skip
def test_targets_of_groups(name, wanted):
    """Prompts A, A, B, B with rewards 1, 0, 1, 1; then one prompt, a reward of which is unknown."""
    roll, ref, reward, valid = group_of([1.0, 0, 1, 1])
    batch, _ = targets(POLICIES[name], replace(roll, n=2), ref, reward, valid)
    np.testing.assert_allclose(batch.advantage_BT, np.transpose([wanted[0]] * 2), atol=1e-4)
    reward, row = jnp.array([1, jnp.nan, 0, 1]), jnp.array([1, 0, 1, 1])
    batch, metrics = targets(POLICIES[name], roll, ref, reward, valid)
    np.testing.assert_allclose(batch.advantage_BT, np.transpose([wanted[1]] * 2), atol=1e-4)
    np.testing.assert_array_equal(batch.mask_BT, np.transpose([row] * 2))
    assert metrics["valid"] == 0.75


@ALL
@pytest.mark.parametrize("kl_in", ["loss", "exact_loss"])
def test_loss_no_gradient_into_the_batch(name, kl_in):
    """Exactly 0 for old log-probs, reference, advantages, returns and old values."""
    config = whole(name, kl_in=kl_in)
    batch, _ = targets(config)
    fields = ["old_logp_BT", "ref_logp_BT", "advantage_BT"]
    fields += ["return_BT", "old_value_BT"] if name in ("ppo", "a2c") else []

    def value(arrays):
        return total(config, outputs_of(), replace(batch, **arrays))[0]

    for gradient in jax.grad(value)({name: getattr(batch, name) for name in fields}).values():
        np.testing.assert_array_equal(gradient, jnp.zeros((6, 4)))


@ALL
@pytest.mark.parametrize("kl_in", ["loss", "exact_loss"])
def test_loss_columns_under_the_mask_are_never_read(name, kl_in):
    """NaN and infinities there, in what the model says and in the batch: not a bit changes."""
    config = whole(name, kl_in=kl_in)
    batch, _ = targets(config)
    floats = ("old_logp_BT", "ref_logp_BT", "advantage_BT", "return_BT", "old_value_BT")

    def both(outputs, batch):
        def value(outputs):
            return total(config, outputs, batch)

        return jax.value_and_grad(value, has_aux=True)(outputs)

    wanted = both(outputs_of(), batch)
    for bad in BAD:

        def spoil(x, bad=bad):
            return None if x is None else jnp.where(batch.mask_BT == 1, x, bad)

        outputs = jax.tree.map(spoil, outputs_of())
        spoilt = replace(batch, **{field: spoil(getattr(batch, field)) for field in floats})
        jax.tree.map(np.testing.assert_array_equal, both(outputs, spoilt), wanted)
    for gradient in jax.tree.leaves(wanted[1]):
        assert (gradient[batch.mask_BT == 0] == 0).all()


@ALL
@pytest.mark.parametrize("kl_in", ["loss", "exact_loss"])
def test_loss_microbatches_add_up(name, kl_in):
    """Rows under the weights of the whole: losses, metrics and gradients."""
    config = whole(name, kl_in=kl_in)
    batch, _ = targets(config)

    def both(rows):
        outputs, part = jax.tree.map(lambda x: x[rows], (outputs_of(), batch))
        return jax.value_and_grad(lambda o: total(config, o, part), has_aux=True)(outputs)

    (wanted, metrics), gradient = both(slice(None))
    parts, gradients = zip(*map(both, (slice(1), slice(1, 4), slice(4, 6))), strict=True)
    np.testing.assert_allclose(sum(part[0] for part in parts), wanted, rtol=1e-5, atol=1e-6)
    for key, value in metrics.items():
        join = max if key.endswith("_max") else sum
        np.testing.assert_allclose(join(p[1][key] for p in parts), value, rtol=1e-5, atol=1e-6)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *gradients)
    assert_tree_close(joined, gradient)
