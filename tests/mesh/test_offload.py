"""Frozen weights in host memory: the same run, and less on the devices in between."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.config import MeshConfig, ReferenceConfig, RewardConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh import sharding as offload
from jaxrlhf.mesh.sharding import at_hand, make_mesh, on_host, row_layout, to_host
from jaxrlhf.run import loop
from jaxrlhf.run.setup import setup

MESH = MeshConfig(2, 2, 2)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MESH)


def test_to_host_and_at_hand_keep_every_bit_and_the_layout(mesh):
    there = jax.device_put(np.arange(16.0), row_layout(mesh))
    away = to_host({"x": there}, mesh, "f")
    back = at_hand(away)["x"]
    assert (on_host(there), on_host(away["x"]), on_host(back)) == (False, True, False)
    assert back.sharding == there.sharding
    np.testing.assert_array_equal(back, there)
    assert at_hand({"x": there})["x"] is there


def test_to_host_of_shapes(mesh):
    shape = jax.ShapeDtypeStruct((16,), np.float32, sharding=row_layout(mesh))
    away = to_host(shape, mesh, "f")
    assert on_host(away)
    assert at_hand(away) == shape


def test_to_host_refuses_devices_without_such_memory(mesh, monkeypatch):
    monkeypatch.setattr(offload, "HOST", "tape")
    with pytest.raises(InputError, match=r"reference\.offload: cpu devices have no tape memory"):
        to_host({}, mesh, "reference.offload")


def tables():
    """Arrays of the embedding table's shape that are on the devices."""
    gc.collect()
    shape = (runs.DECODER.vocab, runs.DECODER.embed)
    return sum(x.shape == shape and not on_host(x) for x in jax.live_arrays())


@pytest.mark.parametrize("away", [False, True])
def test_no_copy_stays_on_the_devices(away, mesh, tmp_path):
    """Weights and two moments of the policy, and the reference unless it is away."""
    before = tables()
    with jax.set_mesh(mesh):
        config = runs.ppo(tmp_path, mesh=MESH, reference=ReferenceConfig(offload=away))
        run = setup(config, mesh)
        assert tables() - before == (3 if away else 4)
        brought = at_hand(run.reference.params)
        assert tables() - before == 4
        del brought
        assert tables() - before == (3 if away else 4)


@pytest.fixture(scope="module")
def judge(tmp_path_factory, mesh):
    """The folder of a reward model."""
    folder = tmp_path_factory.mktemp("judge")
    loop.train(runs.reward_model(folder, steps=1, mesh=MESH), mesh)
    return str(folder / "run")


def log_of(config):
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "tokens_per_second")
    return [{k: x for k, x in json.loads(line).items() if k not in timing} for line in lines]


def test_a_run_is_the_same_with_its_frozen_networks_offloaded(judge, mesh, tmp_path):
    logs = []
    for away in (False, True):
        folder = tmp_path / str(away)
        folder.mkdir()
        config = runs.ppo(
            folder,
            steps=2,
            mesh=MESH,
            rewards=(RewardConfig(model=judge, offload=away),),
            reference=ReferenceConfig(offload=away),
        )
        config = replace(config, data=replace(config.data, eval=config.data.train))
        with jax.set_mesh(mesh):
            run = setup(config, mesh)
        held = [run.reference.params, run.judge.scorers[0].members[0].network.params]
        assert {on_host(x) for x in jax.tree.leaves(held)} == {away}
        loop.train(config, mesh)
        logs.append(log_of(config))
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4


def test_a_run_on_pairs_is_the_same_with_its_reference_offloaded(mesh, tmp_path):
    logs = []
    for away in (False, True):
        folder = tmp_path / str(away)
        folder.mkdir()
        reference = ReferenceConfig(offload=away)
        config = runs.of("dpo", folder, steps=2, mesh=MESH, reference=reference)
        loop.train(config, mesh)
        logs.append(log_of(config))
    assert logs[0] == logs[1]
