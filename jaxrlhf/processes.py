"""What the processes of one run tell each other; a process alone has it all, and exchanges nothing.

``fetch``, ``assemble``, ``any_process`` and ``all_or_none`` are collectives: every process calls
them, in the same order.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def fetch(tree: Any) -> Any:
    """Arrays, wherever on the mesh they lie → numpy arrays of the same shapes, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_replicated or x.is_fully_addressable:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


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
    bits = multihost_utils.process_allgather(whole_N.view(np.uint32))  # jax has no float64
    return np.ascontiguousarray(bits).view(np.float64).reshape(-1, count).sum(0)


def any_process(here: bool) -> bool:
    """Whether it is so on at least one process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).any())


def all_or_none(work: Callable[[], Any]) -> Any:
    """What ``work``, which exchanges nothing, returns; if it fails on a process, it fails on all.

    Raises:
      Exception: whatever it raised here.
      ValueError: it failed on another process.
    """
    failed, result = None, None
    try:
        result = work()
    except Exception as error:
        failed = error
    anywhere = any_process(failed is not None)
    if failed is not None:
        raise failed
    if anywhere:
        raise ValueError("another process has failed")
    return result


def pace(tree: Any) -> Any:
    """The same arrays, waited for where it must be: processes on CPUs exchange nothing any more,
    and wait for ever, once some tens of programs are in flight."""
    several = jax.process_count() > 1 and jax.default_backend() == "cpu"
    return jax.block_until_ready(tree) if several else tree


def is_first() -> bool:
    """Whether this process is the one that writes files and the terminal."""
    return jax.process_index() == 0
