"""Every algorithm through the loop: it runs, it moves the policy, and it resumes bit-equal."""

from typing import get_args

import jax
import numpy as np
import pytest
import runs
from runs import trained

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import AlgorithmConfig, check
from jaxrlhf.run.speed import TIMED

KINDS = {kind.name: kind for kind in get_args(AlgorithmConfig)}


def test_every_config_has_an_algorithm():
    assert KINDS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"ppo", "sft", "reward_model"}))
def test_train_resumes_bit_equal(name, tmp_path):
    config = runs.of(name, tmp_path)
    check(config)
    states, lines = trained(config)
    runs.rewind(config, 2)
    resumed, again = trained(config)
    jax.tree.map(np.testing.assert_array_equal, states, resumed)
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == config.steps
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert any(line["grad_norm"] > 0 for line in steps)
    # All is compiled in a launch's first iteration, however many rounds DAPO takes in it.
    assert [line.get("recompiles") for line in steps] == [None, 0, 0, 0]
    rest = [line for line in again if "loss" in line]
    assert [line.get("recompiles") for line in rest] == [None, 0, None, 0]  # another launch
    drop = {*TIMED, "time"}
    for one, two in zip(steps, rest, strict=True):
        assert {k: v for k, v in one.items() if k not in drop} == {
            k: v for k, v in two.items() if k not in drop
        }
