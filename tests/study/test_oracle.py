"""The enumerable space against brute force; every algorithm finds the policy that is known to be
best, and bugs miss it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import ALGORITHMS, best_of_n_kl, best_of_n_logp, optimal_policy
from jaxrlhf.config import DPOConfig, GRPOConfig, OnlineDPOConfig, PPOConfig, RLOOConfig
from jaxrlhf.study.oracle import (
    EXACT,
    REGULARISED,
    SAMPLED,
    Settings,
    forward,
    kl_to,
    learn,
    learn_pairs,
    log_policy,
    make_problem,
    make_space,
    rows,
)

BETA = 0.5


@pytest.fixture(scope="module")
def problem():
    return make_problem(jax.random.key(0), BETA)


def test_make_space_holds_every_response_once():
    space = make_space()
    seen = {tuple(row[1:]) for row in np.asarray(space.token_YT).tolist()}
    assert len(seen) == len(space.token_YT) == 1 + 3 + 9 + 27
    np.testing.assert_array_equal(space.ended_Y, (np.asarray(space.token_YT)[:, 1:] == 0).any(1))
    np.testing.assert_array_equal(
        space.mask_YT.sum(1), [next((t for t, x in enumerate(row, 1) if x == 0), 3) for row in
        np.asarray(space.token_YT)[:, 1:].tolist()],
    )  # fmt: skip


def test_log_policy_is_a_distribution_and_the_product_of_choices():
    problem = make_problem(jax.random.key(3))
    logp_QY = log_policy(problem.ref, problem.space)
    np.testing.assert_allclose(jnp.exp(logp_QY).sum(1), 1, rtol=1e-5)
    logits = np.asarray(problem.ref["logits"], np.float64)
    chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.asarray(problem.space.token_YT).tolist().index([0, 2, 3, 0])
    by_hand = chance[1, 0, 2] * chance[1, 1 + 2, 3] * chance[1, 1 + 4 + 4 * 2 + 3, 0]
    np.testing.assert_allclose(jnp.exp(logp_QY[1, y]), by_hand, rtol=1e-5)


def test_forward_values_and_entropy_are_those_of_the_state():
    problem = make_problem(jax.random.key(3))
    params = {**problem.ref, "value": jnp.arange(84.0).reshape(4, 21)}
    token_BT, mask_BT = rows(problem.space, 4)
    outputs = forward(params, problem.space, token_BT, mask_BT)
    b = np.asarray(token_BT).tolist().index([2, 3, 1, 0])
    np.testing.assert_array_equal(outputs.value_BT[b], [0, 42, 42 + 1 + 3, 42 + 5 + 12 + 1])
    p = jax.nn.softmax(problem.ref["logits"][2, 4])
    np.testing.assert_allclose(outputs.entropy_BT[b, 2], -(p * jnp.log(p)).sum(), rtol=1e-5)
    assert outputs.entropy_BT[b, 0] == 0


def test_kl_to_is_zero_at_itself_only():
    problem = make_problem(jax.random.key(0))
    assert abs(kl_to(problem.ref, problem.space, log_policy(problem.ref, problem.space))) < 1e-6
    assert kl_to(problem.ref, problem.space, problem.optimum()[0]) > 0.5


def end(algorithm, problem, settings, seed=1):
    kl_I = jax.jit(learn, static_argnums=(0, 3))(
        algorithm, problem, jax.random.key(seed), settings
    ).kl_I
    assert kl_I[0] >= 0.5
    return float(kl_I[-1])


@pytest.mark.parametrize("config", REGULARISED, ids=lambda config: config.name)
def test_exact_gradients_reach_the_optimum(config, problem):
    assert end(ALGORITHMS[config.name](config), problem, EXACT) <= 1e-4


@pytest.mark.parametrize("config", REGULARISED, ids=lambda config: config.name)
def test_samples_reach_the_optimum(config, problem):
    assert end(ALGORITHMS[config.name](config), problem, SAMPLED) <= 1e-2


def broken(name):
    """PPO with one line wrong."""
    config = PPOConfig(kl_estimator="k3" if name == "k3 as a reward" else None)
    right = ALGORITHMS["ppo"](config)

    def targets(rollout, ref_logp_BT, reward_B, valid_B, coefficients, value_BT=None):
        if name == "KL sign":
            coefficients = {"kl_coef": -coefficients["kl_coef"]}
        if name == "int rewards":
            reward_B = reward_B.astype(jnp.int32)
        if name == "mask missing":  # the reference has its say on padding, the policy does not
            dead_BT = (rollout.mask_BT == 0).at[:, 0].set(False)
            ref_logp_BT = jnp.where(dead_BT, jnp.log(0.25), ref_logp_BT)
            rollout = replace(rollout, mask_BT=rollout.mask_BT + dead_BT)
        batch, metrics = right.targets(
            rollout, ref_logp_BT, reward_B, valid_B, coefficients, value_BT
        )
        if name == "one token late":
            late_BT = jnp.roll(batch.advantage_BT, 1, axis=1) * batch.mask_BT
            batch = replace(batch, advantage_BT=late_BT)
        return batch, metrics

    def loss(outputs, batch):
        total, metrics = right.loss(outputs, batch)
        if name == "k1 as a loss":
            gap_BT = outputs.logp_BT - batch.ref_logp_BT
            total += BETA * (batch.weight_BT * gap_BT * batch.mask_BT).sum()
        return total, metrics

    if name == "k1 as a loss":
        # the KL leaves the reward, the reference comes along
        exact = ALGORITHMS["ppo"](PPOConfig(kl_in="exact_loss"))

        def free(rollout, *given, **extra):
            batch, metrics = exact.targets(rollout, *given, **extra)
            return replace(batch, kl_coef_B=None), metrics

        return right._replace(targets=free, loss=loss)
    return right._replace(targets=targets, loss=loss)


@pytest.mark.parametrize(
    "bug",
    ["KL sign", "one token late", "mask missing", "int rewards", "k1 as a loss", "k3 as a reward"],
)
def test_bugs_miss_the_optimum(bug, problem):
    assert end(broken(bug), problem, EXACT) > 1e-2


def test_bugs_are_what_is_wrong(problem):
    """Without a bug the same wrapping finds it."""
    assert end(broken("none"), problem, EXACT) <= 1e-4


def test_several_updates_a_rollout_reach_the_optimum(problem):
    settings = replace(SAMPLED, epochs=4, iterations=1000)
    assert end(ALGORITHMS["ppo"](PPOConfig()), problem, settings) <= 1e-2


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_old_rollouts_reach_the_optimum_when_they_are_weighted(correction, problem):
    settings = replace(SAMPLED, lag=4)
    config = RLOOConfig(off_policy=correction, off_policy_cap=5.0)
    assert end(ALGORITHMS["rloo"](config), problem, settings) <= 1e-2


def test_grpo_as_published_has_another_optimum(problem):
    """Its reward is divided by a standard deviation and its KL is not; k3's gradient is another."""
    assert end(ALGORITHMS["grpo"](GRPOConfig()), problem, EXACT) > 1e-2


def test_kl_of_tokens_as_a_loss_leaves_out_the_future(problem):
    apart = {
        kind: end(ALGORITHMS["rloo"](RLOOConfig(kl_in=kind, kl_estimator="k2")), problem, SAMPLED)
        for kind in ("loss", "exact_loss")
    }
    assert apart["exact_loss"] <= 1e-2 < 5e-2 < apart["loss"]


def test_learn_maps_over_seeds_and_beta():
    """Sixteen runs in one call, each at its own β, reach their own optima."""
    algorithm = ALGORITHMS["grpo"](GRPOConfig(kl_in="reward"))
    beta_R = jnp.tile(jnp.array([0.4, 0.8]), 8)
    keys = jax.random.split(jax.random.key(0), 16)

    @jax.jit
    @jax.vmap
    def train(key, beta):
        problem = make_problem(jax.random.fold_in(key, 0), beta)
        return learn(
            algorithm, problem, jax.random.fold_in(key, 1), Settings(1000, samples=32)
        ).kl_I

    kl_RI = train(keys, beta_R)
    assert (kl_RI[:, 0] > 0.2).all()
    assert (kl_RI[:, -1] <= 1e-2).all()


def pairs(config, problem, goal=None, settings=EXACT):
    run = jax.jit(partial(learn_pairs, ALGORITHMS[config.name](config), settings=settings))
    return run(problem, target_QY=goal)


def test_dpo_on_exact_preferences_reaches_the_optimum(problem):
    """σ(r − r′) preferences and β make exp(r/β)."""
    kl_I = pairs(DPOConfig(beta=BETA), problem).kl_I
    assert kl_I[0] >= 0.5
    assert kl_I[-1] <= 1e-3


def test_ipo_reaches_its_own_optimum(problem):
    """π_ref·exp(P(y ≻ y′ ~ π_ref)/β) (arXiv:2310.12036), not exp(r/β)."""
    ref_QY = log_policy(problem.ref, problem.space)
    wins_QYY = jax.nn.sigmoid(problem.reward_QY[:, :, None] - problem.reward_QY[:, None])
    won_QY = jnp.einsum("qz,qyz->qy", jnp.exp(ref_QY), wins_QYY)
    goal_QY, _ = optimal_policy(ref_QY, won_QY, 0.2)
    kl_I = pairs(DPOConfig(beta=0.2, kind="ipo"), problem, goal_QY).kl_I
    assert kl_I[0] > 0.2
    assert kl_I[-1] <= 1e-3
    assert kl_to(pairs(DPOConfig(beta=0.2), problem).params, problem.space, goal_QY) > 0.1


def test_online_dpo_raises_the_reward(problem):
    algorithm = ALGORITHMS["online_dpo"](OnlineDPOConfig(beta=BETA))
    run = jax.jit(learn, static_argnums=(0, 3))
    params = run(algorithm, problem, jax.random.key(0), Settings(500, samples=8)).params
    before, after = (
        (jnp.exp(log_policy(x, problem.space)) * problem.reward_QY).sum(1).mean()
        for x in (problem.ref, params)
    )
    assert after > before + 0.5


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_best_of_n_obeys_its_law(n, problem):
    """Its KL is log n − (n − 1)/n where no response has much of the probability, else less."""
    ref_QY = log_policy(problem.ref, problem.space)
    logp_QY = best_of_n_logp(ref_QY, problem.reward_QY, n)
    np.testing.assert_allclose(jnp.exp(logp_QY).sum(1), 1, rtol=1e-5)
    kl_Q = (jnp.exp(logp_QY) * (logp_QY - ref_QY)).sum(1)
    assert (kl_Q <= best_of_n_kl(n) + 1e-5).all()
    fine_Y = jnp.full(4096, -jnp.log(4096.0))
    logp_Y = best_of_n_logp(fine_Y, jax.random.normal(jax.random.key(1), (4096,)), n)
    kl = (jnp.exp(logp_Y) * (logp_Y - fine_Y)).sum()
    np.testing.assert_allclose(kl, best_of_n_kl(n), rtol=1e-3, atol=1e-5)
