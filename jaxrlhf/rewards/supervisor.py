"""Starts a worker, and ends it, with all that it has started, once it or the run has ended.

``python -m jaxrlhf.rewards.supervisor SOCKET`` starts a worker, which serves SOCKET, and waits.
Only code of this file runs here: whatever the worker is stuck in, this process hears at once that
its standard input is closed, which a run keeps open as long as it lives and wants the worker.

On Linux it is the parent of all whose own has gone, daemons included, and kills them too; and the
worker is killed when this process is. Elsewhere what leaves the worker's process group stays, and
so does a worker whose supervisor is killed.

It imports little: it stays for the whole run, and takes about 12 MB.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

LINUX = sys.platform == "linux"

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux's prctl(2)."""

LOOK = 1.0
"""Seconds between looks whether the run is still there, if its end of the pipe lives on in a fork
of it."""


def main(handle: int) -> None:
    """Have a worker serve the socket of this descriptor, and end as it has ended."""
    parent = os.getppid()
    if LINUX:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    # A scheduler may tell every process of a job to end; the run decides when a worker is to.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # A handler, so that the end of a child is written to the pipe, which select waits for.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    supervisor, worker = os.getpid(), os.fork()
    if worker == 0:
        _become_worker(handle, supervisor)
    os.close(handle)  # so that the end of the worker is the end of the connection
    status = _attend(worker, parent, woken)
    end_all(worker)
    _end_as(status)


def _become_worker(handle: int, supervisor: int) -> NoReturn:
    if LINUX:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it has ended before this could be said
        os._exit(1)
    os.setsid()  # a signal to the worker's group does not reach the supervisor
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "jaxrlhf.rewards.worker", str(handle)])


def _attend(worker: int, parent: int, woken: int) -> int:
    """The wait status of the worker once it has ended, or of a kill once the run has."""
    while True:
        readable, _, _ = select.select([0, woken], [], [], LOOK)
        if 0 in readable or os.getppid() != parent:
            return signal.SIGKILL
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    return ended[1]


def end_all(worker: int) -> None:
    """Kill the worker and all children of this process, until none is left."""
    if not LINUX:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker, signal.SIGKILL)
    while True:
        # The children of those that are killed are this process's at the next turn.
        for child in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.005)
        except ChildProcessError:
            return


def children(parent: int) -> list[int]:
    """The processes whose parent is ``parent``, as Linux lists them; none elsewhere."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        # A process may end while it is looked at. Its name, in brackets, may hold anything.
        with contextlib.suppress(OSError):
            if int(path.read_bytes().rpartition(b")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def _end_as(status: int) -> NoReturn:
    """End as a process with this wait status has, so that whoever waits sees the same."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


if __name__ == "__main__":
    main(int(sys.argv[1]))
