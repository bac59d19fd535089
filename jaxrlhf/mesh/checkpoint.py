"""The checkpoints of a run: saved, restored, and told when kills, full disks or bits damage them.

A checkpoint is ``<folder>/<step>/``: the arrays of the training state and, beside them, a JSON
note with its step, its run, the host's numbers and the name, kind and digest of every array, sealed
by its SHA-256. A directory gets its number by a rename once it is whole; what was damaged later, or
is of another step or run, note and digests tell. Beside the steps, ``run.json`` names the run,
``trash/`` holds old ones on their way out and ``damaged/`` those that ``restore`` had to pass over.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxrlhf.config import CheckpointConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import check_folder, free, write_atomic
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.messages import exchange
from jaxrlhf.mesh.notes import (
    beside,
    claim,
    note_of,
    note_path,
    notes,
    put_aside,
    seal,
    steps_in,
)
from jaxrlhf.mesh.processes import (
    Meeting,
    all_or_none,
    any_process,
    by_first,
    is_first,
    jointly,
)
from jaxrlhf.mesh.saving import Elsewhere, quieten, writer

log = logging.getLogger(__name__)

Found = tuple[int, Any, dict[str, Any]]
"""A restored checkpoint: step, state, host."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path, such as ``policy.params.embed``.

    Raises:
      ValueError: two leaves share a path.
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
    if len(named) < len(pairs):
        raise ValueError("two leaves of the state share a dotted path")
    return named


def kind(x: Any) -> str:
    """Dtype and shape of an array or ShapeDtypeStruct, such as ``float32[8, 4]``."""
    return f"{x.dtype}{list(x.shape)}"


@jax.jit
def digest(x: Array) -> Array:
    """A checksum of one array: Σ_i bits_i · (2i + 1) mod 2³², uint32 scalar.

    ``bits_i`` is element i (row-major) read as an unsigned integer. Every weight is odd, so one
    flipped bit, wherever it is, changes the sum; integer sums do not depend on their order, so
    the digest does not depend on how the array is sharded.

    Args:
      x: any shape; a boolean, integer or floating-point dtype of 1, 2, 4 or 8 bytes.
    """
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    # i out of an iota for each axis: flattened, an array that is sharded would be gathered.
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index, stride = index + along * jnp.uint32(stride % 2**32), stride * bits.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def describe(leaves: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Kind and digest of each named array, JSON-able.

    One array after the other: CPUs write out what a digest adds up, as large as its array, and of
    programs that wait for other processes some tens in flight would wait for ever.
    """
    return {name: {"kind": kind(x), "digest": int(digest(x))} for name, x in leaves.items()}


class Checkpoints:
    """The checkpoints of one run, for the one trainer that writes them.

    ``with Checkpoints(folder, config) as checkpoints:`` ends once the last save is on disk. Every
    process of a multi-host run makes the same calls.

    Args:
      folder: one that all processes see; with ``elsewhere``, this process's own.
      config: how many to keep.
      elsewhere: where the steps come together whose pieces each process has in its own folder.

    Attributes:
      failed: saves that failed (a full disk, say); training goes on after each.
      saved: the newest step on disk, which all processes agree on; None if there is none.

    Raises:
      InputError: the folder cannot be written, or ``config.keep`` is below 1.
    """

    def __init__(
        self, folder: str | Path, config: CheckpointConfig, elsewhere: Elsewhere | None = None
    ):
        if config.keep < 1:
            raise InputError(f"checkpoint.keep={config.keep}: choose 1 or more")
        if "://" in str(folder):
            raise InputError(f"output: {folder} is no folder; mount the bucket and name the mount")
        self.folder = Path(folder).absolute()
        self.failed = 0
        self._keep = config.keep
        self._manager: ocp.CheckpointManager | None = None
        self._in_flight: int | None = None
        self._failure = ""
        self._meeting: Meeting | None = None
        self._elsewhere, self._fresh = elsewhere, False  # nothing of what is there is saved by us
        check_folder(self.folder)
        self._run = by_first(partial(claim, self.folder))
        if elsewhere is not None:
            all_or_none(partial(claim, self.folder, self._run))
        self.saved = max(_agreed(self.folder), default=None)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, *_: object) -> None:
        self._settle()
        if self._manager is not None:
            self._manager.close()
            self._manager = None
        if kind is None:
            self.wait()
        # One full disk fails more than the save; else the run's own error is the one to be seen.
        if isinstance(error, InputError) and self._failure:
            raise InputError(f"{error}; {self._unsaved()}") from error

    def latest(self) -> int | None:
        """The newest step on disk; a save in flight does not count."""
        return max(steps_in(self.folder), default=None)

    def noted(self) -> dict[str, Any] | None:
        """The host's numbers of the newest step that can tell them; no array is read."""
        return next((note["host"] for note in notes(self.folder)), None)

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Copy ``state`` to the host and write it in the background; a step on disk is kept.

        The arrays may be donated once this returns. A save that fails is a warning and a count,
        and the next one tries again; only ``wait`` raises. What fails on one of several processes
        has failed on all.

        Args:
          step: iterations done, later than the newest checkpoint.
          state: pytree of jax arrays.
          host: JSON-able numbers and texts that belong to ``state``.

        Raises:
          InputError: the folder holds a later step, as when a run starts without ``restore``.
          TypeError: ``host`` is not JSON-able.
        """
        self._settle()
        # Not what each finds on its disk by itself: one could return here, and the others wait.
        if step == self.saved:
            return
        if self.saved is not None and step < self.saved:
            where = f"{self.folder}: holds step {self.saved}, and this run is at step {step}"
            raise InputError(f"{where}; resume from there, or choose another output")
        # Saved flat and by name: which classes optax keeps its moments in is no part of the file.
        leaves = named_leaves(state)
        about = {"step": step, "run": self._run, "host": dict(host)}
        note = self._alike(seal({**about, "leaves": describe(leaves)}))
        self._in_flight = step

        items = {"state": ocp.args.PyTreeSave(leaves), "host": ocp.args.JsonSave(note)}
        try:
            manager = self._manager
            if manager is None:
                self._sweep()
                own = self._elsewhere is not None
                self._meeting = Meeting() if jax.process_count() > 1 and not own else None
                how = self.folder, self._keep, leaves, self._meeting, own
                manager = jointly(partial(writer, *how))
            self._manager = manager
            to_save = ocp.args.Composite(**items)
            jointly(partial(manager.save, step, args=to_save, force=True))
        # A full or lost disk: the training is worth more than one save.
        except Exception as error:
            self._fail(error)

    def amend(self, host: Mapping[str, Any]) -> None:
        """Replace the host's numbers of the last save; a kill leaves the old ones or the new.

        Raises:
          InputError: the last save, or this, could not be written.
        """
        self.wait()
        step = self.folder / str(self.latest())
        host = self._alike(dict(host))

        def rewrite() -> None:
            if not self._writes():
                return
            try:
                note = note_of(step)
            except ValueError as error:
                raise InputError(f"{step}: {error}: start again from the step before") from None
            write_atomic(note_path(step), json.dumps(seal({**note, "host": dict(host)})))

        all_or_none(rewrite)

    def wait(self) -> None:
        """Block until the last save is on disk.

        Raises:
          InputError: it could not be written.
        """
        self._settle()
        if self._failure:
            raise InputError(self._unsaved())

    def _unsaved(self) -> str:
        """What is lost, why, and what to do."""
        return (
            f"{self.folder}: {self._failure}; {free(self.folder)}; make room and start again: the "
            f"run resumes from step {self.latest() or 0}"
        )

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
        found, damaged = _newest(self.folder, abstract, False, self._elsewhere)
        if found is None:
            return None
        self.saved = found[0]

        def make_way() -> None:
            # Only now that another step is whole: where all are damaged, all stay where they are.
            for step in damaged if self._writes() else ():
                target = put_aside(self.folder / str(step))
                log.warning("resuming from step %d; step %d is now %s", found[0], step, target)

        all_or_none(make_way)
        return found

    def look(self) -> None:
        """See whether a save in flight has come through on all, and say so where steps come
        together; does not wait for it. Nothing to do where all see one folder."""
        if self._elsewhere is None:
            return
        if self._manager is None or self._in_flight is None:
            self._offer()
        elif not any_process(self._manager.is_saving_in_progress()):
            self._settle()

    def _offer(self) -> None:
        if self._elsewhere is not None and self._fresh:
            assert self.saved is not None
            self._elsewhere.offer(self.saved)

    def _writes(self) -> bool:
        """Whether this process writes notes, and moves steps: one does in a folder of all."""
        return self._elsewhere is not None or is_first()

    def _alike(self, content: dict[str, Any]) -> dict[str, Any]:
        """The same on all where each writes its own note: what process 0 has (their clocks
        differ)."""
        return content if self._elsewhere is None else by_first(lambda: content)

    def _settle(self) -> None:
        """Wait for the save in flight, see whether it came through, and empty the trash."""
        if self._manager is None:
            return
        try:
            jointly(self._manager.wait_until_finished)
        except Exception as error:
            self._fail(error)
            return
        if self._in_flight is not None:
            self.saved, self._in_flight, self._failure = self._in_flight, None, ""
            self._fresh = True
            self._offer()
        self._sweep()

    def _fail(self, error: Exception) -> None:
        """Count and report a failed save, and give back its space; the next starts afresh."""
        self.failed += 1
        self._failure = f"step {self._in_flight} could not be saved ({_brief(error)})"
        log.warning("%s: %s; the next save tries again", self.folder, self._failure)
        log.debug("the failed save", exc_info=error)
        # It may be whole in this process's own folder, and of all it is not.
        if self._elsewhere is not None and self._in_flight is not None:
            shutil.rmtree(self.folder / str(self._in_flight), ignore_errors=True)
        manager, self._manager, self._in_flight = self._manager, None, None
        try:
            # With others, it could wait for them where it stopped; its threads are told to end.
            if self._meeting is not None:
                self._meeting.leave()
            elif manager is not None:
                manager.close()
        except Exception as again:
            log.debug("closing after a failed save: %s", again)
        self._sweep()

    def _sweep(self) -> None:
        """Remove deleted steps and what killed or failed saves have left."""
        if not self._writes():
            return
        folder = self.folder
        for path in (beside(folder, "trash"), *folder.glob("*.orbax-checkpoint-tmp*")):
            shutil.rmtree(path, ignore_errors=True)


def load(folder: str | Path, abstract: Any) -> Found:
    """(step, state, host) of the newest whole checkpoint, or of a part of its state; read only.

    For evaluation and export; a trainer that writes to the same folder is not disturbed.

    Args:
      folder: ``checkpoints/`` of a run.
      abstract: as for ``Checkpoints.restore``, but leaves it has not are not read.

    Raises:
      InputError: no checkpoint, none that is whole, or another tree, shape or dtype.
    """
    found, _ = _newest(Path(folder).absolute(), abstract, part=True)
    if found is None:
        raise InputError(f"{folder}: holds no checkpoint; name the checkpoints/ of a run")
    return found


LOOKS = 60
"""Times, a second apart, until all processes see the same steps: network disks keep old lists."""


def _agreed(folder: Path) -> list[int]:
    """The steps on disk, the newest first, as all processes see them.

    Raises:
      InputError: they go on seeing different ones.
    """
    seen: list[str] = []
    for _ in range(LOOKS):
        seen = exchange(json.dumps(sorted(steps_in(folder), reverse=True)))
        if len(set(seen)) == 1:
            return json.loads(seen[0])
        time.sleep(1.0)
    raise InputError(
        f"{folder}: the processes see different steps ({', '.join(seen)}): the folder must be on "
        "a disk that all hosts see"
    )


def _newest(
    folder: Path, abstract: Any, part: bool, elsewhere: Elsewhere | None = None
) -> tuple[Found | None, list[int]]:
    """The newest whole checkpoint (None if there is none at all), and the damaged ones before.

    One that a single process finds damaged is damaged for all.
    """
    damaged: dict[int, str] = {}
    for step in _agreed(folder):
        if elsewhere is not None:
            all_or_none(partial(elsewhere.bring, step, named_leaves(abstract)))
        try:
            return (step, *_read(folder / str(step), abstract, part)), list(damaged)
        # Whole, but of another model: an older step would be too.
        except InputError:
            raise
        # Whatever a damaged file makes of its reader.
        except Exception as error:
            # A trainer goes on while others read: what it has deleted makes room for newer ones.
            if any_process(not os.path.lexists(folder / str(step))):
                return _newest(folder, abstract, part, elsewhere)
            damaged[step] = _brief(error)
            log.warning("%s/%d is DAMAGED, passing over it: %s", folder, step, damaged[step])
    # Never a silent start at step 0 in a folder that holds the work of hours.
    if damaged:
        listed = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        raise InputError(
            f"{folder}: every checkpoint is damaged ({listed}); bring one back from a backup, "
            "or choose another output to start anew"
        )
    return None, []


def _read(path: Path, abstract: Any, part: bool) -> tuple[Any, dict[str, Any]]:
    """State and host of one checkpoint; any exception but InputError means that it is damaged."""
    wanted = named_leaves(abstract)
    leaves, note = all_or_none(lambda: _files(path, wanted, part))
    # Outside of all_or_none: arrays over several processes are summed by all of them together.
    found = describe(leaves)

    def compare() -> None:
        for name, is_now in found.items():
            if is_now != note["leaves"][name]:
                raise ValueError(f"{name} is not as it was saved")

    all_or_none(compare)
    restored = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in wanted])
    return restored, note["host"]


def _files(path: Path, wanted: dict[str, Any], part: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays by name, and the note beside them. Each process reads for itself, waiting for none."""
    # To orbax each is alone: at its barriers, one with a damaged file would hold up the others.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    how = {
        name: ocp.ArrayRestoreArgs(
            sharding=x.sharding or here, global_shape=tuple(x.shape), dtype=x.dtype
        )
        for name, x in wanted.items()
    }
    arrays = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=part)
    handler = ocp.CompositeCheckpointHandler()
    note = note_of(path)
    _check_leaves(path, note["leaves"], wanted, part)
    quieten()
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        items = ocp.args.Composite(state=arrays)
        return reader.restore(path, args=items)["state"], note


def _check_leaves(path: Path, saved: dict[str, Any], wanted: dict[str, Any], part: bool) -> None:
    """Raise InputError for the first leaf whose kind is not saved as it is wanted; for a ``part``,
    what is saved beyond ``wanted`` does not matter."""
    there = {name: leaf["kind"] for name, leaf in saved.items()}
    here = {name: kind(x) for name, x in wanted.items()}
    for name in here if part else here | there:
        was, is_now = there.get(name, "absent"), here.get(name, "absent")
        if was != is_now:
            raise InputError(
                f"{path}: {name} is {was} there, {is_now} in this run; go back to the model and "
                "optimizer of the run's config.yaml, or choose another output"
            )


def _brief(error: Exception) -> str:
    """An error in one line of bounded length; long ones have their cause at the end."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 240 else f"{text[:80]} … {text[-150:]}"
