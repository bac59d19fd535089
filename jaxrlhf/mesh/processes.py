"""Several processes, one run: how they find each other, and what they tell each other.

Who a process is comes from the first of these that says anything: the config's ``distributed``
section, that is flags; the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
the cluster that started it, as JAX detects it (Open MPI, Slurm, TPU slices on GKE and on Cloud TPU
VMs). Else it is alone, and nothing here does anything.

``assemble``, ``any_process``, ``all_or_none``, ``by_first`` and ``jointly``, and
``sharding.fetch``, are collectives: every process calls them, in the same order. A process alone
has it all, and exchanges nothing.
"""

import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrlhf.config import Config, DistributedConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.messages import exchange, post, posted, withdraw
from jaxrlhf.mesh.signals import Stop
from jaxrlhf.mesh.watchdog import GRACE, ElsewhereError, Watchdog, deadline, end, guarded

PARTS = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
"""What a process has to be told: fields of the config, and the variables that say the same."""

UNTOLD = {name: getattr(DistributedConfig(), name) for name in PARTS}
"""Those fields where the config leaves them open."""

WATCHDOG = 300.0
"""``distributed.watchdog`` of several processes, where the config leaves it open."""

LATE = (
    "not all processes are there: is process 0 up and its port open, did you start every worker, "
    "all with the same --processes?"
)
"""What may be wrong where some never come."""


@contextmanager
def together(config: DistributedConfig) -> Iterator[Watchdog]:
    """Bring up the processes, watch over what is inside, and end all if one fails.

    Yields:
      A watchdog to be fed while the run goes on; an idle one for a process alone, unless asked for.
    """
    try:
        count = initialise(config)
    except InputError as error:
        # A half-made connection would hold up a tidy exit.
        if jax.distributed.is_initialized():
            end(f"error: {error}", 2)
        raise
    learns = config.watchdog is None
    with Watchdog(limit(config, count), learns) as watchdog, guarded():
        try:
            yield watchdog
        except SystemExit:  # any other error ends this process, which the others hear at once
            watchdog.leave()
            raise
        watchdog.leave()
        if count > 1:
            # Waits for the others, watched and guarded: one that has failed never comes.
            jax.distributed.shutdown()


def limit(config: DistributedConfig, count: int = 2) -> float:
    """Seconds without progress that ``count`` processes may take; 0: any number."""
    # One that is alone keeps nobody waiting but its user, who sees it.
    default = WATCHDOG if count > 1 else 0.0
    return default if config.watchdog is None else config.watchdog


def initialise(config: DistributedConfig) -> int:
    """Bring up the processes of a run; must come before any other use of devices.

    Returns:
      How many there are.

    Raises:
      InputError: they cannot be told who they are, or did not all come up in time.
    """
    where = place(config, os.environ)
    found = "" if where else cluster(os.environ)
    # No variable need tell of a TPU slice: where there may be one, JAX looks for it.
    alone = where.processes == 1 if where else not (found or _may_have_tpu())
    if alone:
        return 1
    _settings()
    named, given = f"a process of {found or 'a TPU slice'}", {}
    if where:
        _refuse_busy_port(where)
        named = f"process {where.process} of {where.processes} at {where.coordinator}"
        given = {
            "coordinator_address": where.coordinator,
            "num_processes": where.processes,
            "process_id": where.process,
            "cluster_detection_method": "deactivate",
        }
    with deadline(config.initialization_timeout, named, LATE):
        try:
            jax.distributed.initialize(
                **given,
                # JAX's own aborts without a word to the user: our deadline comes before it.
                initialization_timeout=config.initialization_timeout + GRACE,
                heartbeat_timeout_seconds=config.heartbeat,
                shutdown_timeout_seconds=max(1, int(min(300, limit(config) or 300))),
            )
        except ValueError as error:
            # What JAX says where it detects no cluster.
            if not (where or found):
                return 1
            raise InputError(
                f"{named}: {_line(error)}: give --coordinator HOST:PORT --processes N --process I"
            ) from None
        except RuntimeError as error:
            raise InputError(f"{named}: could not join the others: {_line(error)}") from None
        # The first use of devices, whose list the processes exchange: still a wait for the others.
        count = jax.process_count()
        if where and count != where.processes:
            raise InputError(
                f"{named}: the backend has {count} processes: start all with the same --processes"
            )
        here, there = jax.local_devices(), jax.device_count()
        _meet()
    print(
        f"process {jax.process_index()} of {count}: {len(here)} of {there} devices "
        f"({here[0].device_kind})",
        file=sys.stderr,
        flush=True,
    )
    return count


def _settings() -> None:
    """Those of JAX that count once processes join."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would take a SIGTERM in that comes before ``Signals`` listens, and nobody asks it.
    jax.config.update("jax_enable_preemption_service", False)


def _meet() -> None:
    """Exchange arrays for the first time. On CPUs, Gloo waits 30 s for the others there: that is
    to be now, when all are here, and not where one still compiles what another has in its cache."""
    if jax.default_backend() == "cpu":
        exchange("")
        multihost_utils.sync_global_devices("jaxrlhf")


def place(config: DistributedConfig, environ: Mapping[str, str]) -> DistributedConfig | None:
    """``config`` with all of PARTS, from flags and variables; None if neither says anything.

    Raises:
      InputError: one of the three is missing, is no number or is out of range.
    """
    given: dict[str, tuple[str, Any]] = {}
    for name, variable in PARTS.items():
        if (value := getattr(config, name)) != UNTOLD[name]:
            given[name] = (f"distributed.{name}", value)
        elif environ.get(variable):
            given[name] = (variable, environ[variable])
    if not given:
        return None
    if missing := [name for name in PARTS if name not in given]:
        name, others = missing[0], " and ".join(source for source, _ in given.values())
        raise InputError(
            f"distributed.{name}: missing, though {others} is given: give all three "
            f"(--{name}, or {PARTS[name]}), or none, to have the cluster detected"
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
    return replace(config, coordinator=coordinator, processes=processes, process=process)


def _whole(source: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(f"{source}={value}: must be a whole number") from None


def placeless(config: Config) -> Config:
    """``config`` without what tells one process from another: the same on all of them."""
    return replace(config, distributed=replace(config.distributed, **UNTOLD))


def cluster(environ: Mapping[str, str]) -> str:
    """What started this process as one of several, as its variables say; "" if none does."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    slices = environ.get("MEGASCALE_NUM_SLICES") or "1"
    by_mpi = "OMPI_MCA_orte_hnp_uri" in environ
    # A shell inside a Slurm allocation has some of these, but is no task: only a step has all.
    in_step = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}
    sizes = {
        "Open MPI": environ.get("OMPI_COMM_WORLD_SIZE") if by_mpi else 0,
        "Slurm": environ.get("SLURM_NTASKS") if in_step <= environ.keys() else 0,
        "a TPU slice": len(hosts.split(",")) * int(slices),
    }
    return next((name for name, size in sizes.items() if int(size or 0) > 1), "")


def _may_have_tpu() -> bool:
    wanted = (getattr(jax.config, "jax_platforms", None) or "tpu").split(",")
    return "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def _refuse_busy_port(where: DistributedConfig) -> None:
    """Process 0 listens at the port; JAX would share it with another run's process 0."""
    if where.process == 0:
        try:
            socket.create_server(("", int(where.coordinator.rpartition(":")[2]))).close()
        except OSError as error:
            raise InputError(
                f"distributed.coordinator={where.coordinator}: process 0 cannot listen there "
                f"({error.strerror}): choose another port"
            ) from None


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def is_first() -> bool:
    """Whether this process is the one that writes files and the terminal."""
    return jax.process_index() == 0


def own_share(count: int) -> slice:
    """Which of ``count`` things this process does: a stretch of them, about as long on each."""
    index, processes = jax.process_index(), jax.process_count()
    return slice(count * index // processes, count * (index + 1) // processes)


def assemble(part_R: np.ndarray, rows: slice, count: int) -> np.ndarray:
    """``count`` float64 numbers out of the parts of them that the processes have.

    Args:
      part_R: this process's.
      rows: where they belong; no number belongs to two processes.
    """
    whole_N = np.zeros(count)
    whole_N[rows] = part_R
    if jax.process_count() == 1:
        return whole_N
    # jax has no float64 unless asked: each number travels as two halves, bit for bit. The sum is
    # exact, as all but one of its terms are 0.
    bits = multihost_utils.process_allgather(whole_N.view(np.uint32))
    return np.ascontiguousarray(bits).view(np.float64).reshape(-1, count).sum(0)


def any_process(here: bool) -> bool:
    """Whether it is so on at least one process."""
    return any(exchange("yes" if here else ""))


STOPPED = "stopped"
"""What a process says whose work was ended by ``Stop``."""


def all_or_none(work: Callable[[], Any]) -> Any:
    """What ``work``, which exchanges nothing, returns; if it fails on a process, it fails on all.

    Raises:
      Exception: whatever it raised here.
      ElsewhereError: it failed on another process, which the message names with the reason.
      Stop: it failed on none, and was stopped on at least one.
    """
    if jax.process_count() == 1:
        return work()
    failed: BaseException | None = None
    result = None
    try:
        result = work()
    except (Exception, Stop) as error:
        failed = error
    # The others wait for an answer, of whichever kind.
    said = exchange(_said(failed))
    if isinstance(failed, Exception):
        raise failed
    _refuse({process: text for process, text in enumerate(said) if text != STOPPED})
    if STOPPED in said:
        raise Stop("SIGTERM") from failed
    return result


def by_first(decide: Callable[[], Any]) -> Any:
    """What ``decide`` returns on process 0, on all of them: JSON-able.

    For what is read from a disk or a clock: where each looked for itself, one could see what
    another does not, and go a way on which nobody else comes.

    Raises:
      Exception: as ``all_or_none``.
    """
    if jax.process_count() == 1:
        return decide()
    said = all_or_none(lambda: json.dumps(decide()) if is_first() else "")
    return json.loads(exchange(said)[0])


_joint = itertools.count()


def jointly(work: Callable[[], Any], pause: float = 0.2) -> Any:
    """As ``all_or_none``, for ``work`` in which the processes wait for each other by themselves.

    Where it fails on one, the others would wait in it for the one that never comes. So it is done
    in a thread of its own, which is left behind then: it must not matter how it ends.

    Args:
      pause: most seconds between two looks at how the others fare.
    """
    if jax.process_count() == 1:
        return work()
    here, outcome = next(_joint), _Outcome(work)
    topic = f"joint/{here}"
    wait, mine = 0.001, False
    while True:
        outcome.join(wait)
        wait = min(2 * wait, pause)
        if not (mine or outcome.is_alive()):
            post(topic, _said(outcome.error))
            mine = True
        said = posted(topic)
        if len(said) == jax.process_count() or any(said.values()):
            break
    if outcome.error is not None:
        raise outcome.error
    _refuse(said)
    # All have come here, so nobody looks at the one before any more.
    withdraw(f"joint/{here - 1}")
    return outcome.result


class _Outcome(threading.Thread):
    """A thread that keeps what comes of its work."""

    def __init__(self, work: Callable[[], Any]):
        super().__init__(name="joint work", daemon=True)
        self._work = work
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error


class Meeting:
    """How the threads of a library that saves wait for those of the other processes.

    Called as orbax calls its ``barrier_sync_fn``. A thread that has failed on one process skips its
    meetings and comes to ``LAST`` alone: those who wait for it at an earlier one then fail too, and
    do not wait until their time is up.

    Args:
      name: tells these meetings from those of another instance; the same on all processes.
    """

    LAST = "set_value_start"
    """The end of the name of the meeting that all come to, whatever has happened before."""

    _count = itertools.count()

    def __init__(self):
        self.name = f"saves-{next(Meeting._count)}"
        self._over = threading.Event()
        self._held: Counter[str] = Counter()
        self._last = ""
        self._topics: list[str] = []

    def leave(self) -> None:
        """Wait for nobody any more, here: what is being met for has failed."""
        self._over.set()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Return once all processes have called this with ``key``, as often as this one.

        Raises:
          TimeoutError: one has not come in time.
          RuntimeError: one has failed, or this one has left.
        """
        self._held[key] += 1
        if key.endswith(self.LAST):
            self._last = key
        topic = self._topic(key, self._held[key])
        skipped = self._topic(self._last, self._held[self._last] + 1)
        post(topic, "")
        until, pause = time.monotonic() + timeout_ms / 1000, 0.001
        while True:
            # Looked at first: who has gone on from here has been here.
            failed = self._over.is_set() or posted(skipped)
            if len(posted(topic)) == jax.process_count():
                break
            if failed:
                raise RuntimeError("another process has failed in this save")
            if time.monotonic() > until:
                raise TimeoutError(f"another process has not come to {key}")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        # All have come to this one, so nobody looks at those before any more.
        for done in self._topics if key == self._last else ():
            withdraw(done)
        self._topics = [topic] if key == self._last else [*self._topics, topic]

    def _topic(self, key: str, count: int) -> str:
        return f"meeting/{self.name}/{key}/{count}"


def _said(error: BaseException | None) -> str:
    """What to tell the others of how a piece of work ended; nothing if all went well."""
    if isinstance(error, Stop):
        return STOPPED
    return "" if error is None else f"{type(error).__name__}: {_line(error)}"


def _refuse(said: Mapping[int, str]) -> None:
    """Raise ElsewhereError for the first process that has failed."""
    for process, text in sorted(said.items()):
        if text:
            raise ElsewhereError(f"another process has failed: process {process}: {text}")


def pace(tree: Any) -> Any:
    """The same arrays, waited for where it must be: processes on CPUs exchange nothing any more,
    and wait for ever, once some tens of programs are in flight."""
    several = jax.process_count() > 1 and jax.default_backend() == "cpu"
    return jax.block_until_ready(tree) if several else tree
