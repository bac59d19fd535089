"""GPUs described for XLA's compiler; where that is installed, a plan by it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from jaxrlhf.config import ReferenceConfig
from jaxrlhf.config.load import save
from jaxrlhf.mesh.chips import CHIPS
from jaxrlhf.study.plan import gpus
from jaxrlhf.study.plan.gpus import GPUS, described, tools


def test_described_has_the_facts_of_a_device():
    text = described("h100")
    for fact in (
        "core_count: 132 ",
        "shared_memory_per_block_optin: 232448 ",
        "memory_bandwidth: 3350000000000 ",
        "l2_cache_size: 52428800 ",
        "cuda_compute_capability { major: 9 minor: 0 }",
        'device_description_str: "NVIDIA H100 80GB HBM3"',
    ):
        assert fact in text
    assert text.count("{") == text.count("}")


def test_every_gpu_is_a_chip_with_as_much_memory():
    for name, gpu in GPUS.items():
        assert gpu.name.startswith(CHIPS[name].kind)
        assert 0.8 < CHIPS[name].memory / gpu.memory < 1


def test_tools_without_the_extra(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    assert tools() is None


def test_tools_want_the_assembler_and_cudnn(monkeypatch, tmp_path):
    found = type("", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: found)
    assert tools() is None
    (tmp_path / "cuda_nvcc" / "bin").mkdir(parents=True)
    (tmp_path / "cuda_nvcc" / "bin" / "ptxas").touch()
    assert tools() is None
    (tmp_path / "cudnn" / "lib").mkdir(parents=True)
    assert tools() == tmp_path / "cuda_nvcc"


@pytest.mark.skipif(tools() is None, reason="XLA's compiler for GPUs is an extra: plan-gpu")
def test_plan_by_the_compiler_of_gpus(llama, tmp_path):
    away = replace(llama, reference=ReferenceConfig(offload=True), mesh=replace(llama.mesh, fsdp=2))
    away = replace(away, model=replace(away.model, tokenizer="no/such", dtype="bfloat16"))
    path = tmp_path / "run.yaml"
    save(away, path)
    words = ["plan", str(path), "--topology", "h100:2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxrlhf", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any("no host memory" in remark for remark in found["remarks"])
    steps = {step["name"]: step for step in found["steps"]}
    held = steps["reference"]["bytes"]["parameters"]
    elsewhere = {name: steps[name]["bytes"]["elsewhere"] for name in ("reference", "targets")}
    # the reference lies in host memory but for its own step
    assert elsewhere["targets"] == elsewhere["reference"]
    assert held > 0
    moved, needed = steps["sample"]["token"]
    assert 1 < moved / needed < 1.5
