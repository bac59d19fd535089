"""Checkpoints read back: the newest whole one, which all processes agree on."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrlhf.digest import check_leaves, describe, named_leaves, unseal
from jaxrlhf.errors import InputError
from jaxrlhf.processes import all_or_none

log = logging.getLogger(__name__)

Found = tuple[int, Any, dict[str, Any]]
"""A restored checkpoint: step, state, host."""


def load(folder: str | Path, abstract: Any) -> Found:
    """(step, state, host) of the newest whole checkpoint, or of a part of its state; read only.

    For evaluation and export; a trainer that writes to the same folder is not disturbed.

    Args:
      folder: ``checkpoints/`` of a run.
      abstract: as for ``Checkpoints.restore``, but leaves it has not are not read.

    Raises:
      InputError: no checkpoint, none that is whole, or another tree, shape or dtype.
    """
    found, _ = newest(Path(folder).absolute(), abstract, part=True)
    if found is None:
        raise InputError(f"{folder}: holds no checkpoint; name the checkpoints/ of a run")
    return found


def newest(folder: Path, abstract: Any, part: bool) -> tuple[Found | None, list[int]]:
    """The newest whole checkpoint (None if there is none at all), and the damaged ones before.

    One that a single process finds damaged is damaged for all.
    """
    damaged: dict[int, str] = {}
    for step in sorted(steps_in(folder), reverse=True):
        try:
            return (step, *_read(folder / str(step), abstract, part)), list(damaged)
        except InputError:
            raise
        except Exception as error:  # whatever a damaged file makes of its reader
            damaged[step] = brief(error)
            log.warning("%s/%d is DAMAGED, passing over it: %s", folder, step, damaged[step])
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
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})

    def restore(item: Any) -> Any:
        with ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=alone
        ) as reader:
            return reader.restore(path, args=item)

    note = unseal(restore(ocp.args.Composite(host=ocp.args.JsonRestore()))["host"])
    check_leaves(path, note["leaves"], wanted, part)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    how = {
        name: ocp.ArrayRestoreArgs(
            sharding=x.sharding or here, global_shape=tuple(x.shape), dtype=x.dtype
        )
        for name, x in wanted.items()
    }
    state = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=part)
    return restore(ocp.args.Composite(state=state))["state"], note


def steps_in(folder: Path) -> list[int]:
    """Steps on disk, whole or damaged; what is still being written has no number for a name."""
    if not folder.is_dir():
        return []
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]


def brief(error: Exception) -> str:
    """An error in one line of bounded length; long ones have their cause at the end."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 240 else f"{text[:80]} … {text[-150:]}"
