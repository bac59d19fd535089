"""The folder of a run's checkpoints, without their arrays: its steps, their notes, whose they are.

A step is a folder with a number for a name. Its note, ``host/metadata``, is sealed by its SHA-256
and says which step it is, and of which run; ``run.json`` beside the steps says which run they are
to be of. People move, copy and add to such folders: what is no step is left alone, and what is not
the step that its name says is told.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.core.files import write_atomic, writing
from jaxrlhf.mesh.processes import is_first

log = logging.getLogger(__name__)


def seal(note: Mapping[str, Any]) -> dict[str, Any]:
    """``note`` as JSON holds it, with its SHA-256.

    Raises:
      TypeError: it is not JSON-able.
    """
    # There and back, so that what is hashed is what will be read: tuples are lists, keys are texts.
    plain = json.loads(json.dumps(note))
    return {"note": plain, "sha256": _sha256(plain)}


def unseal(sealed: Mapping[str, Any]) -> dict[str, Any]:
    """The note of a ``seal``.

    Raises:
      ValueError: it has changed since.
    """
    if sealed["sha256"] != _sha256(sealed["note"]):
        raise ValueError("the note is not as it was saved")
    return sealed["note"]


def _sha256(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def steps_in(folder: Path) -> list[int]:
    """Steps on disk, whole or damaged; what is still being written has no number for a name."""
    if not folder.is_dir():
        return []
    # Not by glob, which takes a folder that cannot be read for an empty one.
    names = [entry.name for entry in folder.iterdir()]
    return [int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)]


def beside(folder: Path, name: str) -> Path:
    """A folder of that name beside the steps, there or not; of a longer one, where it is taken."""
    path = folder / name
    while path.is_symlink() or (path.exists() and not path.is_dir()):
        path = path.with_name(path.name + "_")
    return path


def put_aside(path: Path) -> str:
    """Move a step that cannot be used into ``damaged/``; where to.

    Raises:
      InputError: it cannot be moved.
    """
    damaged = beside(path.parent, "damaged")
    with writing(damaged):
        damaged.mkdir(exist_ok=True)
        target = tempfile.mkdtemp(prefix=f"{path.name}-", dir=damaged)
        # A file or a link cannot take the place of a folder.
        whole = path.is_dir() and not path.is_symlink()
        os.replace(path, target if whole else Path(target) / path.name)
    return target


def notes(folder: Path) -> Iterator[dict[str, Any]]:
    """The notes that can be read, of the newest step first."""
    for step in sorted(steps_in(folder), reverse=True):
        path = folder / str(step) / "host" / "metadata"
        try:
            note = unseal(json.loads(path.read_text(encoding="utf-8")))
            check_place(folder / str(step), note)
            yield note
        # Whatever a damaged file makes of its reader; ``restore`` has the word about it.
        except Exception as error:
            log.debug("%s: %s", path, error)


def _run_of(folder: Path) -> str | None:
    """The name of the run whose steps belong into a folder; None where nothing says it."""
    try:
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def claim(folder: Path) -> str:
    """The name of the run that writes here, which ``run.json`` has from now on.

    It is a new one for a folder without steps; of one whose file is gone, the newest step knows it.
    """
    run = _run_of(folder) if steps_in(folder) else None
    if run is None:
        named = (note["run"] for note in notes(folder) if "run" in note)
        run = next(named, uuid.uuid4().hex)
        if is_first():
            write_atomic(folder / "run.json", json.dumps({"run": run}) + "\n")
    return run


def check_place(path: Path, note: dict[str, Any]) -> None:
    """Raise ValueError for the note of another step than ``path`` is, or of another run's."""
    if note["step"] != int(path.name):
        raise ValueError(f"its files are those of step {note['step']}")
    run = _run_of(path.parent)
    if run is not None and note.get("run", run) != run:
        raise ValueError("its files are those of another run")
