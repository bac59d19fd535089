"""Several processes, one run: how they find each other, and how they all end when one does.

Who a process is comes from the first of these that says anything: the config's ``distributed``
section, that is flags; the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
the cluster that started it, as JAX detects it (Open MPI, Slurm, TPU slices on GKE and on Cloud TPU
VMs). Else it is alone, and nothing here does anything.

A process that fails leaves the others waiting in a collective. So it ends at once, without the
tidying up that would wait for them; they hear no heartbeat from it any more, and end too.
"""

import faulthandler
import importlib.util
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax

from jaxrlhf.config import Config, DistributedConfig
from jaxrlhf.errors import InputError

FAILED = 13
"""Exit status of a process that ends because the run cannot go on."""

PATIENCE = 60
"""Seconds until a process says that it still waits for the others."""

GRACE = 5
"""Seconds that JAX's own timeouts have to say more than ``Deadline`` can."""

PARTS = (
    ("coordinator", "JAX_COORDINATOR_ADDRESS"),
    ("processes", "JAX_NUM_PROCESSES"),
    ("process", "JAX_PROCESS_ID"),
)
"""What a process has to be told: fields of the config, and the variables that say the same."""


@dataclass(frozen=True)
class Place:
    """One process among all.

    Args:
      coordinator: HOST:PORT at which process 0 listens.
      processes: how many there are.
      process: the number of this one, from 0.
    """

    coordinator: str
    processes: int
    process: int


def place(config: DistributedConfig, environ: Mapping[str, str]) -> Place | None:
    """Where this process stands, by flags and variables; None if neither says anything.

    Raises:
      InputError: one of the three is missing, is no number or is out of range.
    """
    unset = DistributedConfig()
    given: dict[str, tuple[str, Any]] = {}
    for name, variable in PARTS:
        if (value := getattr(config, name)) != getattr(unset, name):
            given[name] = (f"distributed.{name}", value)
        elif environ.get(variable):
            given[name] = (variable, environ[variable])
    if not given:
        return None
    for name, variable in PARTS:
        if name not in given:
            others = " and ".join(source for source, _ in given.values())
            raise InputError(
                f"distributed.{name}: missing, though {others} is given: give all three "
                f"(--{name}, or {variable}), or none, to have the cluster detected"
            )
    source, coordinator = given["coordinator"]
    if not re.fullmatch(r"\S+:\d+", coordinator) or int(coordinator.rpartition(":")[2]) > 65535:
        raise InputError(f"{source}={coordinator}: must be HOST:PORT of process 0")
    processes, process = (_whole(*given[name]) for name in ("processes", "process"))
    if processes < 1:
        raise InputError(f"{given['processes'][0]}={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise InputError(
            f"{given['process'][0]}={process}: with {processes} processes they are 0 to "
            f"{processes - 1}"
        )
    return Place(coordinator, processes, process)


def _whole(source: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(f"{source}={value}: must be a whole number") from None


def placeless(config: Config) -> Config:
    """``config`` without what tells one process from another: the same on all of them."""
    unset = DistributedConfig()
    same = {name: getattr(unset, name) for name, _ in PARTS}
    return replace(config, distributed=replace(config.distributed, **same))


def cluster(environ: Mapping[str, str]) -> str:
    """What started this process as one of several, as its variables say; "" if none does."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    slices = environ.get("MEGASCALE_NUM_SLICES") or "1"
    in_step = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}
    sizes = {
        "Open MPI": environ.get("OMPI_COMM_WORLD_SIZE")
        if "OMPI_MCA_orte_hnp_uri" in environ
        else 0,
        "Slurm": environ.get("SLURM_NTASKS") if in_step <= environ.keys() else 0,
        "a TPU slice": len(hosts.split(",")) * int(slices),
    }
    return next((name for name, size in sizes.items() if int(size or 0) > 1), "")


def initialise(config: DistributedConfig) -> int:
    """Bring up the processes of a run; must come before any other use of devices.

    Returns:
      How many there are.

    Raises:
      InputError: they cannot be told who they are, or did not all come up in time.
    """
    where = place(config, os.environ)
    found = cluster(os.environ) if where is None else ""
    if where is None and not found and not _may_have_tpu():
        return 1
    if where is not None and where.processes == 1:
        return 1
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if where is not None:
        _refuse_busy_port(where)
        named = f"process {where.process} of {where.processes} at {where.coordinator}"
        given = {
            "coordinator_address": where.coordinator,
            "num_processes": where.processes,
            "process_id": where.process,
            "cluster_detection_method": "deactivate",
        }
    else:
        named, given = f"a process of {found or 'a TPU slice'}", {}
    with Deadline(config.initialization_timeout, named):
        try:
            jax.distributed.initialize(
                **given,
                initialization_timeout=config.initialization_timeout,
                heartbeat_timeout_seconds=config.heartbeat,
                shutdown_timeout_seconds=int(min(300, config.watchdog or 300)),
            )
        except ValueError as error:  # what JAX says where it detects no cluster
            if where is None and not found:
                return 1
            raise InputError(
                f"{named}: {_line(error)}: give --coordinator HOST:PORT --processes N --process I"
            ) from None
        except RuntimeError as error:
            raise InputError(_lonely(named, config.initialization_timeout, _line(error))) from None
        if where is not None and jax.process_count() != where.processes:
            raise InputError(
                f"{named}: the backend has {jax.process_count()} processes: start all "
                "with the same --processes"
            )
        count = jax.process_count()
        here, there = jax.local_devices(), jax.device_count()
    print(
        f"process {jax.process_index()} of {count}: {len(here)} of {there} devices "
        f"({here[0].device_kind})",
        file=sys.stderr,
        flush=True,
    )
    return count


def _may_have_tpu() -> bool:
    """Whether JAX should look for a TPU slice, which no variable need tell."""
    wanted = (jax.config.jax_platforms or "tpu").split(",")
    return "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def _refuse_busy_port(where: Place) -> None:
    """Process 0 listens at the port; JAX would share it with another run's process 0."""
    port = int(where.coordinator.rpartition(":")[2])
    if where.process == 0:
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            raise InputError(
                f"distributed.coordinator={where.coordinator}: process 0 cannot listen there "
                f"({error.strerror}): choose another port"
            ) from None


def _lonely(named: str, seconds: float, reason: str) -> str:
    return (
        f"{named}: not all processes came up within {seconds:g} s ({reason}): is process 0 up "
        "and its port open, did you start every worker, all with the same --processes?"
    )


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


class Deadline:
    """``with Deadline(seconds, named):`` ends this process if what is inside takes longer."""

    def __init__(self, seconds: float, named: str):
        wait = min(PATIENCE, seconds / 2)
        text = f"{named}: still waiting for the others: did you start every worker?"
        self._timers = [
            threading.Timer(wait, print, (text,), {"file": sys.stderr, "flush": True}),
            threading.Timer(seconds + GRACE, end, (_lonely(named, seconds, "they disagree"), 2)),
        ]

    def __enter__(self) -> None:
        for timer in self._timers:
            timer.daemon = True
            timer.start()

    def __exit__(self, *error: Any) -> None:
        for timer in self._timers:
            timer.cancel()


class Watchdog:
    """``with Watchdog(seconds) as watchdog:`` ends this process when nothing calls ``feed``.

    Args:
      seconds: most time between two calls of ``feed``; 0: there is no watchdog.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._fed = time.monotonic()
        self._stop = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.feed()
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def feed(self) -> None:
        """The run goes on."""
        self._fed = time.monotonic()
        if self.seconds:  # for C code that keeps the interpreter to itself, a regex say
            faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._fed > self.seconds:
                faulthandler.dump_traceback(all_threads=True)
                end(
                    f"{_me()}: no progress for {self.seconds:g} s (distributed.watchdog): "
                    "its stacks are above; all processes end"
                )


@contextmanager
def guarded() -> Iterator[None]:
    """End this process at once when what is inside raises, where others would wait for it."""
    try:
        yield
    except BaseException as error:
        done = isinstance(error, SystemExit) and not error.code
        if done or not jax.distributed.is_initialized():
            raise
        if isinstance(error, InputError):
            end(f"error: {_me()}: {error}", 2)
        if isinstance(error, KeyboardInterrupt):
            end(f"{_me()}: interrupted; all processes end", 130)
        traceback.print_exc()
        end(f"{_me()}: failed; all processes end")


@contextmanager
def together(config: DistributedConfig) -> Iterator[Watchdog]:
    """Bring up the processes, watch over what is inside, and end all if one fails.

    Yields:
      A watchdog to be fed while the run goes on; an idle one for a process alone.
    """
    try:
        count = initialise(config)
    except InputError as error:
        if jax.distributed.is_initialized():  # a half-made connection would hold up a tidy exit
            end(f"error: {error}", 2)
        raise
    with Watchdog(config.watchdog if count > 1 else 0) as watchdog, guarded():
        yield watchdog
        if count > 1:
            jax.distributed.shutdown()  # waits for the others; one that has failed never comes


def end(message: str, status: int = FAILED) -> NoReturn:
    """Say why, and end this process without waiting for any other."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _me() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"
