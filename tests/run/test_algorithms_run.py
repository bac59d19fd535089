"""Every algorithm through the loop: it runs, it moves the policy, and it resumes bit-equal."""

from dataclasses import replace
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
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = runs.of(name, tmp_path / "whole")
    check(whole)
    states, lines = trained(whole)
    parts = runs.of(name, tmp_path / "parts")
    trained(replace(parts, steps=2))
    resumed, again = trained(parts)
    jax.tree.map(np.testing.assert_array_equal, states, resumed)
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == whole.steps
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert any(line["grad_norm"] > 0 for line in steps)
    # All is compiled in a launch's first iteration, however many rounds DAPO takes in it.
    assert [line.get("recompiles") for line in steps] == [None, 0, 0, 0]
    drop = {*TIMED, "time"}
    for one, two in zip(steps, [line for line in again if "loss" in line], strict=True):
        assert {k: v for k, v in one.items() if k not in drop} == {
            k: v for k, v in two.items() if k not in drop
        }
