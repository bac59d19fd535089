"""Two processes on loopback that step together, until one of them does something else."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

PROGRAM = """
import os, signal, sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrlhf.config import Config, override
from jaxrlhf.mesh.processes import together

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
        if step == 12 and jax.process_index() == 1:
            match sys.argv[1]:
                case "raise": raise ZeroDivisionError("on purpose")
                case "sleep": time.sleep(1000)
                case "kill": os.kill(os.getpid(), signal.SIGKILL)
                case "term": os.kill(os.getpid(), signal.SIGTERM)  # to which nobody listens
                case "stop": os.kill(os.getpid(), signal.SIGSTOP)
                case "leave": break
        float(add(x))
        watchdog.feed()
"""


@contextmanager
def started(mode, *places, words=(), program=PROGRAM):
    """A program once for each place, a pair of flags and variables; what is left is killed."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_C", "JAX_N", "JAX_P", "SLURM_", "OMPI_", "XLA_"))
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(mode), *flags, *words],
            env={**clean, "JAX_PLATFORMS": "cpu", "PYTHONFAULTHANDLER": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags, variables in places
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def told(processes, seconds):
    """(output, errors) of each, all of which must have ended by then.

    All are heard at once: where a pipe is full its process waits, and with it the others.
    """
    hung = []

    def hear(process):
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            hung.append(process.args)
            process.send_signal(signal.SIGABRT)  # faulthandler says where it is
            return process.communicate(timeout=10)

    with ThreadPoolExecutor(len(processes)) as pool:
        texts = list(pool.map(hear, processes))
    assert not hung, texts
    return texts


def ended(processes, seconds=50):
    """(status, output, errors) of each, all of which must have ended by then."""
    texts = told(processes, seconds)
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def results(mode, *places, words=()):
    """``ended`` of PROGRAM at these places."""
    with started(mode, *places, words=words) as running:
        return ended(running)


def by_flags(port, processes=2):
    """The places of two processes, told by flags."""
    at = f"127.0.0.1:{port}"
    count = str(processes)
    return [
        (["--coordinator", at, "--processes", count, "--process", str(i)], {}) for i in range(2)
    ]


def free_port(above=0):
    """A port of loopback that nobody listens at; the first from ``above`` on, if that is given."""
    while True:
        try:
            with socket.create_server(("127.0.0.1", above)) as server:
                return server.getsockname()[1]
        except OSError:
            above += 1
