"""A run with every kind of step, and its plan for eight fake devices."""

from dataclasses import replace

import pytest
import runs

from jaxrlhf.config import MeshConfig, RewardConfig
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
