"""What launch/env.sh sets, and what it leaves alone."""

import pytest

SHOW = 'echo "${XLA_FLAGS-}|${LIBTPU_INIT_ARGS-}|${XLA_CLIENT_MEM_FRACTION-}|${JAX_PLATFORMS-}"'
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=true"
TPU = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
)


@pytest.fixture
def show(workshop):
    def run(kind, **variables):
        done = workshop.bash(f". launch/env.sh {kind}; {SHOW}", **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split("|")

    return run


def test_env_cpu(show):
    assert show("cpu") == ["", "", "", "cpu"]


def test_env_one_gpu_overlaps_nothing(show):
    assert show("gpu", CUDA_VISIBLE_DEVICES="3") == ["", "", ".9", ""]


def test_env_several_gpus(show):
    assert show("gpu", CUDA_VISIBLE_DEVICES="0,1") == [SCHEDULER, "", ".9", ""]


def test_env_gpus_of_nvidia_smi(show, workshop):
    workshop.answers = {"--list-gpus": [(0, "GPU 0: H100\nGPU 1: H100\n")]}
    assert show("gpu")[0] == SCHEDULER


def test_env_one_gpu_each_of_several_processes(show):
    assert show("gpu", CUDA_VISIBLE_DEVICES="0", JAX_NUM_PROCESSES="2")[0] == SCHEDULER


def test_env_leaves_what_is_set(show):
    set_before = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --a=1"}
    assert show("gpu", CUDA_VISIBLE_DEVICES="0,1", XLA_CLIENT_MEM_FRACTION=".5", **set_before) == [
        set_before["XLA_FLAGS"], "", ".5", "",
    ]  # fmt: skip


def test_env_appends_to_what_is_set(show):
    assert show("gpu", CUDA_VISIBLE_DEVICES="0,1", XLA_FLAGS="--a=1")[0] == f"--a=1 {SCHEDULER}"


def test_env_tpu_leaves_out_what_libtpu_lacks(show, tmp_path):
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    (tmp_path / "libtpu" / "libtpu.so").write_bytes(b"".join(name.encode() + b"\0" for name in TPU))
    kept = show("tpu", PYTHONPATH=str(tmp_path))[1]
    assert kept.split() == [f"--{name}=true" for name in TPU]


def test_env_unknown_kind(workshop):
    done = workshop.bash(". launch/env.sh abacus")
    assert done.returncode == 2
    assert done.stderr == "usage: . launch/env.sh cpu|gpu|tpu\n"
