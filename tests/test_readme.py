"""What the README says runs, and what it lists is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    """In a process of its own, on one device, as a reader would."""
    done = subprocess.run(
        [sys.executable, "-c", example("import jaxrlhf as rl") + CHECKS],
        env={**os.environ, "XLA_FLAGS": ""},
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
    listed = set(re.findall(r"^  (\w+(?:\.py|/))", TEXT, re.M))
    package = ROOT / "jaxrlhf"
    there = {p.name for p in package.glob("*.py")} | {
        f"{p.name}/" for p in package.iterdir() if p.is_dir() and (p / "__init__.py").exists()
    }
    assert listed == there - {"__init__.py"}
