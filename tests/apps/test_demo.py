"""The demo end to end, as a user runs it, on the tiny model."""

import json

import pytest
from command import one_device, run

SEEDS = (0, 1, 2)

CODE = """
import sys
from jaxrlhf.apps.cli import main
folder, *seeds = sys.argv[1:]
sys.exit(max(main(["demo", "--tiny", "--seed", x, "--output", f"{folder}/{x}"]) for x in seeds))
"""


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """(folder, what was printed): of each seed a demo, one after the other in one process."""
    folder = tmp_path_factory.mktemp("demo")
    done = run(str(folder), *map(str, SEEDS), code=CODE, XLA_FLAGS=one_device())
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("seed", SEEDS)
def test_demo_tiny_raises_the_reward(seed, demos):
    folder, printed = demos
    summary = json.loads((folder / str(seed) / "summary.json").read_text(encoding="utf-8"))
    assert summary["gold_after"] - summary["gold_before"] > 0.4
    assert summary["gold_rise"] - summary["gold_rise_ci"] > 0.3
    assert summary["proxy_after"] > summary["proxy_before"]
    assert summary["reward_model_accuracy"] > 0.85
    assert 0 < summary["kl_nats"] < 12
    assert summary["tokens_per_second"] > 0
    assert {"pairs", "reward_model/update", "ppo/sample"} <= set(summary["seconds"])
    assert printed.count("gold measure   ") == len(SEEDS)
