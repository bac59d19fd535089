"""A whole iteration in one jit, against the loop, which calls its programs one by one."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import runs
from runs import one_device, trained

from jaxrlhf.config import (
    CriticConfig,
    GRPOConfig,
    MeshConfig,
    PPOConfig,
    ReMaxConfig,
    RewardConfig,
)
from jaxrlhf.data.batches import order
from jaxrlhf.data.tokens import prompt_arrays
from jaxrlhf.mesh.sharding import make_mesh, put_rows
from jaxrlhf.run import loop
from jaxrlhf.run.programs import minibatch_rows
from jaxrlhf.run.setup import setup
from jaxrlhf.steps.iteration import make_iteration
from jaxrlhf.steps.score import reward

STEPS = 3
KINDS = {
    "ppo": {"algorithm": PPOConfig(minibatches=2, epochs=2, value_coef=0.5)},
    "ppo-separate": {
        "algorithm": PPOConfig(minibatches=2),
        "critic": CriticConfig(kind="separate", learning_rate=2e-3),
    },
    "grpo": {"algorithm": GRPOConfig(minibatches=1)},
    "remax": {"algorithm": ReMaxConfig(missing_eos_penalty=0.5, overlong_buffer=4)},
}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The folder of a reward model."""
    config = runs.reward_model(tmp_path_factory.mktemp("judge"), steps=2)
    loop.train(config, one_device())
    return config.output


def config_of(kind, judge, folder):
    folder.mkdir(exist_ok=True)
    return runs.ppo(folder, rewards=(RewardConfig(model=judge),), steps=STEPS, **KINDS[kind])


def fused(config, mesh):
    """As the loop trains, but each iteration in one call."""
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        (member,) = run.judge.scorers[0].members
        iteration = make_iteration(
            run.programs,
            lambda params, rollout: reward(
                member.network.model, params, rollout.token_BT, rollout.attention_mask_BT
            ),
            run.algorithm.needs,
        )
        states, metrics, tokens, count = run.states, [], [], config.data.batch_size
        for step in range(config.steps):
            picked = order(len(run.train_rows), count, config.seed, step)
            rows = [run.train_rows.items[i] for i in picked]
            arrays = prompt_arrays(rows, config.data.max_prompt_tokens, run.config.sample.pad)
            updates = [
                row_M
                for epoch in range(config.algorithm.epochs)
                for row_M in minibatch_rows(config, count * config.sample.n, step, epoch)
            ]
            found = iteration(
                states,
                run.frozen,
                run.reference.params,
                member.network.params,
                *put_rows(arrays, mesh),
                jax.random.fold_in(jax.random.key(config.seed), step),
                np.stack(updates),
                {"kl_coef": np.float32(config.algorithm.kl_coef)},
            )
            states = found.states
            metrics.append(jax.device_get(found.metrics))
            tokens.append(np.array(found.rollout.token_BT))
    return jax.device_get(states), metrics, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_make_iteration_learns_as_the_loop(kind, judge, tmp_path):
    config = config_of(kind, judge, tmp_path)
    whole, lines = trained(config)
    states, metrics, _ = fused(config, one_device())
    logged = [line for line in lines if "kl" in line]
    assert len(logged) == len(metrics) == STEPS
    for line, found in zip(logged, metrics, strict=True):
        assert line["length"] == pytest.approx(float(found["length"]), abs=1e-6)
        assert line["loss"] == pytest.approx(float(np.mean(found["loss"])), rel=1e-4, abs=1e-6)
    assert set(whole) == set(states)
    for name in whole:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6),
            whole[name].params,
            states[name].params,
        )
    updates = STEPS * config.algorithm.epochs * config.algorithm.minibatches
    assert {int(state.step) for state in states.values()} == {updates}


def test_make_iteration_on_a_mesh(judge, tmp_path):
    """Rows and weights split over eight devices: the same draws, the same parameters."""
    config = config_of("ppo", judge, tmp_path)
    config = replace(config, optim=replace(config.optim, eps=1e-3))  # rounding stays rounding
    alone, _, drawn = fused(config, one_device())
    many, _, others = fused(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_array_equal(drawn, others)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        alone["policy"].params,
        many["policy"].params,
    )


def test_make_iteration_leaves_rows_without_a_reward_out(judge, tmp_path):
    """With no reward at all nothing is learnt; the states are donated all the same."""
    config = replace(config_of("grpo", judge, tmp_path), steps=1)
    mesh = one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        never = make_iteration(
            run.programs, lambda nan, rollout: nan + rollout.logp_BT[:, 0], run.algorithm.needs
        )
        before = jax.tree.map(lambda x: np.array(x), run.states["policy"].params)  # no views
        rows = [run.train_rows.items[i] for i in range(8)]
        arrays = prompt_arrays(rows, config.data.max_prompt_tokens, run.config.sample.pad)
        found = never(
            run.states,
            run.frozen,
            run.reference.params,
            np.float32("nan"),
            *put_rows(arrays, mesh),
            jax.random.key(0),
            np.arange(16)[None],
            {"kl_coef": np.float32(0.0)},
        )
    assert np.isnan(found.reward_B).all()
    after = jax.device_get(found.states["policy"].params)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert all(x.is_deleted() for x in jax.tree.leaves(run.states))
