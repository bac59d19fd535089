"""What holds for every script of launch/: syntax, lint, help, and its first line; what env.sh sets
and leaves alone, and that flags unknown to the installed XLA are left out."""

import os
import re
import subprocess
import sys

import pytest
from command import tool
from workshop import LAUNCH, ROOT

SOURCED = ("env.sh", "lib.sh")
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
every_program = pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if path.name not in SOURCED], ids=lambda path: path.name
)


def ran(*words, env=None):
    return subprocess.run(words, env=env, capture_output=True, text=True, cwd=ROOT, check=False)


def output_of(*words):
    done = ran(*words)
    return done.returncode, done.stdout + done.stderr


def test_there_is_every_launcher():
    names = {path.name for path in LAUNCH.rglob("*") if path.is_file()}
    assert names >= {
        "env.sh", "local.sh", "gpu.sh", "slurm.sbatch", "tpu_vm.sh", "tpu_gce.sh", "gke.sh",
        "tpu.yaml", "gpu.yaml", "xpk.sh", "sky.yaml", "Dockerfile",
    }  # fmt: skip


def test_linters_find_nothing():
    status, text = output_of(tool("shellcheck"), "-x", *map(str, SCRIPTS))
    assert status == 0, text
    rules = "{extends: default, rules: {line-length: {max: 110}, document-start: disable}}"
    status, text = output_of(tool("yamllint"), "--strict", "-d", rules, str(LAUNCH))
    assert status == 0, text


@every_script
def test_script_parses(path):
    assert output_of("bash", "-n", str(path)) == (0, "")


@every_program
def test_program_is_strict_and_explains_itself(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    status, text = output_of(str(path), "-h")
    assert status == 0
    assert f"launch/{path.name}" in text
    assert "#" not in text


@every_program
def test_program_without_words_says_what_is_missing(path):
    status, text = output_of("env", "-u", "NAME", str(path))
    assert status == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1


# env.sh


SHOW = 'echo "${XLA_FLAGS-}|${LIBTPU_INIT_ARGS-}|${XLA_CLIENT_MEM_FRACTION-}|${JAX_PLATFORMS-}"'
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=true"
ONE = {"CUDA_VISIBLE_DEVICES": "3"}
TWO = {"CUDA_VISIBLE_DEVICES": "0,1"}
OWN = "--xla_gpu_enable_latency_hiding_scheduler=false --a=1"


def sourced(workshop, kind, **variables):
    code = f". launch/env.sh {kind}; {SHOW}"
    return workshop.call("bash", "-euo", "pipefail", "-c", code, cwd=ROOT, **variables)


@pytest.mark.parametrize(
    ("kind", "variables", "gpus", "expected"),
    [
        ("cpu", {}, 0, ["", "", "", "cpu"]),
        ("gpu", ONE, 0, ["", "", ".9", ""]),  # one overlaps nothing
        ("gpu", TWO, 0, [SCHEDULER, "", ".9", ""]),
        ("gpu", {}, 2, [SCHEDULER, "", ".9", ""]),
        ("gpu", ONE | {"JAX_NUM_PROCESSES": "2"}, 0, [SCHEDULER, "", ".9", ""]),
        ("gpu", TWO | {"XLA_FLAGS": "--a=1"}, 0, [f"--a=1 {SCHEDULER}", "", ".9", ""]),
        ("gpu", TWO | {"XLA_FLAGS": OWN, "XLA_CLIENT_MEM_FRACTION": ".5"}, 0, [OWN, "", ".5", ""]),
    ],
)
def test_env_sets_what_is_not_set(workshop, kind, variables, gpus, expected):
    if gpus:
        workshop.answers = {"--list-gpus": [(0, "GPU 0: H100\nGPU 1: H100\n")]}
    done = sourced(workshop, kind, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("|") == expected


def test_env_unknown_kind(workshop):
    done = sourced(workshop, "abacus")
    assert (done.returncode, done.stderr) == (2, "usage: . launch/env.sh cpu|gpu|tpu\n")


# flags.py


TPU = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
)
THRESHOLD = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


@pytest.fixture
def site(tmp_path):
    """A folder of packages with a made-up libtpu."""
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    known = "\0".join(["", "xla_tpu_new", "xla_tpu_newer_still", *TPU, THRESHOLD, ""])
    (tmp_path / "libtpu" / "libtpu.so").write_bytes(known.encode())
    return str(tmp_path)


def flags(*words, **environ):
    alone = ["-S"] if environ else []
    return ran(sys.executable, *alone, str(LAUNCH / "flags.py"), *words, env=environ or None)


def test_env_tpu_keeps_what_libtpu_knows(workshop, site):
    kept = sourced(workshop, "tpu", PYTHONPATH=site).stdout.split("|")[1]
    assert kept.split() == [*(f"--{name}=true" for name in TPU), f"--{THRESHOLD}=1000000"]


def test_flags_keeps_what_is_known(site):
    words = ["--xla_tpu_new=true", "--xla_tpu_old=1", "--xla_tpu_newer=1"]  # wants the whole name
    done = flags("libtpu", *words, PYTHONPATH=site)
    assert (done.returncode, done.stdout) == (0, "--xla_tpu_new=true\n")
    assert done.stderr.splitlines() == [
        f"left out, unknown to libtpu.so: {flag}" for flag in words[1:]
    ]


def test_flags_without_the_library_or_words(tmp_path):
    done = flags("libtpu", "--xla_tpu_new=true", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: libtpu is not installed for ")
    assert flags().returncode == 2


def test_flags_agrees_with_the_installed_xla():
    words = ["--xla_force_host_platform_device_count=3", SCHEDULER]
    kept = flags("xla", *words, "--xla_gpu_enable_async_all_gather=true", "--xla_no_such_flag=1")
    assert kept.stdout.split() == words
    count = ran(
        sys.executable,
        "-c",
        "import jax; print(jax.device_count())",
        env={"XLA_FLAGS": kept.stdout.strip(), "JAX_PLATFORMS": "cpu"},
    )
    assert count.stdout == "3\n", count.stderr


# --dry-run

DRY = {
    "tpu_vm.sh": "run --name a --zone z /c.yaml --steps 3",
    "tpu_gce.sh": "run --name a --zone z --project p /c.yaml --steps 3",
    "gke.sh": "run tpu --name a --image i --type t --topology 2x2 /c.yaml --steps 3",
    "xpk.sh": "--cluster c --name a --type t --image i /c.yaml --steps 3",
    "gpu.sh": "/c.yaml --steps 3",
    "local.sh": "-n 2 train /c.yaml --steps 3",
}


@pytest.mark.parametrize("script", DRY)
@pytest.mark.parametrize("before", [0, -2, -1, None])
def test_dry_run_anywhere_on_the_line_is_one(script, before, workshop):
    words = DRY[script].split()
    words.insert(len(words) if before is None else before, "--dry-run")
    output = workshop.output(script, *words)
    # GPUs are counted, for the flags that the command is given.
    assert [call for call in workshop.calls() if call[0] != "nvidia-smi"] == []
    assert "c.yaml" in output
    assert "dry-run" not in output
    assert re.search(r"^# [a-z]", output, re.M)  # what a command is for
