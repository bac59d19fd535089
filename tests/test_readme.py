"""What the README says runs, and what it lists is there."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def example(marker):
    return next(b for b in re.findall(r"```python\n(.*?)```", TEXT, re.S) if marker in b)


@pytest.mark.slow
def test_readme_research_example_runs():
    names = {}
    exec(example("import jaxrlhf as rl"), names)
    metrics = jax.device_get(names["metrics"])
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 0
    assert abs(metrics["ratio_max"] - 1) < 1e-4
    assert int(names["state"].step) == 1
    assert (
        abs(
            np.asarray(names["ref_logp"] * names["rollout"].mask_BT - names["rollout"].logp_BT)
        ).max()
        < 1e-4
    )


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
