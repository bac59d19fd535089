"""A run is the same wherever its arrays lie: on every mesh, the same tokens, and parameters that
differ by rounding alone; with frozen weights in host memory, the same numbers, and less on the
devices in between."""

import gc
import json
import math
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.config import (
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    ReferenceConfig,
    RewardConfig,
    SampleConfig,
)
from jaxrlhf.mesh.sharding import at_hand, make_mesh, on_host
from jaxrlhf.models import attention
from jaxrlhf.run import loop
from jaxrlhf.run.session import Session
from jaxrlhf.run.setup import setup
from jaxrlhf.run.speed import TIMED
from jaxrlhf.steps import columns
from jaxrlhf.steps import draw as draws

ITERATIONS = 5
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
MESHES = {
    "fsdp 4": (MeshConfig(data=1, fsdp=4), 13),
    "context 4": (MeshConfig(data=1, context=4), 13),
    "context 2, which divides": (MeshConfig(data=1, context=2), 12),
    "data 8": (MeshConfig(data=8), 13),
    "fsdp 2, tensor 2, context 2": (MeshConfig(data=1, fsdp=2, tensor=2, context=2), 13),
}
"""Of each the tokens of a row: no axis divides 13."""


def config_of(folder, width):
    """PPO on rows of ``width`` tokens; all that two epochs of it need is there.

    Adam's eps is above the rounding of a gradient: near 0 it would make a step of any size, with
    the sign of the rounding, out of a gradient that is rounding alone.
    """
    return replace(
        runs.ppo(folder),
        algorithm=PPOConfig(minibatches=1, epochs=2, value_coef=0.5, entropy_coef=0.01),
        model=ModelConfig(decoder=replace(runs.DECODER, vocab=20), tokenizer=f"words:{runs.WORDS}"),
        sample=SampleConfig(max_new_tokens=width - 4, n=2),
        optim=OptimConfig(learning_rate=1e-2, eps=1e-3),
        steps=ITERATIONS,
    )


def run_on(folder, mesh_config, width):
    """(tokens of each iteration, parameters before and after), on as many devices as it takes."""
    sizes = (mesh_config.data, mesh_config.fsdp, mesh_config.tensor, mesh_config.context)
    config = replace(config_of(folder, width), mesh=mesh_config)
    mesh = make_mesh(mesh_config, jax.devices()[: math.prod(sizes)])
    tokens = []
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        # Neither logits nor attention scores are all there at once; three blocks make a draw.
        patch.setattr(columns, "LOGITS_A_DEVICE", 2**7)
        patch.setattr(attention, "SCORES_A_DEVICE", 2**10)
        patch.setattr(draws, "BLOCK", 8)
        session = Session(setup(config, mesh))
        session.host["kl_coef"] = 0.05
        start = jax.device_get(session.states["policy"].params)
        for step in range(ITERATIONS):
            session.states, _, rollout, _ = loop.iterate(session.run, session, step)
            tokens.append(np.asarray(rollout.token_BT))
        end = jax.device_get(session.states["policy"].params)
    return np.stack(tokens), start, end


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a width on one device."""
    return cache(lambda width: run_on(tmp_path_factory.mktemp("x"), MeshConfig(data=1), width))


def head_as_one(params):
    """Kernel and bias of the head beside one another: what moves the bias cancels nearly, so that
    its rounding is that of numbers of the kernel's size."""
    head = params["head"]
    return {**params, "head": np.append(head["kernel"], head["bias"])}


@pytest.mark.parametrize("name", MESHES)
def test_a_run_is_the_same_on_every_mesh(name, alone, tmp_path):
    mesh_config, width = MESHES[name]
    tokens, _, params = run_on(tmp_path, mesh_config, width)
    expected_tokens, _, expected_params = alone(width)
    np.testing.assert_array_equal(tokens, expected_tokens)

    def compare(path, found, expected):
        gap = np.abs(found - expected).max() / np.abs(expected).max()
        assert gap <= 1e-5, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, head_as_one(params), head_as_one(expected_params))


def test_the_run_learns(alone):
    """All that is compared above has moved, by far more than it may differ."""
    tokens, start, end = alone(13)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), start, end)
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert (tokens[0] != tokens[-1]).any()


# Frozen weights in host memory


def tables():
    """Arrays of the embedding table's shape that are on the devices."""
    gc.collect()
    shape = (runs.DECODER.vocab, runs.DECODER.embed)
    return sum(x.shape == shape and not on_host(x) for x in jax.live_arrays())


def logs_of(make, mesh, tmp_path):
    """What ``make``'s run logs, but for its clock, with frozen weights on the devices and away."""
    logs = []
    for away in (False, True):
        folder = tmp_path / str(away)
        folder.mkdir()
        config = make(folder, away)
        loop.train(config, mesh)
        rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        timing = TIMED
        logs.append([{k: x for k, x in row.items() if k not in timing} for row in rows])
    return logs


def test_a_run_is_the_same_with_its_frozen_networks_offloaded(mesh, tmp_path):
    loop.train(runs.reward_model(tmp_path, steps=1, mesh=CUBE), mesh)
    before = tables()

    def make(folder, away):
        config = runs.ppo(
            folder,
            steps=2,
            mesh=CUBE,
            rewards=(RewardConfig(model=str(tmp_path / "run"), offload=away),),
            reference=ReferenceConfig(offload=away),
        )
        # Weights and two moments of the policy; of the reference and the judge, unless away.
        held = 3 if away else 5
        with jax.set_mesh(mesh):
            run = setup(config, mesh)
            frozen = [run.reference.params, run.judge.scorers[0].members[0].network.params]
            assert {on_host(x) for x in jax.tree.leaves(frozen)} == {away}
            assert tables() - before == held
            brought = at_hand(run.reference.params)
            assert tables() - before == held + away
            del brought
            assert tables() - before == held
        return replace(config, data=replace(config.data, eval=config.data.train))

    here, there = logs_of(make, mesh, tmp_path)
    assert here == there
    assert len(here) == 4


def test_a_run_on_pairs_is_the_same_with_its_reference_offloaded(mesh, tmp_path):
    def make(folder, away):
        reference = ReferenceConfig(offload=away)
        return runs.of("dpo", folder, steps=2, mesh=CUBE, reference=reference)

    here, there = logs_of(make, mesh, tmp_path)
    assert here == there
