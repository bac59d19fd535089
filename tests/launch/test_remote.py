"""What a host of a TPU slice is asked to do."""

import shutil
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PYTHON = """#!/bin/bash
[[ $1 != *flags.py ]] || { echo --known; exit; }
trap 'echo saved; exit 0' TERM
echo "$LIBTPU_INIT_ARGS $*"
while true; do sleep .05; done
"""


@pytest.fixture
def host(workshop, tmp_path):
    """A host's copy of the repository, installed; what is started there is stopped."""
    home = tmp_path / "jaxrlhf"
    shutil.copytree(LAUNCH, home / "launch")
    (home / ".venv" / "bin").mkdir(parents=True)
    workshop.fake("python", PYTHON)
    shutil.copy(workshop.bin / "python", home / ".venv" / "bin" / "python")
    yield home
    workshop.run(home / "launch" / "remote.sh", "stop")


def wait_for(path, text):
    for _ in range(200):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"{path}: no {text!r}")


def test_start_and_stop(workshop, host):
    script = host / "launch" / "remote.sh"
    assert ": started, pid " in workshop.run(script, "start", "c.yaml", "--output", "a b").stdout
    wait_for(host / "run.log", "--known -m jaxrlhf train c.yaml --output a b\n")
    done = workshop.run(script, "start", "c.yaml")
    assert done.returncode == 2
    assert "a run is in progress" in done.stderr
    assert workshop.run(script, "stop").returncode == 0
    wait_for(host / "run.log", "saved\n")


def test_start_needs_an_installation(workshop, host):
    shutil.rmtree(host / ".venv")
    done = workshop.run(host / "launch" / "remote.sh", "start", "c.yaml")
    assert done.returncode == 2
    assert "not installed: launch/remote.sh install" in done.stderr


def test_stop_without_a_run(workshop, host):
    assert workshop.run(host / "launch" / "remote.sh", "stop").returncode == 0
