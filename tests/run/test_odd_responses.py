"""Responses of a policy at its worst: all that is learnt stays finite, and the metrics say it."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs

from jaxrlhf.config import RewardConfig, SampleConfig
from jaxrlhf.run.loop import train

STOP = {"at once": tuple(range(16)), "never": ()}


def alike(prompts, completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize("stop", STOP)
def test_train_on_responses_that_end_at_once_or_never_and_are_paid_alike(stop, tmp_path):
    config = runs.ppo(
        tmp_path,
        sample=SampleConfig(max_new_tokens=1, n=2, stop=STOP[stop]),
        rewards=(RewardConfig("test_odd_responses:alike", in_process=True),),
        steps=2,
    )
    train(config, runs.one_device())
    lines = [json.loads(x) for x in (Path(config.output) / "metrics.jsonl").open(encoding="utf-8")]
    for line in lines:
        assert all(np.isfinite(x) for x in line.values() if x is not None)
        assert line["reward"] == pytest.approx(1, abs=0.1)  # the KL is in it
        assert (line["length"], line["skipped"]) == (1, 0)
