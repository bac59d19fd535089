"""Small files of a run's folder, however damaged, hold up no restart."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import runs

from jaxrlhf.config import EvalConfig, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.run import loop

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(config of a run of two steps, its folder)."""
    config = runs.sft(tmp_path_factory.mktemp("ended"), steps=2)
    loop.train(config, runs.one_device())
    return config


@pytest.fixture
def again(ended, tmp_path):
    """The config of a copy of that run."""
    shutil.copytree(ended.output, tmp_path / "run")
    return replace(ended, output=str(tmp_path / "run"))


def steps_of(config):
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("text", ["", '{"steps": 2, "lo', DEEP, "[]", "2", '{"loss": 1}'])
def test_a_damaged_summary_is_written_anew(text, again, caplog):
    path = Path(again.output) / "summary.json"
    path.write_text(text)
    assert loop.train(again, runs.one_device())["steps"] == 2
    assert json.loads(path.read_text())["steps"] == 2
    assert re.search(r"summary\.json: no.*: it is written anew", caplog.text)
    assert steps_of(again) == [1, 2]


def test_damaged_lines_are_dropped(again, caplog):
    path = Path(again.output) / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{DEEP}\n{second}\n{second[:20]}")
    assert loop.train(replace(again, steps=3), runs.one_device())["steps"] == 3
    assert steps_of(again) == [1, 2, 3]
    assert caplog.text.count("dropped a line that is no record") == 2


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("content", [b"", b"seed: 7\n", b"model: {path: ", b"\xff\x00", b"a: 1"])
def test_a_damaged_config_is_written_anew(content, steps, again):
    """What the run is, its checkpoint knows; one that still loads is left to a run that is done."""
    path = Path(again.output) / "config.yaml"
    path.write_bytes(content)
    assert loop.train(replace(again, steps=steps), runs.one_device())["steps"] == steps
    if steps == 3 or content != b"seed: 7\n":
        assert load(path).data == again.data


def test_another_config_is_refused_whatever_config_yaml_says(again):
    Path(again.output, "config.yaml").unlink()
    with pytest.raises(InputError, match=r"cannot resume with seed=5 \(was 0\)"):
        loop.train(replace(again, seed=5, steps=3), runs.one_device())


def test_a_full_disk_at_the_end_hides_neither_failure(again, monkeypatch):
    """Training has been done; the save and the summary are not."""

    def full(*_):
        raise OSError(28, os.strerror(28))

    replaced = os.replace

    def but_the_summary(part, path):
        return full() if Path(path).name == "summary.json" else replaced(part, path)

    monkeypatch.setattr("jaxrlhf.mesh.checkpoint.writer", full)
    monkeypatch.setattr("jaxrlhf.core.files.os.replace", but_the_summary)
    with pytest.raises(InputError) as error:
        loop.train(replace(again, steps=3), runs.one_device())
    assert "summary.json: cannot be written (No space left on device;" in str(error.value)
    assert "step 3 could not be saved" in str(error.value)
    assert "resumes from step 2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patience", [0, 1])
def test_an_end_that_is_measured_again_stands_there_once(patience, tmp_path, monkeypatch):
    """The disk is full between its line and the summary; with patience its line is all there is."""
    config = runs.reward_model(tmp_path, steps=2, eval=EvalConfig(every=1, patience=patience))

    def full(*_):
        raise InputError("no room")

    monkeypatch.setattr("jaxrlhf.run.record.write_atomic", full)
    with pytest.raises(InputError, match="no room"):
        loop.train(config, runs.one_device())
    monkeypatch.undo()
    written = Path(config.output) / "metrics.jsonl"
    before = written.read_text()
    assert loop.train(config, runs.one_device())["accuracy_after"] >= 0
    assert written.read_text() == before
    assert before.count('{"step": 2, "eval/') == 1
