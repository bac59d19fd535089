"""What the README says runs, and what it lists is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import one_device
from test_rooms import ROOMS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def example(marker):
    return next(b for b in re.findall(r"```python\n(.*?)```", TEXT, re.S) if marker in b)


CHECKS = """
import numpy as np
metrics = jax.device_get(metrics)
assert np.isfinite(metrics["loss"])
assert metrics["skipped"] == 0
assert abs(metrics["ratio_max"] - 1) < 1e-4
assert int(state.step) == 1
assert abs(metrics["kl"]) < 1e-3
assert metrics["score"] == rollout.mask_BT.sum(1).mean()
"""


@pytest.mark.slow
def test_readme_research_example_runs():
    """In a process of its own, on one device, as a reader's, but for what shortens compilation."""
    done = subprocess.run(
        [sys.executable, "-c", example("import jaxrlhf as rl") + CHECKS],
        env={**os.environ, "XLA_FLAGS": one_device()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_readme_reward_function_runs():
    names = {}
    exec(example("def brief"), names)
    assert names["brief"](["a", "b"], ["one", "two words"]) == [0.5, 1 / 3]


def test_readme_tree_is_the_tree():
    """The rooms in their order, and of each room the name of every file."""
    listed = re.search(r"^jaxrlhf/\n(.*?)^configs/", TEXT, re.M | re.S)[1]
    rooms = dict(re.findall(r"^  (\w+)/(.*?)(?=^  \w+/|\Z)", listed, re.M | re.S))
    assert tuple(rooms) == ROOMS
    for room, text in rooms.items():
        files = [p for p in (ROOT / "jaxrlhf" / room).rglob("*.py") if p.name != "__init__.py"]
        assert set(re.findall(r"\w+\.py", text)) == {path.name for path in files}
