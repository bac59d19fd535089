"""A task with a checker, from its rows to a policy that has learnt it, as a user runs it."""

import json

import pytest
from command import run

from jaxrlhf.data.rows import read_rows

pytest.importorskip("reasoning_gym")


@pytest.mark.slow
def test_pipeline_learns_what_a_checker_pays_for(tmp_path):
    words = ["pipeline", "configs/pipelines/verifiable_tiny.yaml", "--output", str(tmp_path)]
    done = run(*words, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    grpo, found = summary["grpo"], summary["evaluation"]
    assert 0.1 < grpo["gold_before"] < 0.6  # the warm start leaves something to learn
    assert grpo["gold_after"] > grpo["gold_before"] + 0.2
    assert grpo["gold_rise"] > 2 * grpo["gold_rise_ci"]
    assert found["pass_at_k"]["rate"][0] == pytest.approx(grpo["gold_after"], abs=0.08)
    assert found["pass_at_k"]["rate"] == sorted(found["pass_at_k"]["rate"])
    assert found["maj_at_k"]["rate"][-1] > found["maj_at_k"]["rate"][0] - 0.02
    assert found["win_rate"]["gold"] > 0.55
    asked = {
        name: {
            row.values["prompt"] for row in read_rows(str(tmp_path / f"tasks/{name}.jsonl")).items
        }
        for name in ("prompts", "held_out", "warm_start")
    }
    assert not asked["held_out"] & (asked["prompts"] | asked["warm_start"])
