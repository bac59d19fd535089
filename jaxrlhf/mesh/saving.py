"""How orbax is asked to write the steps of a run, and kept from saying what we say ourselves.

Where all processes see one folder, they write into it together: each its pieces, which process 0
joins. Where each has a folder of its own (``Elsewhere``), none waits for another, and nothing is
joined: an array is a folder of files, one for each piece, so that the files of all processes side
by side are the step as one process would have written it.
"""

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxrlhf.mesh.notes import beside
from jaxrlhf.mesh.processes import Meeting


class Elsewhere(Protocol):
    """Where the steps of several processes come together that share no folder."""

    folder: Path
    """This process's own: its pieces of each step, and what it has brought of the others'."""

    def offer(self, step: int) -> None:
        """A step is on the disks of all; all processes call this, and it does not wait."""

    def bring(self, step: int, wanted: Mapping[str, Any]) -> None:
        """Bring of a step what this process wants and has not got: ``wanted`` as ``restore``'s
        ``abstract``, by name."""


BARRIER_SECONDS = 600
"""Seconds that a process waits in a save for another one that does not come."""


def writer(
    folder: Path, keep: int, leaves: Mapping[str, jax.Array], meeting: Meeting | None, own: bool
) -> ocp.CheckpointManager:
    """Writes checkpoints.

    Args:
      keep: the newest that stay.
      leaves: such arrays as will be saved.
      meeting: how its threads wait for those of other processes; None: it has none to wait for.
      own: whether the folder is this process's own, and others have theirs.
    """
    # where a directory cannot be made: an error now, not threads that wait for 20 minutes
    how = ocp.AsyncOptions(create_directories_asynchronously=False)
    among = ocp.options.MultiprocessingOptions()
    if meeting is not None:
        how.timeout_secs, how.barrier_sync_fn = BARRIER_SECONDS, meeting
        # Named one by one they meet on their hosts: no meeting of devices could be left.
        among.active_processes = set(range(jax.process_count()))
        among.barrier_sync_key_prefix = meeting.name
    if own:
        here = jax.process_index()
        among = ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={here}, barrier_sync_key_prefix=f"own-{here}"
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.LatestN(keep),
        # by a rename: no kill leaves half a step behind
        todelete_subdir=beside(folder, "trash").name,
        async_options=how,
        multiprocessing_options=among,
        create=False,  # it is there
        # reads nothing of older steps, which may be damaged
        lightweight_initialize=True,
    )
    quieten()
    # What is being written is copied: not all at once. orbax refuses a piece that is not less.
    at_once = 1 + 2 * max(map(_piece, leaves.values()), default=0) // 10**9
    arrays = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=at_once,
        use_ocdbt=not own,
        multiprocessing_options=among,
    )
    handlers = {
        "state": arrays,
        "host": ocp.JsonCheckpointHandler(multiprocessing_options=among),
    }
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _piece(x: jax.Array) -> int:
    """Bytes of an array that a device holds."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def quieten() -> None:
    """From here on, what orbax fails to write or read is said in our one warning, and not again by
    each of its threads."""
    logging.getLogger("absl").addFilter(_not_orbax_traceback)
    logging.getLogger("asyncio").addFilter(_not_orbax_future)
    if sys.unraisablehook is not _not_left_over:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _not_left_over


def _not_orbax_traceback(record: logging.LogRecord) -> bool:
    """False for what each thread of a failing save logs: 250 lines."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _not_orbax_future(record: logging.LogRecord) -> bool:
    """False for the writes that were under way beside the one that failed, some for every array."""
    lost = "exception was never retrieved" in record.getMessage()
    # Whose it was, its traceback says.
    return not (lost and "orbax" in logging.Formatter().format(record))


_hooks: list[Any] = []
"""``sys.unraisablehook`` as it was before, the last of them."""


def _not_left_over(found: Any) -> None:
    """``sys.unraisablehook`` but for what was under way beside the write or read that failed:
    tensorstore's, which ends too late, and orbax's, 4 kB for each array."""
    closed = found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"
    late = closed and found.object is None
    code = getattr(found.object, "cr_code", None)
    if not (late or (code is not None and "orbax" in code.co_filename)):
        _hooks[-1](found)
