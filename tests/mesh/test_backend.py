"""The devices in words; the GPU that is left alone; none at all."""

import jax
import pytest

from jaxrlhf.config import MeshConfig
from jaxrlhf.core.errors import to_install
from jaxrlhf.mesh import backend
from jaxrlhf.mesh.sharding import make_mesh

VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\nGCC: 12.3.0\n"
)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """(version) → a machine with this driver, and without a CUDA part of JAX."""
    monkeypatch.setattr(backend, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    monkeypatch.setattr(backend, "plugin", lambda: "")

    def load(version):
        (tmp_path / "version").write_text(VERSION.format(version), encoding="utf-8")

    return load


def asked(monkeypatch, platforms):
    monkeypatch.setattr(backend, "_asked", lambda: platforms)


def test_described_on_eight_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    line = backend.described(mesh, "bfloat16")
    assert line.startswith("cpu: 8 devices; ")
    assert line.endswith(" GiB of memory; bfloat16; mesh data 2, fsdp 4")
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    assert backend.described(one, "float32").endswith("; float32; mesh of one device")


@pytest.mark.parametrize(("version", "extra"), [("580.65.06", "cuda13"), ("535.183.01", "cuda12")])
def test_unused_gpu_names_what_the_driver_runs(version, extra, driver, monkeypatch):
    driver(version)
    asked(monkeypatch, "")
    line = backend.unused_gpu("cpu")
    assert f"an NVIDIA driver ({version}), and the run is on the CPU" in line
    assert line.endswith(to_install(extra))


def test_unused_gpu_says_nothing_where_all_is_as_asked(driver, monkeypatch):
    asked(monkeypatch, "")
    assert backend.unused_gpu("cpu") == ""  # no driver
    driver("580.65.06")
    assert backend.unused_gpu("gpu") == ""
    asked(monkeypatch, "cpu")
    assert backend.unused_gpu("cpu") == ""


def test_unused_gpu_where_only_nvidia_smi_shows_it(driver, monkeypatch):
    monkeypatch.setattr(backend.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(backend, "plugin", lambda: "jax_cuda13_plugin")
    asked(monkeypatch, "")
    line = backend.unused_gpu("cpu")
    assert "jax_cuda13_plugin is installed and finds no GPU" in line
    assert line.endswith("(cuda12 for a driver older than 580)")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize\nmore")])
def test_no_devices_is_one_line(error, driver, monkeypatch):
    def none():
        raise error

    monkeypatch.setattr(backend.jax, "devices", none)
    asked(monkeypatch, "cuda")
    line = backend.no_devices()
    assert line.startswith("JAX_PLATFORMS=cuda: JAX finds no such device")
    assert "there is no NVIDIA driver" in line
    assert "\n" not in line
    assert ("(Unable to initialize)" in line) == bool(str(error))
    driver("580.65.06")
    assert f"{to_install('cuda13')}, or leave JAX_PLATFORMS out" in backend.no_devices()


def test_no_devices_where_there_are_some():
    assert backend.no_devices() == ""
