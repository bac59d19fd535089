"""Every file of configs/ is a run that can be started, and on the tiny model one that learns."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxrlhf.apps.pipeline import run_pipeline
from jaxrlhf.config import (
    AlgorithmConfig,
    Config,
    MeshConfig,
    check,
    dump,
    is_on_policy,
    load,
    load_pipeline,
)
from jaxrlhf.config.load import build
from jaxrlhf.data.batches import preference_batch
from jaxrlhf.data.formats import read_pairs
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import load_model
from jaxrlhf.run import loop
from jaxrlhf.steps.update import candidate_logp

CONFIGS = sorted(Path("configs").glob("*.yaml"))
NAMES = [kind.name for kind in get_args(AlgorithmConfig)]
JUDGES = ["listwise_reward_model", "pointwise_reward_model", "process_reward_model"]
LEARNERS = [n for n in NAMES if n not in ("sft", "reward_model", "ppo", "gkd", *JUDGES)]

SEVERAL = ("a2c", "rloo", "grpo", "dpo", "kto", "listwise_reward_model")
"""One of each family of losses learns from three seeds, the others from one."""


def seeded(names):
    return [(name, seed) for name in names for seed in (range(3) if name in SEVERAL else [0])]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_can_be_started(path):
    config = load(path)
    check(config)
    header = path.read_text(encoding="utf-8").split("algorithm:")[0]
    for word in ("# Launch:", "# Takes:", "Expect"):
        assert word in header
    assert "jaxrlhf " in header


def test_every_algorithm_has_a_config_of_either_size():
    stems = {(load(path).algorithm.name, load(path).model.path == "smollm2") for path in CONFIGS}
    assert {(name, True) for name in NAMES} <= stems
    assert {(name, False) for name in NAMES} <= stems


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What ``jaxrlhf demo --tiny`` makes before its reward model: a policy, prompts and pairs."""
    folder = tmp_path_factory.mktemp("tiny")
    config = load_pipeline("configs/pipelines/demo_tiny.yaml", str(folder))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    run_pipeline(replace(config, stages=config.stages[:3]), mesh)
    return folder, mesh


def of_world(name, seed, folder):
    """The tiny config of an algorithm, on this world's files."""
    config = load(f"configs/{name}_tiny.yaml")
    moved = dump(config).replace("runs/tiny", str(folder))
    config = build(Config, yaml.safe_load(moved), name)
    return replace(config, seed=seed, output=str(folder / f"{name}-{seed}"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), seeded(LEARNERS))
def test_tiny_config_learns(name, seed, world):
    folder, mesh = world
    config = of_world(name, seed, folder)
    summary = loop.train(config, mesh)
    if is_on_policy(config):
        rise = summary["proxy_after"] - summary["proxy_before"]
        print(f"{name} {seed} {summary['proxy_before']:.3f} {summary['proxy_after']:.3f}")
        assert rise > 0.2
        assert rise > 2 * summary["proxy_ci_before"]
    else:
        before, after = (accuracy(path, folder, mesh) for path in ("sft", f"{name}-{seed}"))
        print(f"{name} {seed} {before:.3f} {after:.3f}")
        assert after > before + 0.1


@pytest.mark.slow
def test_tiny_student_learns(world):
    folder, mesh = world
    loop.train(replace(of_world("rloo", 0, folder), output=str(folder / "rloo")), mesh)
    summary = loop.train(of_world("gkd", 0, folder), mesh)
    print(f"gkd {summary['kl_nats_before']:.3f} {summary['kl_nats_after']:.3f}")
    assert summary["kl_nats_after"] < 0.05 * summary["kl_nats_before"]
    assert summary["gold_rise"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), seeded(JUDGES))
def test_tiny_reward_model_learns(name, seed, world):
    folder, mesh = world
    summary = loop.train(of_world(name, seed, folder), mesh)
    measure = "rank_correlation" if name == "pointwise_reward_model" else "accuracy"
    before, after = (summary[f"{measure}_{when}"] for when in ("before", "after"))
    print(f"{name} {seed} {before:.3f} {after:.3f}")
    assert after > 0.8
    assert after > before + 0.2


def accuracy(path, folder, mesh):
    """Held-out pairs whose chosen answer has the higher mean log-prob a token."""
    with jax.set_mesh(mesh):
        model, params, tokenizer = load_model(str(folder / path), mesh)
        rows = read_pairs(read_rows(str(folder / "pairs/eval.jsonl")), tokenizer)
        rows = encode_rows(rows, tokenizer, model.decoder.vocab, 20)
        batch = jax.tree.map(jnp.asarray, preference_batch(rows.items, 20, 0))
        logp_BCT = jax.jit(candidate_logp, static_argnums=0)(model, params, batch)
        mean_BC = (logp_BCT * batch.mask_BCT).sum(2) / batch.mask_BCT.sum(2)
    return float(np.mean(mean_BC[:, 0] > mean_BC[:, 1]))
