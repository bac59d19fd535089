"""Weights by path are read once, when asked for or begun before, and wait for nobody; reading needs
neither jax nor transformers."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig, ModelConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.models import read as reading
from jaxrlhf.models.ends import _said, read_generation
from jaxrlhf.models.read import read_ahead, read_decoder, read_weights, run_config
from jaxrlhf.models.source import Source

TINY = DecoderConfig(vocab=8, embed=8, layers=2, heads=1, kv_heads=1, head_dim=8, mlp=8)


@pytest.fixture
def reads(monkeypatch):
    """The paths that are read, in order, each with the thread's name; gives a number for each."""
    seen = []

    def read(path):
        seen.append((path, threading.current_thread().name))
        return Source(
            TINY, lambda weight, _: np.full(weight.stored, len(seen)), lambda _: "float32"
        )

    monkeypatch.setattr(reading, "open_hf", read)
    monkeypatch.setattr(reading, "folder", lambda path: path)
    return seen


def test_read_ahead_reads_once(reads):
    read_ahead(ModelConfig(path="a"))
    source = read_weights("a")
    assert {float(x[0, 0]) for x in source.held.values() if x.ndim == 2} == {1.0}
    assert source.held.keys() == {weight.path for weight in source.weights()}
    assert reads == [("a", "read ahead")]
    assert read_weights("a").held == {}  # what was read ahead is not kept
    assert reads[1:] == [("a", threading.current_thread().name)]


def test_large_models_are_not_read_ahead(reads, monkeypatch):
    monkeypatch.setattr(reading, "MOST_AHEAD", 100)
    read_ahead(ModelConfig(path="a"))
    source = read_weights("a")
    assert source.held == {}
    assert source.bytes() > 100
    assert source.whole(source.weights()[0]).tolist() == np.ones((8, 8)).tolist()


def test_read_ahead_is_of_one_path(reads):
    read_ahead(ModelConfig(path="a"))
    assert read_weights("b") is not None
    read_weights("a")
    assert {path for path, _ in reads} == {"a", "b"}
    assert len(reads) == 2


def test_read_ahead_leaves_errors_to_the_reader(tmp_path):
    missing = str(tmp_path / "none")
    read_ahead(ModelConfig(path=missing))
    with pytest.raises(InputError, match="no such folder"):
        read_weights(missing)


def test_read_ahead_of_what_is_not_read_does_nothing(reads, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    read_ahead(ModelConfig(path=str(tmp_path)))  # a run's weights are in its checkpoints
    read_ahead(ModelConfig(path="a", decoder=TINY))
    assert reads == []
    assert reading._begun == {}


def run(folder, **model):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps({"model": model}))
    return str(folder)


def test_run_config_of_a_run_that_leads_back_to_itself(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    loops = [
        lambda: run(a, path=str(a)),
        lambda: run(a, path=f"{a}/../a"),
        lambda: run(a, path=run(b, path=str(a))),
        lambda: run(a, path="smollm2", tokenizer=run(b, path="smollm2", tokenizer=str(a))),
        lambda: run(c, path=run(b, path=str(b))),
    ]
    for make in loops:
        folder = make()
        for read in (run_config, read_decoder, read_generation, lambda x: next(_said(x))):
            with pytest.raises(InputError, match="its model is its own"):
                read(folder)


def test_run_config_of_runs_that_share_a_start(tmp_path):
    """Each names the one before it twice: 2⁴⁰ ways lead to the first, which is read once."""
    last = ""
    for number in range(40):
        last = run(tmp_path / str(number), path=last, tokenizer=last)
    assert run_config(last).model.path == str(tmp_path / "38")
    for number in range(40, 120):
        last = run(tmp_path / str(number), path=last)
    with pytest.raises(InputError, match="more than 100 runs long"):
        run_config(last)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800"])
def test_read_decoder_of_what_is_no_name_of_a_file(path):
    with pytest.raises(InputError, match=r"no such folder; give"):
        read_decoder(path)


def test_reading_needs_neither_jax_nor_transformers():
    code = "import sys, jaxrlhf.models.read as r; print({'jax', 'transformers'} & {*sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_an_error_does_not_wait_for_weights():
    code = """
import time
from jaxrlhf.config import DecoderConfig, ModelConfig
from jaxrlhf.models import read as reading
from jaxrlhf.models.source import Source
begun = []
def read(weight, layer):
    begun.append(weight)
    time.sleep(600)
tiny = DecoderConfig(8, 8, 2, 1, 1, 8, 8)
reading.source_of_gguf = lambda path: Source(tiny, read, lambda _: "float32")
reading.read_ahead(ModelConfig(path="x.gguf"))
while not begun:
    time.sleep(0.01)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 3
