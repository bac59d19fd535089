"""Flags that the installed XLA does not know are left out."""

import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = Path(__file__).parents[2] / "launch" / "flags.py"


def flags(*words, **environ):
    return subprocess.run(
        [sys.executable, "-S", str(FLAGS), *words]
        if environ
        else [sys.executable, str(FLAGS), *words],
        env=environ or None,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def site(tmp_path):
    """A folder of packages with a made-up libtpu."""
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    (tmp_path / "libtpu" / "libtpu.so").write_bytes(b"\0xla_tpu_new\0xla_tpu_newer_still\0")
    return tmp_path


def test_main_keeps_what_is_known(site):
    done = flags("libtpu", "--xla_tpu_new=true", "--xla_tpu_old=1", PYTHONPATH=str(site))
    assert (done.returncode, done.stdout) == (0, "--xla_tpu_new=true\n")
    assert done.stderr == "left out, unknown to libtpu.so: --xla_tpu_old=1\n"


def test_main_wants_the_whole_name(site):
    assert flags("libtpu", "--xla_tpu_newer=1", PYTHONPATH=str(site)).stdout == "\n"


def test_main_without_the_library(tmp_path):
    done = flags("libtpu", "--xla_tpu_new=true", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: libtpu is not installed for ")


def test_main_without_words():
    assert flags().returncode == 2


def test_main_agrees_with_the_installed_xla():
    words = (
        "--xla_force_host_platform_device_count=3",
        "--xla_gpu_enable_latency_hiding_scheduler=true",
    )
    kept = flags("xla", *words, "--xla_gpu_enable_async_all_gather=true", "--xla_no_such_flag=1")
    assert kept.stdout.split() == list(words)
    count = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.device_count())"],
        env={"XLA_FLAGS": kept.stdout.strip(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert count.stdout == "3\n", count.stderr
