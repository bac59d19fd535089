"""Reading a run's records: finished, running, torn."""

import json
import math

import numpy as np
import pytest
import runs

from jaxrlhf.config import save
from jaxrlhf.core.errors import InputError
from jaxrlhf.study.diagnose.history import Series, fifth, read_history, read_lines, series


def folder_of(tmp_path, metrics, samples=()):
    save(runs.ppo(tmp_path), tmp_path / "config.yaml")
    for name, rows in (("metrics", metrics), ("samples", samples)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


METRICS = [
    {"step": 1, "score": 0.5, "kl": None},
    {"step": 0, "eval/proxy": 1.0},
    {"step": 2, "score": 0.7, "kl": 0.25},
    {"step": 2, "eval/proxy": 2.0},
]


def test_read_history_parts_training_and_evaluation(tmp_path):
    samples = [
        {"step": 1, "completion": "a"},
        {"step": 1, "completion": "b"},
        {"step": 0, "split": "eval", "completion": "c"},
    ]
    history = read_history(folder_of(tmp_path, METRICS, samples))
    assert history.config.algorithm.name == "ppo"
    np.testing.assert_array_equal(history.training.step_I, [1, 2])
    np.testing.assert_array_equal(history.training["score"], [0.5, 0.7])
    np.testing.assert_array_equal(history.training["kl"], [math.nan, 0.25])
    np.testing.assert_array_equal(history.evaluation.step_I, [0, 2])
    np.testing.assert_array_equal(history.evaluation["proxy"], [1.0, 2.0])
    assert [row["completion"] for row in history.samples[1]] == ["a", "b"]
    assert [row["completion"] for row in history.eval_samples[0]] == ["c"]


@pytest.mark.parametrize("torn", ['{"step": 3, "sco', '{"step": 3}', "\x00\x00"])
def test_read_history_leaves_out_a_torn_last_line(torn, tmp_path):
    folder = folder_of(tmp_path, METRICS)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(torn)
    np.testing.assert_array_equal(read_history(folder).training.step_I, [1, 2])


def test_read_history_without_samples(tmp_path):
    folder = folder_of(tmp_path, METRICS)
    (folder / "samples.jsonl").unlink()
    assert read_history(folder).samples == {}


def test_read_history_no_run(tmp_path):
    with pytest.raises(InputError, match=r"not the output folder of a run \(it holds no config"):
        read_history(tmp_path)


@pytest.mark.parametrize("metrics", [[], [{"step": 0, "eval/loss": 1.0}]])
def test_read_history_no_iteration(metrics, tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl has no iteration yet: wait"):
        read_history(folder_of(tmp_path, metrics))


@pytest.mark.parametrize("bad", ["{", "[]", '{"loss": 1}', '{"step": null}'])
def test_read_lines_bad_line_is_named(bad, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: .* is no record with a step"):
        read_lines(path)


def test_series_sorts_and_keeps_the_later_of_two():
    found = series([{"step": 2, "x": 1}, {"step": 1, "y": 5}, {"step": 2, "x": 3, "note": "no"}])
    np.testing.assert_array_equal(found.step_I, [1, 2])
    np.testing.assert_array_equal(found["x"], [math.nan, 3])
    np.testing.assert_array_equal(found["y"], [5, math.nan])
    np.testing.assert_array_equal(found["note"], [math.nan] * 2)
    np.testing.assert_array_equal(found["absent"], [math.nan] * 2)


def test_series_known_after_and_ratio():
    x = Series(np.arange(4), {"a": np.array([1.0, math.nan, 3, 4]), "w": np.array([2.0, 1, 0, 8])})
    np.testing.assert_array_equal(x.known("a", "w").step_I, [0, 2, 3])
    np.testing.assert_array_equal(x.after(1)["a"], [3, 4])
    np.testing.assert_array_equal(x.with_ratio("a", "w")["a"], [0.5, math.nan, math.nan, 0.5])


def test_series_change_by_hand():
    """Fifths 1, 3 and 6, 10 of ten points: means 2 and 8, errors √(2/2 + 8/2)."""
    x = Series(np.arange(5, 15), {"a": np.array([1.0, 3, 0, 0, 0, 0, 0, 0, 6, 10])})
    change = x.change("a")
    assert (change.before, change.after, change.rise) == (2, 8, 6)
    assert change.error == pytest.approx(math.sqrt(5))
    assert change.rose  # 6 > 4.47
    assert str(change) == "2 (steps 5-6) → 8 (steps 13-14)"


def test_series_change_within_scatter_has_not_risen():
    x = Series(np.arange(10), {"a": np.array([1.0, 3, 0, 0, 0, 0, 0, 0, 4, 8])})
    assert not x.change("a").rose  # 4 against 2·√(1 + 4)


def test_series_change_of_few_points():
    assert Series(np.arange(9), {"a": np.ones(9)}).change("a") is None


def test_series_late_is_the_last_fifth():
    x = Series(np.arange(10), {"a": np.arange(10.0), "b": np.full(10, math.nan)})
    late = x.late("a")
    assert (late.mean, late.median, late.steps) == (8.5, 8.5, "steps 8-9")
    assert x.late("b") is None


@pytest.mark.parametrize(("count", "n"), [(0, 0), (1, 1), (4, 1), (10, 2), (24, 4)])
def test_fifth(count, n):
    assert fifth(count) == n
