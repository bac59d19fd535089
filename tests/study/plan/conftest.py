"""A run with every kind of step, and its plan for eight fake devices."""

from dataclasses import replace

import pytest
import runs

from jaxrlhf.config import DecoderConfig, MeshConfig, RewardConfig, SampleConfig
from jaxrlhf.study.plan.compiled import plan
from jaxrlhf.study.plan.topology import parse


@pytest.fixture(scope="session")
def cpu():
    return parse("cpu:8")


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Policy, critic, reference and a reward model that is not there; no data, no tokenizer."""
    folder = tmp_path_factory.mktemp("plan")
    config = runs.ppo(folder, critic=runs.SEPARATE, mesh=MeshConfig(2, 2, 2))
    return replace(
        config,
        model=replace(config.model, tokenizer="no/such/folder"),
        data=replace(config.data, train="no/such.jsonl"),
        rewards=(RewardConfig(model="no/such/run"),),
    )


@pytest.fixture(scope="session")
def planned(config, cpu):
    return plan(config, cpu)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A small model of Llama's proportions, on one device: 16 rows of 32 + 33 tokens."""
    decoder = DecoderConfig(
        vocab=2048, embed=256, layers=3, heads=8, kv_heads=2, head_dim=32, mlp=896, tied=False
    )
    sample = SampleConfig(max_new_tokens=33, n=4)
    config = runs.ppo(tmp_path_factory.mktemp("llama"), sample=sample, mesh=MeshConfig(1, 1, 1))
    return replace(
        config,
        model=replace(config.model, decoder=decoder),
        data=replace(config.data, batch_size=4, max_prompt_tokens=32),
    )


@pytest.fixture(scope="session")
def llama_steps(llama):
    found = plan(llama, parse("cpu:1"), names=("sample", "reference", "update"))
    return {step.name: step for step in found.steps}
