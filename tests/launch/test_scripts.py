"""What holds for every script of launch/: syntax, lint, help, and its first line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SOURCED = ("env.sh", "lib.sh")
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
PROGRAMS = [path for path in SCRIPTS if path.name not in SOURCED]


def tool(name):
    """A program that pip has installed beside this interpreter."""
    return str(Path(sys.executable).parent / name)


def output_of(*words):
    done = subprocess.run(words, capture_output=True, text=True, cwd=LAUNCH.parent, check=False)
    return done.returncode, done.stdout + done.stderr


def test_there_is_every_launcher():
    names = {path.name for path in LAUNCH.rglob("*") if path.is_file()}
    assert names >= {
        "env.sh", "local.sh", "gpu.sh", "slurm.sbatch", "tpu_vm.sh", "tpu_gce.sh", "gke.sh",
        "tpu.yaml", "gpu.yaml", "xpk.sh", "sky.yaml", "Dockerfile",
    }  # fmt: skip


def test_shellcheck_finds_nothing():
    status, text = output_of(tool("shellcheck"), "-x", *map(str, SCRIPTS))
    assert status == 0, text


def test_yamllint_finds_nothing():
    rules = "{extends: default, rules: {line-length: {max: 110}, document-start: disable}}"
    status, text = output_of(tool("yamllint"), "--strict", "-d", rules, str(LAUNCH))
    assert status == 0, text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(path):
    assert output_of("bash", "-n", str(path)) == (0, "")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_program_is_strict_and_can_be_started(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_program_explains_itself(path):
    status, text = output_of(str(path), "-h")
    assert status == 0
    assert f"launch/{path.name}" in text
    assert "#" not in text


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_program_without_words_says_what_is_missing(path):
    status, text = output_of("env", "-u", "NAME", str(path))
    assert status == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1
