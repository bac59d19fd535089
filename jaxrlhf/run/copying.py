"""What copying a run to a store takes, whoever does it: names there, and rounds in a thread."""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import writing
from jaxrlhf.core.shown import one_line
from jaxrlhf.run.lease import Lease

log = logging.getLogger(__name__)

PAUSE = 15.0
"""Seconds between two looks at what has changed."""

TRIES = (1.0, 5.0, 20.0)
"""Seconds before each new try of the last copy."""

STOP_SECONDS = 20.0
"""Seconds that a signal's last copy may take; a preempted machine has some 30."""

ERROR_SECONDS = 5.0
"""Seconds that the last copy may take where an error ends the run."""

LEASE_NAME = "lease.json"
STAGE = "stage.json"
"""What a pipeline has written of the stage that a run is; the pipeline copies it."""

SENT = ".mirror.json"
"""In the folder: what of it is in the store, so that a start on the same machine knows."""

BATCH = 64
"""Files that are sent at once, and sent again where one of them fails."""

Sign = list[int]
"""Size and time of a file, which change with its contents."""


class Bucket:
    """The place of a run in a store, by the names that its files have in the run's folder."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.fs, root = remote.store("output", self.url)
        self._root = root.rstrip("/")

    def path(self, name: str) -> str:
        """What the store's library calls a file."""
        return f"{self._root}/{name}"

    def names(self, folder: str = "") -> dict[str, dict[str, Any]]:
        """The files that are there, or in a folder there, with what is known of each."""
        found = self.fs.find(self.path(folder) if folder else self._root, detail=True)
        return {name[len(self._root) + 1 :]: info for name, info in found.items()}

    def read(self, name: str) -> bytes:
        """A small file; FileNotFoundError if it is not there."""
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, content: Any) -> None:
        """JSON, in one piece."""
        remote.put_bytes(self.fs, self.path(name), json.dumps(content).encode())

    def put(self, name: str, source: Path) -> None:
        """A file of this machine, under its name there."""
        remote.put_whole(self.fs, source, self.path(name))

    def put_all(self, sources: Mapping[str, Path]) -> None:
        """Several at once, where the store's library can."""
        here, there = [str(x) for x in sources.values()], [self.path(name) for name in sources]
        try:
            self.fs.put(here, there)
        except FileNotFoundError:
            for folder in {name.rpartition("/")[0] for name in there}:
                self.fs.makedirs(folder, exist_ok=True)
            self.fs.put(here, there)

    def get_all(self, targets: Mapping[str, Path]) -> None:
        """Copy files here, several at once; each is whole under its name."""
        parts = [target.with_name(target.name + ".part") for target in targets.values()]
        for part in parts:
            part.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get([self.path(name) for name in targets], [str(part) for part in parts])
        for part, target in zip(parts, targets.values(), strict=True):
            os.replace(part, target)

    def remove(self, name: str) -> None:
        """Delete a file."""
        self.fs.rm_file(self.path(name))

    def remove_step(self, step: int) -> None:
        """Delete a step, its mark before all else."""
        for name in (mark(step), f"checkpoints/{step}"):
            if self.fs.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)

    def whole(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Of the names there, those of each whole step: what its mark lists, and no more. An
        earlier copy that was killed may have left others."""
        names = set(names)
        listed = {step: json.loads(self.read(mark(step))) for step in remote.marked(names)}
        return {step: files for step, files in listed.items() if set(files) <= names}


def mark(step: int) -> str:
    """The name of the file that says that a step is whole."""
    return f"checkpoints/{step}{remote.WHOLE}"


def sign(path: Path) -> Sign:
    """What tells a file from what it was before."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def signs(folder: Path) -> dict[str, Sign]:
    """The files below a folder, by their names relative to it; those that go meanwhile left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = sign(path)
    return found


def is_small(name: str) -> bool:
    """Whether a file of a run's is none of a checkpoint's, and not still being written."""
    parts = name.split("/")
    inside = parts[0] == "checkpoints" and (len(parts) > 2 or name.endswith(remote.WHOLE))
    hidden = any(part.startswith(".") for part in parts)
    begun = name.endswith(".part") or ".orbax-checkpoint-tmp" in name
    return not (inside or hidden or begun or name in (LEASE_NAME, STAGE))


def send_small(store: Bucket, folder: Path, sent: dict[str, Sign]) -> None:
    """Copy what has changed of a run's small files, and delete what is gone; ``sent`` learns it."""
    small = {name: about for name, about in signs(folder).items() if is_small(name)}
    for name, about in small.items():
        if sent.get(name) != about and (folder / name).exists():
            store.put(name, folder / name)
            sent[name] = about
    for name in [x for x in sent if is_small(x) and x not in small]:
        store.remove(name)
        del sent[name]


def bring_small(store: Bucket, folder: Path, names: Mapping[str, Any]) -> dict[str, Sign]:
    """Copy the small files of a run here, and what is known of them then."""
    sent = {}
    for name, info in names.items():
        if is_small(name):
            remote.get_whole(store.fs, store.path(name), folder / name, info.get("size"))
            sent[name] = sign(folder / name)
    return sent


def make_room(url: str, folder: Path, keep: bool) -> None:
    """Empty the folder that stands for a URL; one that is to be kept is renamed."""
    with writing(folder):
        if keep:
            other = folder.with_name(f"{folder.name}.{time.time_ns()}")
            os.replace(folder, other)
            log.warning("output=%s: what was here of other steps is now %s", url, other)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def digest(content: bytes) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


class Copier(ABC):
    """Copies to a store what has changed, round after round, in a thread.

    A round that fails is a warning and a count, and the next tries again.

    Args:
      url: of the run's place there.
      folder: of this machine, that the run writes into.
      holds: whether this process has the lease on the place.

    Attributes:
      failed: rounds that have failed.
      late: the last copy has not come in time, and is not to be waited for again.
    """

    def __init__(self, url: str, folder: Path, holds: bool):
        self.store, self.folder = Bucket(url), folder
        self.url = self.store.url
        self.failed = 0
        self.late = False
        self._problem = ""
        self.lease = Lease(
            self.url,
            partial(self.store.read, LEASE_NAME),
            partial(self.store.write, LEASE_NAME),
            partial(self.store.remove, LEASE_NAME),
            str(folder),
        ) if holds else None  # fmt: skip
        self._turn = threading.Lock()
        self._over, self._awake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def begin(self) -> None:
        """Take the lease, bring back what is there, and begin to copy.

        Raises:
          InputError: another run writes there, or the store cannot be read and written.
        """
        try:
            self._open()
        except (InputError, KeyboardInterrupt):
            raise
        # Whatever the store's library raises.
        except Exception as error:
            raise InputError(
                f"output={self.url}: cannot be used ({one_line(error)}): check it, the network, "
                "and who may write there"
            ) from None
        self._thread.start()

    def check(self) -> None:
        """Raise InputError if another run has taken the place of this one."""
        if self.lease is not None:
            self.lease.check()

    def flush(self, seconds: float | None = None, tries: tuple[float, ...] = ()) -> None:
        """Copy what is left, and wait for it; all processes call this.

        Args:
          seconds: most that it may take; None: any number.
          tries: pauses before new tries.

        Raises:
          InputError: it has failed, or takes longer; the folder has it all.
        """
        self.finish(seconds, tries)

    def finish(self, seconds: float | None = None, tries: tuple[float, ...] = ()) -> None:
        """``flush`` of this process's own share, whatever the others do."""
        last = threading.Thread(target=self._finish, args=(tries,), name="mirror", daemon=True)
        last.start()
        last.join(seconds)
        self.late = last.is_alive()
        late = f"not within {seconds} s" if self.late else ""
        self.check()
        if problem := late or self._problem:
            raise InputError(
                f"output={self.url}: could not be written ({problem}): {self.folder} has it all: "
                "the same command, on this machine, copies it"
            )

    def end(self) -> None:
        """Stop copying, and give the lease back."""
        self._over.set()
        self._awake.set()
        if self._thread.ident is not None and not self.late:
            self._thread.join(ERROR_SECONDS)  # what is being copied may take long
        if self.lease is not None:
            self.lease.give_back()

    @abstractmethod
    def _open(self) -> None:
        """Take the lease, and make the folder what is there."""

    @abstractmethod
    def _round(self) -> None:
        """Copy what has changed."""

    def _pause(self) -> float:
        """Seconds to the next round."""
        return PAUSE

    def _work(self) -> None:
        while True:
            self._awake.wait(self._pause())
            self._awake.clear()
            if self._over.is_set():
                return
            self._copy()

    def _finish(self, tries: tuple[float, ...]) -> None:
        self._copy()
        for pause in tries:
            if not self._problem or self._over.wait(pause):
                return
            self._copy()

    def _copy(self) -> None:
        """A round; what fails is counted, and told once."""
        with self._turn:
            try:
                if self.lease is not None:
                    self.lease.renew()
                    self.lease.check()
                self._round()
            except Exception as error:
                self.failed += 1
                problem = one_line(error)
                if not self._problem:
                    log.warning("output=%s: %s; it is tried again", self.url, problem)
                self._problem = problem
            else:
                if self._problem:
                    log.warning("output=%s: is written again, and has all of it", self.url)
                self._problem = ""
