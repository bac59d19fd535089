"""Weights by path are read once, when asked for or begun before, and wait for nobody; reading needs
neither jax nor transformers."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig, ModelConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.models import read as reading
from jaxrlhf.models.read import read_ahead, read_weights

TINY = DecoderConfig(vocab=8, embed=8, layers=2, heads=1, kv_heads=1, head_dim=8, mlp=8)


@pytest.fixture
def reads(monkeypatch):
    """The paths that are read, in order, each with the thread's name; gives a number for each."""
    seen = []

    def read(path):
        seen.append((path, threading.current_thread().name))
        return None, np.full(2, len(seen))

    monkeypatch.setattr(reading, "read_hf", read)
    monkeypatch.setattr(reading, "folder", lambda path: path)
    return seen


def test_read_ahead_reads_once(reads):
    read_ahead(ModelConfig(path="a"))
    assert read_weights("a")[1].tolist() == [1, 1]
    assert reads == [("a", "read ahead")]
    assert read_weights("a")[1].tolist() == [2, 2]  # what was read ahead is not kept
    assert reads[1:] == [("a", threading.current_thread().name)]


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
from jaxrlhf.models import names, read as reading
begun = []
def read(weight, layer):
    begun.append(weight)
    time.sleep(600)
reading.read_gguf = lambda path: names.assemble(DecoderConfig(8, 8, 2, 1, 1, 8, 8), read)
reading.read_ahead(ModelConfig(path="x.gguf"))
while not begun:
    time.sleep(0.01)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 3
