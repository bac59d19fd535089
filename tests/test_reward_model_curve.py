"""The benchmark of learning curves, on a tiny model."""

import importlib.util
from pathlib import Path

import jax
import pytest
import runs

from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh

PATH = Path(__file__).parents[1] / "benchmarks" / "reward_model_curve.py"
SPEC = importlib.util.spec_from_file_location("reward_model_curve", PATH)
curves = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(curves)


def test_curve_trains_on_the_first_rows(tmp_path):
    config = runs.reward_model(tmp_path)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    results = curves.curve(config, [8, 16], 2, tmp_path / "curve", mesh)
    assert [(r["rows"], r["steps"]) for r in results] == [(8, 2), (16, 4)]
    assert all(0 <= r["accuracy"] <= 1 for r in results)
    lines = Path(config.data.train).read_text().splitlines()
    assert (tmp_path / "curve/rows_8.jsonl").read_text().splitlines() == lines[:8]
    header, _, first, second = curves.table(results).splitlines()
    assert header.startswith("| rows | steps | seconds | loss | accuracy |")
    assert first.startswith("| 8 | 2 |")
    assert second.count("|") == header.count("|")


def test_curve_refuses_more_rows_than_there_are(tmp_path):
    with pytest.raises(InputError, match="32 rows, and 33 are asked for"):
        curves.curve(runs.reward_model(tmp_path), [33], 1, tmp_path)
