"""Runs of each family on eight fake devices: PPO, and for a mixture also GRPO, SFT, a reward model.

Two here; the others by ``make families``.
"""

from dataclasses import replace

import numpy as np
import pytest
import runs
from test_families import CASES, theirs

from jaxrlhf.config import GRPOConfig, MeshConfig, ModelConfig, SampleConfig
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.hf import read_hf

ALWAYS = ("gemma2", "qwen3 moe")
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
EXPERTS = MeshConfig(data=2, expert=2, tensor=2)


def named(case):
    marks = () if case in ALWAYS else pytest.mark.families
    return pytest.param(case, marks=marks)


def decoder_of(case, folder):
    theirs(*CASES[case]).save_pretrained(folder)
    return read_hf(folder)[0]


@pytest.mark.parametrize("case", map(named, CASES))
def test_ppo_of_a_family(case, tmp_path):
    """Two iterations; what is scored of the sampler's tokens is what it drew them with."""
    decoder = decoder_of(case, tmp_path / "hf")
    mesh = EXPERTS if decoder.moe else MESH
    config = runs.ppo(tmp_path, mesh=mesh, steps=2, sample=SampleConfig(max_new_tokens=12, n=2))
    config = replace(config, model=ModelConfig(decoder=decoder, tokenizer=f"words:{runs.WORDS}"))
    if decoder.moe:
        again = replace(config.sample, router_replay=True)
        busy = replace(config.optim, router_aux_loss_coef=0.01)
        config = replace(config, sample=again, optim=busy)
    _, metrics = runs.trained(config, make_mesh(mesh))
    assert len(metrics) == 2
    assert all(np.isfinite(row["loss"]) for row in metrics)
    assert abs(metrics[0]["kl"]) < 1e-4  # the reference is the start, and scores as it was drawn
    assert all(("router_load_max" in row) == (decoder.moe is not None) for row in metrics)


@pytest.mark.parametrize("which", ["grpo", "sft", "reward_model"])
@pytest.mark.families
def test_other_algorithms_of_a_mixture(which, tmp_path):
    model = ModelConfig(
        decoder=decoder_of("qwen3 moe", tmp_path / "hf"), tokenizer=f"words:{runs.WORDS}"
    )
    changes = {"model": model, "mesh": EXPERTS, "steps": 2}
    if which == "grpo":
        again = SampleConfig(max_new_tokens=8, n=2, slots=8, router_replay=True)
        algorithm = GRPOConfig(old_logp="rescore", minibatches=2)
        config = runs.ppo(tmp_path, **changes, algorithm=algorithm, sample=again)
    else:
        config = getattr(runs, which)(tmp_path, **changes)
    _, metrics = runs.trained(config, make_mesh(EXPERTS))
    losses = [row["loss"] for row in metrics if "loss" in row]  # others are of held-out rows
    assert len(losses) == 2
    assert np.isfinite(losses).all()
