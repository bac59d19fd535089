"""Names of topologies and chips, and what is set for them before jax starts."""

from pathlib import Path

import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.chips import CHIPS
from jaxrlhf.study.plan.topology import Topology, chip_of, environment, parse

LAUNCH = Path(__file__).parents[3] / "launch"


@pytest.mark.parametrize(
    ("name", "chip", "devices", "compiler"),
    [
        ("v5e:16x16", "v5e", 256, "tpu"),
        ("v6e:2x4", "v6e", 8, "tpu"),
        ("v4:4x4x4", "v4", 64, "tpu"),
        ("v5p:8x8x4", "v5p", 256, "tpu"),
        ("cpu:8", "cpu", 8, "cpu"),
        ("h100:8", "h100", 8, "cpu"),
        ("here", "", 0, "here"),
    ],
)
def test_parse(name, chip, devices, compiler):
    assert parse(name) == Topology(name, chip, devices, compiler)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:16x16", "--topology v5x:16x16: unknown device; give v4, v5e, v5p"),
        ("v5e-256", "--topology v5e-256: how its chips lie is missing: give v5e:16x16"),
        ("v5litepod-8", "give v5e:2x4"),
        ("v5p-512", "give v5p:8x8x4"),
        ("v4-8", "give v4:2x2x1"),
        ("h100-8", "give h100:8"),
        ("v5e-100", "unknown device"),
        ("v5e", "--topology v5e: v5e takes 2 sizes, as in v5e:16x16"),
        ("v5p:16x16", "v5p takes 3 sizes, as in v5p:8x8x4"),
        ("v5e:0x16", "v5e takes 2 sizes"),
        ("cpu:2x4", "cpu takes 1 size, as in cpu:8"),
        ("", "unknown device"),
    ],
)
def test_parse_refuses(name, message):
    with pytest.raises(InputError, match=message):
        parse(name)


def test_parse_with_the_compiler_of_gpus():
    assert parse("b200:16", gpus=True) == Topology("b200:16", "b200", 16, "gpu")
    assert parse("cpu:2", gpus=True).compiler == "cpu"
    assert parse("v5e:2x4", gpus=True).compiler == "tpu"


def test_environment_of_gpus():
    found = environment(
        parse("h100:4", gpus=True), {"XLA_FLAGS": "--xla_a=1"}, Path("/x/cuda_nvcc")
    )
    assert found["JAX_PLATFORMS"] == "cpu"
    assert found["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert found["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert found["XLA_FLAGS"].split() == [
        "--xla_a=1",
        "--xla_force_host_platform_device_count=4",
        "--xla_gpu_autotune_level=0",
        "--xla_gpu_cuda_data_dir=/x/cuda_nvcc",
    ]


def test_environment():
    tpu = environment(parse("v5e:2x4"))
    assert tpu["JAX_PLATFORMS"] == "cpu"
    assert tpu["TPU_SKIP_MDS_QUERY"] == "1"
    assert tpu["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert tpu["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    flags = environment(parse("cpu:4"), {"XLA_FLAGS": "--xla_a=1"})["XLA_FLAGS"]
    assert flags == "--xla_a=1 --xla_force_host_platform_device_count=4"
    assert environment(parse("here")) == {}


def test_environment_of_tpus_is_that_of_the_launcher():
    own = environment(parse("v5e:2x4"))["LIBTPU_INIT_ARGS"]
    assert own in (LAUNCH / "env.sh").read_text(encoding="utf-8")
    more = environment(parse("v5e:2x4"), {"LIBTPU_INIT_ARGS": "--a=1"})["LIBTPU_INIT_ARGS"]
    assert more == f"--a=1 {own}"
    other = own.replace("1000000", "0")
    kept = environment(parse("v5e:2x4"), {"LIBTPU_INIT_ARGS": other})
    assert kept["LIBTPU_INIT_ARGS"] == other


def test_chip_of_names_what_jax_finds():
    assert chip_of("TPU v5 lite") == "v5e"
    assert chip_of("TPU v5p") == "v5p"
    assert chip_of("NVIDIA H200") == "h200"
    assert chip_of("NVIDIA H100 80GB HBM3") == "h100"
    assert chip_of("NVIDIA GeForce RTX 4090") == "rtx4090"
    with pytest.raises(InputError, match="nothing is known of 'Abacus'"):
        chip_of("Abacus")


def test_every_chip_states_its_source():
    assert all(chip.source and chip.memory > 2**30 for chip in CHIPS.values())
