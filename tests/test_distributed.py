"""Processes on loopback: how they find each other, and that one failure ends them all."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxrlhf.config import Config, DistributedConfig, override
from jaxrlhf.distributed import (
    FAILED,
    Place,
    Watchdog,
    cluster,
    guarded,
    initialise,
    place,
    placeless,
)
from jaxrlhf.errors import InputError

FULL = {"coordinator": "localhost:1234", "processes": 2, "process": 1}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:99",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}

PROGRAM = """
import os, signal, sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrlhf.config import Config, override
from jaxrlhf.distributed import together

config = override(Config(), sys.argv[2:]).distributed
with together(config) as watchdog:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    mine = np.full(jax.local_device_count(), jax.process_index() + 1.0)
    x = jax.make_array_from_process_local_data(rows, mine)
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    print("sum", float(add(x)), "of", jax.process_count(), flush=True)
    for step in range(10_000):
        if sys.argv[1] == "end":
            break
        if step == 3 and jax.process_index() == 1:
            match sys.argv[1]:
                case "raise": raise ZeroDivisionError("on purpose")
                case "sleep": time.sleep(1000)
                case "kill": os.kill(os.getpid(), signal.SIGKILL)
                case "stop": os.kill(os.getpid(), signal.SIGSTOP)
                case "leave": break
        float(add(x))
        watchdog.feed()
"""


@pytest.fixture
def start():
    """Start PROGRAM once for each of several environments; whatever is left is killed."""
    running = []

    def run(mode, *places, words=()):
        for flags, variables in places:
            clean = {
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("JAX_C", "JAX_N", "JAX_P", "SLURM_", "OMPI_", "XLA_"))
            }
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, mode, *flags, *words],
                    env={**clean, "JAX_PLATFORMS": "cpu", **variables},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return running

    yield run
    for process in running:
        process.kill()
        process.communicate()


def free_port(above=0):
    """A port of loopback that nobody listens at; ``above`` it if the caller must choose."""
    while True:
        try:
            with socket.create_server(("127.0.0.1", above)) as server:
                return server.getsockname()[1]
        except OSError:
            above += 1


def by_flags(port, processes=2):
    at = f"127.0.0.1:{port}"
    return [
        (["--coordinator", at, "--processes", str(processes), "--process", str(i)], {})
        for i in range(2)
    ]


def ended(processes, seconds):
    """(status, output, errors) of each, all of which must have ended by then."""
    until = time.monotonic() + seconds
    texts = [
        process.communicate(timeout=max(0.1, until - time.monotonic())) for process in processes
    ]
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def test_place_prefers_flags():
    assert place(DistributedConfig(**FULL), JAX) == Place("localhost:1234", 2, 1)


def test_place_reads_variables():
    assert place(DistributedConfig(), JAX) == Place("10.0.0.1:99", 4, 3)


def test_place_joins_flags_and_variables():
    assert place(DistributedConfig(process=2), JAX) == Place("10.0.0.1:99", 4, 2)


def test_place_is_none_where_nothing_is_said():
    assert place(DistributedConfig(), {"JAX_PROCESS_ID": ""}) is None


@pytest.mark.parametrize("name", FULL)
def test_place_names_what_is_missing(name):
    rest = {key: value for key, value in FULL.items() if key != name}
    with pytest.raises(InputError, match=rf"^distributed\.{name}: missing, though .* is given"):
        place(DistributedConfig(**rest), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: must be a whole number"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0: must be at least 1"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: with 4 processes they are 0 to 3"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=node1: must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "a:65536"}, "JAX_COORDINATOR_ADDRESS=a:65536: must be HOST:"),
    ],
)
def test_place_refuses(change, message):
    with pytest.raises(InputError, match=message):
        place(DistributedConfig(), JAX | change)


def test_placeless_is_the_same_everywhere():
    one = Config(distributed=DistributedConfig(**FULL, watchdog=7.0))
    other = Config(distributed=DistributedConfig(**{**FULL, "process": 0}, watchdog=7.0))
    assert placeless(one) == placeless(other) == Config(distributed=DistributedConfig(watchdog=7.0))


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, ""),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, ""),
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU slice"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "a TPU slice"),
    ],
)
def test_cluster_sees_only_several(environ, name):
    assert cluster(environ) == name


def test_override_has_short_flags():
    config = override(Config(), ["--coordinator", "a:1", "--processes", "2", "--process", "0"])
    assert config.distributed == DistributedConfig("a:1", 2, 0)


def test_initialise_leaves_a_process_alone(monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("called"))
    assert initialise(DistributedConfig()) == 1
    assert initialise(DistributedConfig("localhost:1", 1, 0)) == 1


def test_initialise_refuses_a_busy_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=rf":{port}: process 0 cannot listen there"):
            initialise(DistributedConfig(f"127.0.0.1:{port}", 2, 0))


def test_guarded_lets_a_lone_process_raise():
    with pytest.raises(ZeroDivisionError), guarded():
        raise ZeroDivisionError


def places(how):
    port = free_port(61440 + os.getpid() % 4000)  # where Slurm and Open MPI have JAX look
    if how == "flags":
        return by_flags(port)
    named = {
        "variables": lambda i: {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        },
        "slurm": lambda i: (
            SLURM
            | {"SLURM_JOB_ID": str(port - 61440), "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        ),
        "ompi": lambda i: {
            "OMPI_MCA_orte_hnp_uri": f"{(port - 61440) << 12}.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(i),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
        },
    }[how]
    return [([], named(i)) for i in range(2)]


@pytest.mark.parametrize("how", ["flags", "variables", "slurm", "ompi"])
def test_together_comes_up(how, start):
    results = ended(start("end", *places(how)), 60)
    for i, (status, output, errors) in enumerate(results):
        assert status == 0, errors
        assert output == "sum 3.0 of 2\n"
        assert f"process {i} of 2: 1 of 2 devices (cpu)" in errors


def limit(seconds):
    return ["--distributed.initialization-timeout", str(seconds)]


def test_together_coordinator_missing(start):
    [_, late] = by_flags(free_port())
    [(status, _, errors)] = ended(start("end", late, words=limit(3)), 30)
    assert status == 2
    assert "still waiting for the others: did you start every worker?" in errors
    assert "error: process 1 of 2 at 127.0.0.1:" in errors
    assert "not all processes came up within 3 s" in errors


def test_together_worker_missing(start):
    [first, _] = by_flags(free_port())
    [(status, _, errors)] = ended(start("end", first, words=limit(3)), 30)
    assert status == 2
    assert "error: process 0 of 2 at 127.0.0.1:" in errors
    assert "not all processes came up within 3 s" in errors


def test_together_counts_disagree(start):
    port = free_port()
    first, other = by_flags(port, processes=2)[0], by_flags(port, processes=3)[1]
    results = ended(start("end", first, other, words=limit(4)), 40)
    assert all(status for status, _, _ in results)
    assert "the same --processes" in results[1][2]


@pytest.mark.parametrize("mode", ["raise", "sleep", "kill", "leave"])
def test_together_all_end(mode, start):
    words = ["--distributed.heartbeat", "5", "--distributed.watchdog", "6"]
    results = ended(start(mode, *by_flags(free_port()), words=words), 45)
    (first, _, first_errors), (second, _, second_errors) = results
    assert first not in (0, None), first_errors
    if mode == "raise":
        assert second == FAILED
        assert "ZeroDivisionError: on purpose" in second_errors
        assert "process 1 of 2: failed; all processes end" in second_errors
    if mode == "sleep":
        assert "time.sleep(1000)" in PROGRAM
        assert second == FAILED
        assert "process 1 of 2: no progress for 6 s (distributed.watchdog)" in second_errors
        assert 'File "<string>"' in second_errors  # the stacks
    if mode == "kill":
        assert second == -signal.SIGKILL
    if mode == "leave":
        assert second != 0, second_errors


def test_together_one_is_stopped(start):
    words = ["--distributed.heartbeat", "5", "--distributed.watchdog", "8"]
    first, second = start("stop", *by_flags(free_port()), words=words)
    [(status, _, errors)] = ended([first], 45)
    assert status != 0, errors
    second.send_signal(signal.SIGCONT)
    [(status, _, errors)] = ended([second], 20)
    assert status != 0, errors


HOLD = """
import re
from jaxrlhf.distributed import Watchdog
with Watchdog(1.0) as watchdog:
    re.match(r"(a|aa)+$", "a" * 60 + "b")
"""


def test_watchdog_ends_what_holds_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-c", HOLD], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "Timeout (0:00:06)!" in result.stderr
    assert "re.match" in HOLD
    assert "/re/" in result.stderr


def test_watchdog_sleeps_while_fed():
    code = """
import time
from jaxrlhf.distributed import Watchdog
with Watchdog(1.0) as watchdog:
    for _ in range(8):
        time.sleep(0.25)
        watchdog.feed()
time.sleep(1.5)
print("alive")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (0, "alive\n")


def test_watchdog_of_zero_seconds_does_nothing():
    with Watchdog(0) as watchdog:
        watchdog.feed()
