"""Attention's scores are never in memory: no array [.., T, T] in what compilers make of a step."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrlhf.study.plan.gpus import tools
from jaxrlhf.study.plan.topology import environment, parse

SCRIPT = Path(__file__).with_name("scores_in_memory.py")
WITHOUT = {
    "v5e:2x4": importlib.util.find_spec("libtpu") is None,
    "h100:8": tools() is None,
}


@pytest.mark.parametrize("name", WITHOUT)
def test_scores_are_not_in_memory(name):
    if WITHOUT[name]:
        pytest.skip("its compiler is an extra: jaxrlhf[plan] or [plan-gpu]")
    there = os.environ | environment(parse(name, gpus=True), tools=tools())
    words = [sys.executable, SCRIPT, name, "4096"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", env=there, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["score []", "update []"]
