"""What a run writes down: whole lines in order after kills and full disks."""

import json
import math
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.run.record import Recorder, plain


def lines(path):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def run(output, resume_step, steps):
    with Recorder(output, resume_step) as record:
        for step in steps:
            record.metrics(step, {"reward": step / 2})
            record.samples(step, [{"completion": "a"}, {"completion": "b"}])


def test_recorder_lines(tmp_path):
    with Recorder(tmp_path / "run") as record:
        values = {"a": jnp.float32(0.5), "b": np.int64(3), "c": math.nan, "d": -np.inf, "e": True}
        record.metrics(1, values)
        record.samples(1, [{"prompt": 'é "\n\ud800', "ids": np.arange(2), "reward": None}])
        # read while the recorder is open: every line is there at once
        assert lines(tmp_path / "run" / "metrics.jsonl") == [
            {"step": 1, "a": 0.5, "b": 3, "c": None, "d": None, "e": True}
        ]
        assert lines(tmp_path / "run" / "samples.jsonl") == [
            {"step": 1, "prompt": 'é "\n\ud800', "ids": [0, 1], "reward": None}
        ]


def test_recorder_resume_drops_later_steps(tmp_path):
    run(tmp_path, None, range(1, 6))
    run(tmp_path, 3, range(4, 7))
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    steps = [x["step"] for x in lines(tmp_path / "samples.jsonl")]
    assert steps == sorted(2 * [1, 2, 3, 4, 5, 6])


def test_recorder_starts_anew(tmp_path):
    run(tmp_path, None, range(3))
    run(tmp_path, None, range(2))
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl")] == [0, 1]


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "rew', "\x00\x00\x00", '{"reward": 1}', "[]", "[" * 100_000]
)
def test_recorder_resume_drops_torn_line(tmp_path, torn):
    run(tmp_path, None, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    run(tmp_path, 2, [3])
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


WRITER = """
import sys
from jaxrlhf.run.record import Recorder
record = Recorder(sys.argv[1])
print("ready", flush=True)
for step in range(10**9):
    record.metrics(step, {"x": 1.0})
    print(step, flush=True)
"""


def test_recorder_killed(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            told = [int(child.stdout.readline()) for _ in range(100)]
        finally:
            child.kill()
    Recorder(tmp_path, 10**9).close()
    steps = [x["step"] for x in lines(tmp_path / "metrics.jsonl")]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= told[-1]


def test_recorder_full_disk(tmp_path, caplog):
    """Lines that the disk refuses are written once it has room; no line is torn or lost."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Recorder(tmp_path) as record:
        record.metrics(1, {"x": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))  # in the middle of the second line
        try:
            for step in (2, 3):
                record.metrics(step, {"x": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "wait in memory" in caplog.text
        record.metrics(4, {"x": 1})
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_recorder_ends_with_an_error_where_lines_are_lost(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    record = Recorder(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        for step in (1, 2, 3):
            record.metrics(step, {"x": 1})
        with pytest.raises(InputError, match=r"metrics\.jsonl: .* 2 lines are lost"):
            record.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_recorder_file_that_is_removed_is_written_anew(tmp_path, caplog):
    with Recorder(tmp_path) as record:
        for step in (1, 2):
            record.metrics(step, {"x": 1})
        (tmp_path / "metrics.jsonl").unlink()
        record.metrics(3, {"x": 1})
        assert "metrics.jsonl: was removed, and is written anew" in caplog.text
        record.metrics(4, {"x": 1})
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_recorder_file_that_is_edited_is_gone_on_with(tmp_path, caplog):
    with Recorder(tmp_path) as record:
        for step in (1, 2):
            record.metrics(step, {"x": 1})
        (tmp_path / "new").write_text('{"step": 2}\n')  # as editors do
        (tmp_path / "new").rename(tmp_path / "metrics.jsonl")
        record.metrics(3, {"x": 1})
    assert "metrics.jsonl: is another file now" in caplog.text
    assert [x["step"] for x in lines(tmp_path / "metrics.jsonl")] == [2, 3]


def test_recorder_folder_that_is_gone(tmp_path, caplog):
    folder = tmp_path / "run"
    record = Recorder(folder)
    record.metrics(1, {"x": 1})
    folder.rename(tmp_path / "away")
    record.metrics(2, {"x": 1})
    assert "metrics.jsonl: cannot be written (No such file or directory)" in caplog.text
    (tmp_path / "away").rename(folder)
    record.close()
    assert "can be written again, and has all its lines" in caplog.text
    assert [x["step"] for x in lines(folder / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_recorder_names_what_it_cannot_open(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"{name}: cannot be written \(Is a directory\)"):
        Recorder(tmp_path, 3)


def test_recorder_inactive(tmp_path):
    with Recorder(tmp_path / "run", active=False) as record:
        record.metrics(1, {"x": 1})
        record.samples(1, [{}])
        record.summary({})
    assert not (tmp_path / "run").exists()


def test_recorder_summary(tmp_path):
    with Recorder(tmp_path) as record:
        record.summary({"a": 1})
        record.summary({"reward": {"before": math.nan, "after": np.float32(0.25)}})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"reward": {"before": None, "after": 0.25}}
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl", "samples.jsonl", "summary.json",
    }  # fmt: skip


def test_plain_refuses():
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        plain({"x": object()})
