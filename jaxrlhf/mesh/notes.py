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

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import write_atomic, writing
from jaxrlhf.core.reading import read_object

log = logging.getLogger(__name__)

MOST_NOTE = 2**26
"""Bytes of a note: among the host's numbers are those of every held-out prompt."""


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
    note = sealed.get("note")
    if not isinstance(note, dict) or sealed.get("sha256") != _sha256(note):
        raise ValueError("the note is not as it was saved")
    return note


def note_of(step: Path) -> dict[str, Any]:
    """The note of a step, which is its own.

    Raises:
      ValueError: it cannot be read, has changed, or is of another step or run.
    """
    try:
        note = unseal(read_object(note_path(step), MOST_NOTE))
    # No InputError: whoever asks may have another step.
    except InputError as error:
        raise ValueError(str(error)) from None
    check_place(step, note)
    return note


def note_path(step: Path) -> Path:
    """The file that holds the note of a step."""
    return step / "host" / "metadata"


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
        try:
            yield note_of(folder / str(step))
        # ``restore`` has the word about it.
        except ValueError as error:
            log.debug("%s/%d: %s", folder, step, error)


def _run_of(folder: Path) -> str | None:
    """The name of the run whose steps belong into a folder; None where nothing says it."""
    try:
        run = read_object(folder / "run.json").get("run")
    except InputError:
        return None
    return run if isinstance(run, str) else None


def claim(folder: Path, name: str = "") -> str:
    """The name of the run that writes here, which ``run.json`` has from now on; for one process.

    It is ``name`` if that is given; else a new one for a folder without steps; of one whose file is
    gone, the newest step knows it.
    """
    run = _run_of(folder) if steps_in(folder) else None
    if run is None or (name and run != name):
        named = (note["run"] for note in notes(folder) if "run" in note)
        run = name or next(named, uuid.uuid4().hex)
        write_atomic(folder / "run.json", json.dumps({"run": run}) + "\n")
    return run


def check_place(path: Path, note: dict[str, Any]) -> None:
    """Raise ValueError for the note of another step than ``path`` is, or of another run's."""
    if note.get("step") != int(path.name):
        raise ValueError(f"its files are those of step {note.get('step')}")
    run = _run_of(path.parent)
    if run is not None and note.get("run", run) != run:
        raise ValueError("its files are those of another run")
