"""Checkpoints that outlive kills, full disks and flipped bits.

A checkpoint is ``<folder>/<step>/``: the arrays of the training state and, beside them, a JSON
with the host's numbers and a digest of every array. A directory gets its number by a rename once
it is whole; what was damaged later, the digests tell. Beside the steps, ``trash/`` holds old ones
on their way out and ``damaged/`` those that ``restore`` had to pass over.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxrlhf.config import CheckpointConfig
from jaxrlhf.digest import describe, named_leaves, seal, unseal
from jaxrlhf.errors import InputError
from jaxrlhf.files import write_atomic
from jaxrlhf.restoring import Found, brief, newest, steps_in

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, for the one trainer that writes them.

    ``with Checkpoints(folder, config) as checkpoints:`` ends once the last save is on disk. Every
    process of a multi-host run makes the same calls.

    Attributes:
      failed: saves that failed (a full disk, say); training goes on after each.

    Raises:
      InputError: the folder cannot be written, or ``config.keep`` is below 1.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig):
        if config.keep < 1:
            raise InputError(f"checkpoint.keep={config.keep}: choose 1 or more")
        if "://" in str(folder):
            raise InputError(f"output: {folder} is no folder; mount the bucket and name the mount")
        self.folder = Path(folder).absolute()
        self.failed = 0
        self._keep = config.keep
        self._manager: ocp.CheckpointManager | None = None
        self._in_flight: int | None = None
        self._saved: int | None = None
        self._failure = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise InputError(
                f"output: {folder} cannot be written ({error.strerror}); choose another folder"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close()
        if error is None:
            self.wait()

    def latest(self) -> int | None:
        """The newest step on disk; a save in flight does not count."""
        return max(steps_in(self.folder), default=None)

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Copy ``state`` to the host and write it in the background; a step on disk is kept.

        The arrays may be donated once this returns. A save that fails is a warning and a count,
        and the next one tries again; only ``wait`` raises.

        Args:
          step: iterations done, later than the newest checkpoint.
          state: pytree of jax arrays.
          host: JSON-able numbers and texts that belong to ``state``.

        Raises:
          InputError: the folder holds a later step, as when a run starts without ``restore``.
          TypeError: ``host`` is not JSON-able.
        """
        self._settle()
        last = self.latest() if self._saved is None else self._saved
        if step == last:
            return
        if last is not None and step < last:
            where = f"{self.folder}: holds step {last}, and this run is at step {step}"
            raise InputError(f"{where}; resume from there, or choose another output")
        leaves = named_leaves(state)
        note = seal({"step": step, "host": dict(host), "leaves": describe(leaves)})
        self._in_flight = step
        try:
            if self._manager is None:
                _sweep(self.folder)
                self._manager = _writer(self.folder, self._keep)
            items = {"state": ocp.args.PyTreeSave(leaves), "host": ocp.args.JsonSave(note)}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # full or lost disk: the training is worth more than one save
            self._fail(error)

    def amend(self, host: Mapping[str, Any]) -> None:
        """Replace the host's numbers of the last save; a kill leaves the old ones or the new.

        Raises:
          InputError: the last save, or this, could not be written.
        """
        self.wait()
        path = self.folder / str(self.latest()) / "host" / "metadata"
        if jax.process_index() == 0:
            try:
                note = unseal(json.loads(path.read_text()))
                write_atomic(path, json.dumps(seal({**note, "host": dict(host)})))
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; make room and start again") from None

    def restore(self, abstract: Any) -> Found | None:
        """The newest checkpoint that is whole: (step, state, host); None if there is none at all.

        A damaged step (a file cut, missing or changed) is passed over with a warning and moved to
        ``damaged/``, so that the run can write that step again.

        Args:
          abstract: the state as it should come back: pytree of ShapeDtypeStruct with shardings
            (none: the first device), on as many devices as there are now.

        Raises:
          InputError: every checkpoint is damaged, or the saved state has another tree, shape or
            dtype than ``abstract`` (the message names the first difference).
        """
        found, damaged = newest(self.folder, abstract, part=False)
        if found is None:
            return None
        self._saved = found[0]
        multihost_utils.assert_equal(found[0], "the processes restored different steps")
        for step in damaged if jax.process_index() == 0 else ():
            (self.folder / "damaged").mkdir(exist_ok=True)
            target = tempfile.mkdtemp(prefix=f"{step}-", dir=self.folder / "damaged")
            os.replace(self.folder / str(step), target)
            log.warning("resuming from step %d; step %d is now %s", found[0], step, target)
        multihost_utils.sync_global_devices("damaged checkpoints are out of the way")
        return found

    def wait(self) -> None:
        """Block until the last save is on disk.

        Raises:
          InputError: it could not be written.
        """
        self._settle()
        if self._failure:
            raise InputError(
                f"{self.folder}: {self._failure}; make room and start again: the run resumes from "
                f"step {self.latest() or 0}"
            )

    def close(self) -> None:
        """Finish the save in flight and end threads; ``wait`` tells of failures."""
        self._settle()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _settle(self) -> None:
        """Wait for the save in flight, see whether it came through, and empty the trash."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)
            return
        if self._in_flight is not None:
            self._saved, self._in_flight, self._failure = self._in_flight, None, ""
        _sweep(self.folder)

    def _fail(self, error: Exception) -> None:
        """Count and report a failed save, and give back its space; the next starts afresh."""
        self.failed += 1
        self._failure = f"step {self._in_flight} could not be saved ({brief(error)})"
        log.warning("%s: %s; the next save tries again", self.folder, self._failure)
        log.debug("the failed save", exc_info=error)
        manager, self._manager, self._in_flight = self._manager, None, None
        try:
            if manager is not None:
                manager.close()
        except Exception as again:
            log.debug("closing after a failed save: %s", again)
        _sweep(self.folder)


def _writer(folder: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.LatestN(keep),
        todelete_subdir="trash",  # by a rename: no kill leaves half a step behind
        # where a directory cannot be made: an error now, not threads that wait for 20 minutes
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        lightweight_initialize=True,  # reads nothing of older steps, which may be damaged
    )
    logging.getLogger("absl").addFilter(_not_orbax_traceback)
    return ocp.CheckpointManager(folder, options=options)


def _sweep(folder: Path) -> None:
    """Remove deleted steps and what killed or failed saves have left."""
    if jax.process_index() == 0:
        for path in (folder / "trash", *folder.glob("*.orbax-checkpoint-tmp*")):
            shutil.rmtree(path, ignore_errors=True)


def _not_orbax_traceback(record: logging.LogRecord) -> bool:
    """False for what each thread of a failing save logs: 250 lines around our one warning."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
