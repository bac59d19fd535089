"""What is wrong with a run is said before anything is asked of a cloud."""

import shutil
import subprocess
import sys

import pytest
from workshop import LAUNCH

VM = ("tpu_vm.sh", "run", "--name", "a", "--zone", "z")
GCE = ("tpu_gce.sh", "run", "--name", "a", "--zone", "z", "--project", "p")
GKE = ("gke.sh", "run", "gpu", "--name", "a", "--image", "i", "--type", "t")
XPK = ("xpk.sh", "--cluster", "c", "--name", "a", "--type", "t", "--image", "i")


@pytest.mark.parametrize("script", [VM, GCE, GKE, XPK], ids=lambda words: words[0])
def test_a_config_that_is_not_there_touches_nothing(workshop, script):
    errors = workshop.refusal(*script, "configs/no.yaml")
    assert errors.splitlines()[-1].startswith("error: configs/no.yaml: no such file in ")
    assert workshop.calls() == []


def test_a_config_that_does_not_load_touches_nothing(workshop):
    words = ["configs/sft_tiny.yaml", "--optim.learning-rate", "fast"]
    errors = workshop.refusal("tpu_vm.sh", "resume", *VM[2:], "--type", "v6e-8", *words)
    assert errors.splitlines()[-1].startswith("error: command line: optim.learning_rate=")
    assert workshop.calls() == []


def test_a_config_that_loads_is_started(workshop):
    workshop.output(*VM, "configs/sft_tiny.yaml", "--steps", "3")
    assert workshop.calls()[-1][-1].endswith("start configs/sft_tiny.yaml --steps 3")


def test_a_python_that_reads_no_configs_is_said(workshop):
    bare = workshop.fake("bare", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    done = workshop.run(*VM, "configs/sft_tiny.yaml", "--dry-run", PYTHON=bare, PYTHONPATH="")
    assert done.returncode == 0
    assert "configs/sft_tiny.yaml: not checked: " in done.stderr
    assert " has no " in done.stderr


def test_edits_that_are_not_sent_are_said(workshop, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(LAUNCH, repository / "launch")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    script = str(repository / "launch" / VM[0])
    said = [workshop.call(script, *VM[1:], "--dry-run", "/c.yaml").stderr]
    (repository / "launch" / "new.sh").touch()
    said.append(workshop.call(script, *VM[1:], "--dry-run", "/c.yaml").stderr)
    assert "warning" not in said[0]
    assert "warning: 1 files have edits that are not committed" in said[1]
