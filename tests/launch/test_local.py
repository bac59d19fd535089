"""One machine: local.sh's processes, the command that gpu.sh becomes, and what a container runs."""

import signal

import pytest
from workshop import UNTIL_TERM

SUM = """
import jax, numpy as np
from jaxrlhf.config import DistributedConfig
from jaxrlhf.mesh.processes import together
from jax.sharding import NamedSharding, PartitionSpec

with together(DistributedConfig()):
    rows = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
    mine = np.full(2, jax.process_index() + 1.0)
    print("sum", jax.make_array_from_process_local_data(rows, mine).sum())
"""


def test_local_tells_each_its_place(workshop):
    names = "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS $JAX_PLATFORMS $XLA_FLAGS"
    output = workshop.output(
        "local.sh", "-n", "2", "-d", "4", "-p", "4321", "--", "bash", "-c", f'echo "{names}"',
        XLA_FLAGS="--a=1 --xla_force_host_platform_device_count=8",
    )  # fmt: skip
    flags = "--a=1 --xla_force_host_platform_device_count=4"
    assert sorted(output.splitlines()) == [
        f"[{i}] {i}/2 127.0.0.1:4321 cpu {flags}" for i in range(2)
    ]


def test_local_runs_the_command(workshop):
    python = workshop.fake("python", '#!/bin/bash\necho "$@"\n')
    words = ["-n", "1", "-p", "1", "train", "x.yaml", "--steps", "3"]
    output = workshop.output("local.sh", *words, PYTHON=python)
    assert output == "[0] -m jaxrlhf train x.yaml --steps 3\n"


@pytest.mark.parametrize(
    ("other", "grace"),
    [
        ("exec sleep 50", "100"),  # ends before that, or run would have given up
        ("trap '' TERM; while true; do sleep .1; done", "1"),
    ],
)
def test_local_one_failure_ends_all(workshop, other, grace):
    code = f"[[ $JAX_PROCESS_ID == 0 ]] || exit 7; {other}"
    done = workshop.run("local.sh", "-p", "1", "--", "bash", "-c", code, GRACE_SECONDS=grace)
    assert done.returncode == 7


@pytest.mark.parametrize("status", [0, 13])
def test_local_passes_sigterm_on(workshop, status):
    """Early or late: to those that it has not noted down yet, and for those that have gone."""
    trainer = workshop.fake("trainer", UNTIL_TERM.format(status=status))
    process = workshop.start("local.sh", "-p", "1", "--", trainer, **workshop.slowly())
    assert {process.stdout.readline(), process.stdout.readline()} == {"[0] up\n", "[1] up\n"}
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]


def test_local_brings_jax_up(workshop, tmp_path):
    (tmp_path / "sum.py").write_text(SUM)
    python = workshop.environ()["PYTHON"]
    output = workshop.output("local.sh", "-n", "2", "-d", "2", "--", python, f"{tmp_path}/sum.py")
    # gloo's threads print too, and their lines mix: blank ones among them
    lines = [line for line in output.splitlines() if "sum" in line]
    assert sorted(lines) == ["[0] sum 6.0", "[1] sum 6.0"]


def test_gpu_trains(workshop):
    show = '#!/bin/bash\necho "$JAX_PLATFORMS $XLA_CLIENT_MEM_FRACTION $*"\n'
    python = {"PYTHON": workshop.fake("python", show)}
    words = ["x.yaml", "--steps", "3"]
    output = workshop.output("gpu.sh", *words, CUDA_VISIBLE_DEVICES="0", **python)
    assert output == "cuda,cpu .9 -m jaxrlhf train x.yaml --steps 3\n"
    errors = workshop.refusal("gpu.sh", *words, **python)
    assert errors.startswith("error: no GPU: nvidia-smi lists none")
    workshop.refusal("gpu.sh", *words, CUDA_VISIBLE_DEVICES="", **python)
    assert "CONFIG" in workshop.refusal("gpu.sh", "--steps", "3")


def test_pod_runs_the_command(workshop):
    python = workshop.fake("python", '#!/bin/bash\necho "$JAX_PLATFORMS $*"\nexit 5\n')
    done = workshop.run("pod.sh", "train", "x.yaml", DEVICE="cpu", PYTHON=python)
    assert (done.returncode, done.stdout) == (5, "cpu -m jaxrlhf train x.yaml\n")
    errors = workshop.refusal("pod.sh", "train", "x.yaml")
    assert errors.startswith("error: DEVICE (cpu, gpu or tpu) is missing")


@pytest.mark.parametrize(("status", "expected"), [(0, 143), (13, 13)])
def test_pod_stopped_is_started_again(workshop, status, expected):
    """A stopped run is not a finished one, however late its launcher hears of both."""
    python = workshop.fake("python", UNTIL_TERM.format(status=status))
    given = {"DEVICE": "cpu", "PYTHON": python} | workshop.slowly()
    process = workshop.start("pod.sh", "train", "x.yaml", **given)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (expected, "saved\n"), errors
