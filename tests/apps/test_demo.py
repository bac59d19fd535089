"""The demo end to end, as a user runs it, on the tiny model."""

import json

import pytest
from command import run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_tiny_raises_the_reward(seed, tmp_path):
    words = ["demo", "--tiny", "--seed", str(seed), "--output", str(tmp_path / "demo")]
    done = run(*words, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["gold_after"] - summary["gold_before"] > 0.4
    assert summary["gold_rise"] - summary["gold_rise_ci"] > 0.3
    assert summary["proxy_after"] > summary["proxy_before"]
    assert summary["reward_model_accuracy"] > 0.85
    assert 0 < summary["kl_nats"] < 12
    assert summary["tokens_per_second"] > 0
    assert {"pairs", "reward_model/update", "ppo/sample"} <= set(summary["seconds"])
    assert "gold measure" in done.stdout
