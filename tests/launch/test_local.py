"""Several processes on one machine: their environment, their output, their end."""

SUM = """
import jax, numpy as np
from jaxrlhf.config import DistributedConfig
from jaxrlhf.distributed import together
from jax.sharding import NamedSharding, PartitionSpec

with together(DistributedConfig()):
    rows = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
    mine = np.full(2, jax.process_index() + 1.0)
    print("sum", jax.make_array_from_process_local_data(rows, mine).sum())
"""


def test_local_tells_each_its_place(workshop):
    names = "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS $JAX_PLATFORMS $XLA_FLAGS"
    show = f'echo "{names}"'
    done = workshop.run(
        "local.sh", "-n", "2", "-d", "4", "-p", "4321", "--", "bash", "-c", show,
        XLA_FLAGS="--a=1 --xla_force_host_platform_device_count=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    flags = "--a=1 --xla_force_host_platform_device_count=4"
    assert sorted(done.stdout.splitlines()) == [
        f"[{i}] {i}/2 127.0.0.1:4321 cpu {flags}" for i in range(2)
    ]


def test_local_runs_the_command(workshop):
    python = workshop.fake("python", '#!/bin/bash\necho "$@"\n')
    done = workshop.run(
        "local.sh", "-n", "1", "-p", "1", "train", "x.yaml", "--steps", "3", PYTHON=python
    )
    assert done.stdout == "[0] -m jaxrlhf train x.yaml --steps 3\n"


def test_local_one_failure_ends_all(workshop):
    code = "[[ $JAX_PROCESS_ID == 0 ]] && exec sleep 50; exit 7"
    done = workshop.run("local.sh", "-p", "1", "--", "bash", "-c", code, GRACE_SECONDS="100")
    assert done.returncode == 7  # before GRACE_SECONDS are over, or run would have given up


def test_local_kills_what_does_not_listen(workshop):
    code = "[[ $JAX_PROCESS_ID == 0 ]] || exit 7; trap '' TERM; while true; do sleep .1; done"
    done = workshop.run("local.sh", "-p", "1", "--", "bash", "-c", code, GRACE_SECONDS="1")
    assert done.returncode == 7


def test_local_passes_sigterm_on(workshop):
    code = "trap 'echo saved; exit 0' TERM; echo up; while true; do sleep .1; done"
    process = workshop.start("local.sh", "-p", "1", "--", "bash", "-c", code)
    assert {process.stdout.readline(), process.stdout.readline()} == {"[0] up\n", "[1] up\n"}
    process.terminate()
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]


def test_local_brings_jax_up(workshop, tmp_path):
    (tmp_path / "sum.py").write_text(SUM)
    python = workshop.environ()["PYTHON"]
    done = workshop.run("local.sh", "-n", "2", "-d", "2", "--", python, str(tmp_path / "sum.py"))
    assert done.returncode == 0, done.stderr
    # gloo's threads print too, and their lines mix: blank ones among them
    lines = [line for line in done.stdout.splitlines() if "sum" in line]
    assert sorted(lines) == ["[0] sum 6.0", "[1] sum 6.0"]
