"""Schedules follow the steps of the state that they drive: what is planned, not what was taken."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import one_device, trained

from jaxrlhf.config import CheckpointConfig, MeshConfig, OptimConfig, PPOConfig
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.run import loop
from jaxrlhf.run.programs import on_schedule
from jaxrlhf.run.session import Session
from jaxrlhf.run.setup import setup
from jaxrlhf.steps import update

PEAK = 1e-3
LINEAR = OptimConfig(learning_rate=PEAK, schedule="linear")


def rates(config, mesh=None):
    """The rate of every update of a run, as shares of PEAK: the policy's, and the critic's."""
    mesh = mesh or one_device()
    found = {"policy": [], "critic": []}

    def heard(who, program):
        def call(*args):
            state, metrics = program(*args)
            found[who].append(float(metrics["learning_rate"]) / PEAK)
            return state, metrics

        return program and call

    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        who = {"update": "policy", "warmup": "policy", "critic_update": "critic"}
        heard_of = {n: heard(w, getattr(run.programs, n)) for n, w in who.items()}
        run = replace(run, programs=replace(run.programs, **heard_of))
        session = Session(run)
        session.host["kl_coef"] = 0.05
        for step in range(config.steps):
            session.states, *_ = loop.iterate(run, session, step)
    return found


def halved(folder, **changes):
    """Four iterations of two updates each."""
    algorithm = PPOConfig(epochs=1, minibatches=2)
    return runs.ppo(folder, **{"algorithm": algorithm, "optim": LINEAR, **changes})


def separate(**changes):
    return replace(runs.SEPARATE, learning_rate=None, **changes)


def test_a_policy_that_waits_for_its_critic_has_a_whole_schedule_of_its_own(tmp_path):
    """Two of four iterations: the policy's four updates and the critic's eight both end near 0."""
    found = rates(halved(tmp_path, critic=separate(warmup=2)))
    np.testing.assert_allclose(found["policy"], [1, 3 / 4, 2 / 4, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(found["critic"], [1 - t / 8 for t in range(8)], rtol=1e-6)


def test_a_policy_that_waits_for_its_critic_rises_over_its_own_steps(tmp_path):
    config = halved(tmp_path, critic=separate(warmup=2), optim=replace(LINEAR, warmup=2))
    found = rates(config)
    np.testing.assert_allclose(found["policy"], [1 / 2, 1, 1, 1 / 2], rtol=1e-6)
    rise = [1 / 2, 1, *(1 - t / 6 for t in range(6))]
    np.testing.assert_allclose(found["critic"], rise, rtol=1e-6)


def test_a_shared_head_warms_up_by_the_first_steps_of_the_policy(tmp_path):
    config = halved(tmp_path)
    algorithm = replace(config.algorithm, value_coef=0.5)
    found = rates(replace(config, critic=replace(config.critic, warmup=2), algorithm=algorithm))
    np.testing.assert_allclose(found["policy"], [1 - t / 8 for t in range(8)], rtol=1e-6)


def test_updates_that_an_early_stop_leaves_out_count_as_taken(tmp_path, monkeypatch):
    """One of four updates is taken in each of four iterations: the last at 4/16, and not 13/16."""
    monkeypatch.setattr(loop, "_apart", lambda metrics: 1.0)
    algorithm = PPOConfig(epochs=2, minibatches=2, target_kl=0.5)
    found = rates(halved(tmp_path, algorithm=algorithm, critic=separate()))
    for who in ("policy", "critic"):
        np.testing.assert_allclose(found[who], [1, 12 / 16, 8 / 16, 4 / 16], rtol=1e-6)


def never(make):
    """The losses that ``make`` makes, none of them a number."""

    def broken(*args, **kwargs):
        inner = make(*args, **kwargs)

        def loss(params, frozen, batch):
            value, metrics = inner(params, frozen, batch)
            return value * jnp.nan, metrics

        return loss

    return broken


def test_updates_that_are_skipped_count_as_taken(tmp_path, monkeypatch):
    """An iteration starts at its planned rate, and stays there while updates are skipped."""
    monkeypatch.setattr("jaxrlhf.run.programs.policy_loss", never(update.policy_loss))
    found = rates(halved(tmp_path))["policy"]
    np.testing.assert_allclose(found, np.repeat([1, 6 / 8, 4 / 8, 2 / 8], 2), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rows_that_are_skipped_count_as_taken(schedule, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.run.programs.sft_loss", never(update.sft_loss))
    optim = replace(LINEAR, schedule=schedule)
    states, log = trained(runs.sft(tmp_path, optim=optim))
    found = [line["learning_rate"] / PEAK for line in log]
    share = [t / 4 for t in range(4)]
    expected = {
        "linear": [1 - u for u in share],
        "cosine": [(1 + np.cos(np.pi * u)) / 2 for u in share],
    }
    np.testing.assert_allclose(found, expected[schedule], rtol=1e-6)
    assert states["policy"].step == 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_run_that_stops_early_resumes_bit_equal(critic, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_apart", lambda metrics: 1.0)
    algorithm = PPOConfig(minibatches=2, target_kl=0.5)

    def config(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        own = separate(warmup=1) if critic == "separate" else runs.ppo(folder).critic
        return runs.ppo(folder, algorithm=algorithm, optim=LINEAR, critic=own)

    whole, log = trained(config("a"))
    runs.interrupt(config("b"), 2)
    resumed, other = trained(config("b"))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    names = [n for n in ("learning_rate", "critic/learning_rate") if n in log[-1]]
    assert len(names) == 1 + (critic == "separate")
    assert [[x.get(n) for n in names] for x in log] == [[x.get(n) for n in names] for x in other]


def test_positions_compile_nothing_anew_on_any_mesh(tmp_path, monkeypatch, caplog):
    """Early stops move a schedule at the start of each iteration, sharded states or not."""
    monkeypatch.setattr(loop, "_apart", lambda metrics: 1.0)
    algorithm = PPOConfig(minibatches=2, target_kl=0.5)
    sizes, none = MeshConfig(2, 2, 2), CheckpointConfig(every=0)
    config = halved(tmp_path, algorithm=algorithm, critic=separate(), mesh=sizes, checkpoint=none)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        session = Session(run)
        session.host["kl_coef"] = 0.05
        layout = jax.tree.map(lambda x: x.sharding, session.states)
        moved = on_schedule(config, session.states, 3)
        assert jax.tree.map(lambda x: x.sharding, moved) == layout
        with jax.log_compiles():
            for step in range(3):
                caplog.clear()
                session.states, *_ = loop.iterate(run, session, step)
                assert ("Compiling" in caplog.text) == (step == 0)
