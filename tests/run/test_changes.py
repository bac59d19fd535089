"""What a launch may change in a run that has begun: what is free, and what has to be asked for;
what the command says of it is in test_first_hour."""

from dataclasses import replace

import pytest
import runs

from jaxrlhf.config import (
    CheckpointConfig,
    EvalConfig,
    MeshConfig,
    RewardConfig,
    SampleConfig,
)
from jaxrlhf.run.changes import changes


def config_of(tmp_path, **more):
    return runs.ppo(tmp_path, **more)


@pytest.mark.parametrize(
    "free",
    [
        {"steps": 400, "output": "elsewhere", "checkpoint": CheckpointConfig(every=7)},
        {"mesh": MeshConfig(fsdp=2), "sample": SampleConfig(max_new_tokens=8, n=2, slots=8)},
        {"eval": EvalConfig(batch_size=3)},
        {"trackers": ("wandb", "tensorboard")},
        {"rewards": (replace(runs.GOODNESS, timeout=3.0, in_process=True),)},
    ],
)
def test_changes_leaves_out_what_is_free(free, tmp_path):
    before = config_of(tmp_path)
    assert changes(before, replace(before, **free)) == []


def test_changes_names_every_other_field(tmp_path):
    before = config_of(tmp_path)
    after = replace(
        before,
        algorithm=replace(before.algorithm, kl_coef=0.5, dual_clip=3.0),
        rewards=(replace(runs.GOODNESS, weight=2.0), RewardConfig("sentiment")),
        max_excluded=0.25,
        data=replace(before.data, train="moved.jsonl", eval="new.jsonl"),
    )
    found = {change.field: str(change) for change in changes(before, after)}
    assert found["algorithm.kl_coef"] == "algorithm.kl_coef 0.05 → 0.5"
    assert found["algorithm.dual_clip"] == "algorithm.dual_clip None → 3.0"
    assert found["rewards.0.weight"] == "rewards.0.weight 1.0 → 2.0"
    assert found["rewards.1.function"] == "rewards.1.function nothing → 'sentiment'"
    assert found["data.eval"] == "data.eval '' → 'new.jsonl'"
    assert "max_excluded" in found
    assert "data.train" not in found  # its rows are compared
