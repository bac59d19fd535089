"""What a run that goes on holds, starts and says of its beginning."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.config import EvalConfig, IsolateConfig, LoraConfig, MeshConfig, RewardConfig
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import Loader
from jaxrlhf.rewards.isolation import Isolated
from jaxrlhf.run import loop
from jaxrlhf.run.session import Session
from jaxrlhf.run.setup import setup

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def with_lora(config):
    return replace(config, model=replace(config.model, lora=LoraConfig(rank=2, alpha=4)))


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_holds_one_state(lora, tmp_path):
    config = runs.ppo(tmp_path, steps=2, critic=runs.SEPARATE)
    config = with_lora(config) if lora else config
    loop.train(replace(config, steps=1), MESH)
    with jax.set_mesh(MESH):
        run = setup(config, MESH)
        fresh = jax.tree.leaves(run.states)
        assert not any(x.is_deleted() for x in fresh)
        with Session(run) as session:
            assert session.start == 1
            assert all(x.is_deleted() for x in fresh)
            loop.iterate(run, session, 1)  # nobody else wanted them


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward_model"])
def test_what_a_run_from_rows_was_before_is_measured_late(kind, tmp_path):
    def configured(name, steps, measured):
        config = runs.of(kind, tmp_path, steps=steps)
        rows = config.data.train if measured else ""
        return replace(config, data=replace(config.data, eval=rows), output=str(tmp_path / name))

    whole = loop.train(configured("whole", 3, True), MESH)
    loop.train(configured("late", 2, False), MESH)
    late = loop.train(configured("late", 3, True), MESH)
    for name in whole:
        if name.endswith(("_before", "_after")) and isinstance(whole[name], float):
            assert late[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7), name
    assert abs(whole["loss_before"] - whole["loss_after"]) > 1e-3


def test_start_of_a_reward_model_is_its_random_head(tmp_path):
    with jax.set_mesh(MESH):
        run = setup(runs.reward_model(tmp_path), MESH)
        first = jax.device_get(run.states["policy"].params)
        jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(loop.start_of(run)))
    assert np.abs(first["head"]["kernel"]).max() > 0


def test_trained_weights_are_all_that_is_read(tmp_path):
    config = runs.reward_model(tmp_path, steps=1)
    loop.train(config, MESH)
    loader = Loader(MESH)
    loader.trained(config.output)
    assert loader.weights == {}

    lora = with_lora(replace(config, output=str(tmp_path / "lora")))
    loop.train(lora, MESH)
    loader.trained(lora.output)
    assert len(loader.weights) == 1


def test_isolated_functions_are_started_once(tmp_path, monkeypatch):
    made = []
    init = Isolated.__init__
    monkeypatch.setattr(
        Isolated, "__init__", lambda self, config: (made.append(config), init(self, config))[1]
    )
    isolated = RewardConfig(function="jaxrlhf.data.words:goodness", isolate=IsolateConfig())
    config = runs.ppo(tmp_path, rewards=(isolated,), eval=EvalConfig(gold=(isolated,)))
    config = replace(config, data=replace(config.data, eval=config.data.train))
    with jax.set_mesh(MESH):
        run = setup(config, MESH)
    assert len(made) == 2  # one that is learnt from, one for the gold measure
    assert run.judge is not None
    assert isinstance(run.judge.sources[0].ask, Isolated)
