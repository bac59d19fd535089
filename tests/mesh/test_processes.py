"""How processes find each other, what they say when they do not, and what they tell each other;
two processes on loopback at most."""

import os
import socket

import jax
import numpy as np
import pytest
from loopback import by_flags, free_port, results

from jaxrlhf.config import Config, DistributedConfig, override
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.processes import (
    any_process,
    assemble,
    cluster,
    initialise,
    own_share,
    place,
    placeless,
)
from jaxrlhf.mesh.sharding import fetch

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


@pytest.mark.parametrize(
    ("config", "environ", "found"),
    [
        (DistributedConfig(**FULL), JAX, DistributedConfig(**FULL)),
        (DistributedConfig(), JAX, DistributedConfig("10.0.0.1:99", 4, 3)),
        (DistributedConfig(process=2), JAX, DistributedConfig("10.0.0.1:99", 4, 2)),
        (DistributedConfig(), {"JAX_PROCESS_ID": ""}, None),
    ],
)
def test_place_prefers_flags_to_variables(config, environ, found):
    assert place(config, environ) == found


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


def places(how):
    port = free_port(61440 + os.getpid() % 4000)  # where Slurm and Open MPI have JAX look
    if how == "flags":
        return by_flags(port)
    job = port - 61440
    same, own = {
        "variables": (
            {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"},
            ["JAX_PROCESS_ID"],
        ),
        "slurm": (SLURM | {"SLURM_JOB_ID": str(job)}, ["SLURM_PROCID", "SLURM_LOCALID"]),
        "ompi": (
            {
                "OMPI_MCA_orte_hnp_uri": f"{job << 12}.0;tcp://127.0.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "2",
            },
            ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"],
        ),
    }[how]
    return [([], same | dict.fromkeys(own, str(i))) for i in range(2)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "how",
    ["flags", "slurm", pytest.param("variables", marks=SLOW), pytest.param("ompi", marks=SLOW)],
)
def test_together_comes_up(how):
    for i, (status, output, errors) in enumerate(results("end", *places(how))):
        assert status == 0, errors
        assert output.splitlines()[-1] == "sum 3.0 of 2"  # after a line of gloo's
        assert f"process {i} of 2: 1 of 2 devices (cpu)" in errors


def limit(seconds):
    return ["--distributed.initialization-timeout", str(seconds)]


@pytest.mark.parametrize("alone", [0, 1])
def test_together_other_is_missing(alone):
    where = by_flags(free_port())[alone]
    [(status, _, errors)] = results("end", where, words=limit(3))
    assert status == 2
    assert "still waiting for the others: did you start every worker?\n" in errors
    assert errors.splitlines()[-1].startswith(f"error: process {alone} of 2 at 127.0.0.1:")
    assert "after 3 s not all processes are there: is process 0 up and its port open" in errors


@pytest.mark.slow
def test_together_counts_disagree():
    port = free_port()
    first, other = by_flags(port, processes=2)[0], by_flags(port, processes=3)[1]
    words = [*limit(4), "--distributed.heartbeat", "4"]
    (one, _, _), (two, _, errors) = results("end", first, other, words=words)
    assert one not in (0, None)
    assert two not in (0, None)
    assert "all with the same --processes" in errors


@pytest.mark.parametrize(("count", "processes"), [(7, 3), (2, 3), (8, 2), (0, 2)])
def test_own_share_covers_everything_once(monkeypatch, count, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    seen = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        seen += list(range(count))[own_share(count)]
    assert seen == list(range(count))


def test_alone_nothing_is_exchanged():
    whole = assemble(np.array([0.1, np.nan]), slice(1, 3), 3)
    np.testing.assert_array_equal(whole, [0, 0.1, np.nan])
    assert any_process(True)
    assert not any_process(False)
    assert fetch({"a": jax.numpy.arange(2)})["a"].tolist() == [0, 1]
