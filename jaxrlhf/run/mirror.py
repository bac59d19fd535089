"""A run whose output is a URL: it writes into a folder of this machine, which is mirrored there.

Stores of objects have no append, no rename and no lock, and a run's folder needs all three: lines
are appended to metrics.jsonl, a checkpoint becomes whole by a rename, and a lock keeps a second run
away. So nothing of a run knows of the store but this file. A thread copies what has changed every
``PAUSE`` seconds. It keeps what the folder promises:

- A step is whole there once its mark, ``checkpoints/<step>.whole``, has come: written after all its
  files, and removed before the first of them. The lines of metrics.jsonl up to a step come before
  it. A half-copied step is never taken.
- A start in an empty folder, on another machine, brings back what is whole and goes on from there.
  One that finds the folder of before goes on with that, if it is as far.
- A copy that fails is a warning and a count (``failed_uploads``), and is tried again; the run goes
  on. Only its end, and a signal, wait for the last copy, and are an error without it.
- Instead of a lock there is a ``lease``: a second run is refused, and one that has lost its lease
  to another, after a long sleep, say, ends.

Several processes have one folder, which all of them must see: they can be on one machine, or its
home on a disk that they share. On hosts without one, mount the bucket.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import is_url, write_atomic, writing
from jaxrlhf.core.reading import read_object
from jaxrlhf.core.shown import one_line
from jaxrlhf.mesh.messages import exchange
from jaxrlhf.mesh.notes import steps_in
from jaxrlhf.mesh.processes import all_or_none, is_first
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
SENT = ".mirror.json"
"""In the folder: what of it is in the store, so that a start on the same machine knows."""

Sign = list[int]
"""Size and time of a file, which change with its contents."""


class Mirror:
    """Copies a run's folder to a store, in a thread.

    Args:
      url: where to.
      folder: of the run, which this process alone writes into.

    Attributes:
      failed: copies that have failed.
      lease: on the store's folder.
    """

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url.rstrip("/"), folder
        self.failed = 0
        self._fs, self._root = remote.store("output", self.url)
        self._sent: dict[str, Sign] = {}
        self._there: dict[int, bool] = {}  # a step that has files there → whether it is whole
        self._problem = ""
        self.lease = Lease(
            self.url,
            partial(self._read, LEASE_NAME),
            partial(self._write, LEASE_NAME),
            lambda: self._fs.rm_file(self._path(LEASE_NAME)),
            str(folder),
        )
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def begin(self) -> None:
        """Take the lease, bring back what is there, and begin to copy.

        Raises:
          InputError: another run writes there, or the store cannot be read and written.
        """
        try:
            self.lease.take()
            self._bring()
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
        self.lease.check()

    def flush(self, seconds: float | None = None, tries: tuple[float, ...] = ()) -> None:
        """Copy what is left, and wait for it.

        Args:
          seconds: most that it may take; None: any number.
          tries: pauses before new tries.

        Raises:
          InputError: it has failed, or takes longer; the folder has it all.
        """
        last = threading.Thread(target=self._flush, args=(tries,), name="mirror", daemon=True)
        last.start()
        last.join(seconds)
        late = f"not within {seconds} s" if last.is_alive() else ""
        self.check()
        if problem := late or self._problem:
            raise InputError(
                f"output={self.url}: could not be written ({problem}): {self.folder} has it all: "
                "the same command, on this machine, copies it"
            )

    def end(self) -> None:
        """Stop copying, and give the lease back."""
        self._over.set()
        self._thread.join(ERROR_SECONDS)  # what is being copied may take long
        self.lease.give_back()

    def _work(self) -> None:
        while not self._over.wait(PAUSE):
            self._copy()

    def _flush(self, tries: tuple[float, ...]) -> None:
        self._copy()
        for pause in tries:
            if not self._problem or self._over.wait(pause):
                return
            self._copy()

    def _copy(self) -> None:
        """Copy what has changed; what fails is counted, and told once."""
        with self._turn:
            try:
                self.lease.renew()
                self.lease.check()
                self._copy_all()
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

    def _copy_all(self) -> None:
        checkpoints = self.folder / "checkpoints"
        # Before the lines, which those of a step are then among.
        steps = {step: _files(checkpoints / str(step)) for step in steps_in(checkpoints)}
        small = {name: sign for name, sign in _files(self.folder).items() if _is_small(name)}
        for name, sign in small.items():
            if self._sent.get(name) != sign and (self.folder / name).exists():
                remote.put_whole(self._fs, self.folder / name, self._path(name))
                self._sent[name] = sign
        for name in [x for x in self._sent if _is_small(x) and x not in small]:
            self._fs.rm_file(self._path(name))
            del self._sent[name]
        # The newest first: it is what a new start wants.
        for step in sorted(steps, reverse=True):
            self._copy_step(step, steps[step])
        # A step that is deleted here makes room there, once a newer one is whole.
        for step in sorted(set(self._there) - set(steps_in(checkpoints))):
            if any(whole and other > step for other, whole in self._there.items()):
                self._remove_step(step)
        write_atomic(self.folder / SENT, json.dumps(self._sent))

    def _copy_step(self, step: int, files: Mapping[str, Sign]) -> None:
        names = {f"checkpoints/{step}/{name}": sign for name, sign in files.items()}
        changed = {name: sign for name, sign in names.items() if self._sent.get(name) != sign}
        if self._there.get(step) and not changed:
            return
        # A link each: the run may delete the step while it is copied.
        sending = self.folder.with_name(self.folder.name + ".sending")
        shutil.rmtree(sending, ignore_errors=True)
        try:
            for name in changed:
                (sending / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(self.folder / name, sending / name)
        except FileNotFoundError:  # deleted already
            shutil.rmtree(sending, ignore_errors=True)
            return
        self._there.setdefault(step, False)
        # Else a kill would leave the mark on a mixture. A note alone is replaced as a whole.
        if self._there[step] and set(changed) != {f"checkpoints/{step}/host/metadata"}:
            self._fs.rm_file(self._path(_mark(step)))
            self._there[step] = False
        for name, sign in changed.items():
            remote.put_whole(self._fs, sending / name, self._path(name))
            self._sent[name] = sign
        if not self._there[step]:
            self._write(_mark(step), sorted(names))
            self._there[step] = True
        shutil.rmtree(sending, ignore_errors=True)

    def _remove_step(self, step: int) -> None:
        for name in (_mark(step), f"checkpoints/{step}"):
            if self._fs.exists(self._path(name)):
                self._fs.rm(self._path(name), recursive=True)
        gone = [name for name in self._sent if name.startswith(f"checkpoints/{step}/")]
        for name in gone:
            del self._sent[name]
        del self._there[step]

    def _bring(self) -> None:
        """Make the folder what the store has, unless it is as far itself."""
        listed = self._fs.find(self._root, detail=True)
        names = {name[len(self._root.rstrip("/")) + 1 :]: info for name, info in listed.items()}
        # What its mark lists, and no more: an earlier copy that was killed may have left others.
        listed = {step: json.loads(self._read(_mark(step))) for step in remote.marked(names)}
        whole = {step: files for step, files in listed.items() if set(files) <= set(names)}
        begun = {found[1] for name in names if (found := re.match(r"checkpoints/(\d+)/", name))}
        self._there = {int(step): int(step) in whole for step in begun}
        if (self.folder / SENT).is_file():
            with suppress(InputError):
                self._sent = dict(read_object(self.folder / SENT))
        if self._is_as_far(whole, self._sent):
            # What has gone from there since is copied again.
            self._sent = {name: sign for name, sign in self._sent.items() if name in names}
            return
        self._make_room()
        self._sent = {}
        steps = {name for files in whole.values() for name in files}
        for name, info in names.items():
            if name in steps or (_is_small(name) and name != LEASE_NAME):
                remote.get_whole(self._fs, self._path(name), self.folder / name, info.get("size"))
                self._sent[name] = _sign(self.folder / name)
        if whole:
            said = f"output: {self.url}: step {max(whole)} is brought to {self.folder}"
            print(said, file=sys.stderr)

    def _is_as_far(self, whole: Mapping[int, Any], sent: Mapping[str, Any]) -> bool:
        """Whether the folder holds the same run, at the store's step or a later one."""
        here = steps_in(self.folder / "checkpoints")
        if not here:
            return not whole
        if not whole:
            # Whoever has emptied the store begins anew; what has never come there is not lost.
            return not any(name.startswith("checkpoints/") for name in sent)
        return self._is_same() and max(here) >= max(whole)

    def _is_same(self) -> bool:
        """Whether folder and store are of one run."""
        with suppress(InputError, ValueError, FileNotFoundError):
            here = read_object(self.folder / "checkpoints/run.json")
            return here == json.loads(self._read("checkpoints/run.json"))
        return False

    def _make_room(self) -> None:
        """Empty the folder; one with steps of another run than the store's is kept, renamed."""
        with writing(self.folder):
            if steps_in(self.folder / "checkpoints") and not self._is_same():
                other = self.folder.with_name(f"{self.folder.name}.{time.time_ns()}")
                os.replace(self.folder, other)
                log.warning("output=%s: another run's folder is now %s", self.url, other)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)

    def _read(self, name: str) -> bytes:
        return self._fs.cat_file(self._path(name))

    def _write(self, name: str, content: Any) -> None:
        """JSON, in one piece."""
        text = json.dumps(content).encode()
        try:
            self._fs.pipe_file(self._path(name), text)
        except FileNotFoundError:  # of a store with folders
            self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(self._path(name), text)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _mark(step: int) -> str:
    return f"checkpoints/{step}{remote.WHOLE}"


def _sign(path: Path) -> Sign:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _files(folder: Path) -> dict[str, Sign]:
    """The files below a folder, by their names relative to it; those that go meanwhile left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = _sign(path)
    return found


def _is_small(name: str) -> bool:
    """Whether a file of a run's is none of a checkpoint's, and not still being written."""
    parts = name.split("/")
    inside = parts[0] == "checkpoints" and (len(parts) > 2 or name.endswith(remote.WHOLE))
    hidden = any(part.startswith(".") for part in parts)
    return not (inside or hidden or name.endswith(".part") or ".orbax-checkpoint-tmp" in name)


class NoMirror:
    """Of a run whose folder is its output, and of all processes but the first."""

    failed = 0

    def check(self) -> None:
        """Nothing to check."""

    def flush(self, seconds: float | None = None, tries: tuple[float, ...] = ()) -> None:
        """Nothing to copy."""


@contextmanager
def mirrored(output: str) -> Iterator[Mirror | NoMirror]:
    """The folder that stands for ``output`` is what is there, and what comes of it is copied.

    All processes call this. The last copy is waited for at the end, but for an error's.

    Raises:
      InputError: as ``Mirror.begin``; the processes do not see one folder; at the end, what could
        not be copied.
    """
    if not is_url(output):
        yield NoMirror()
        return
    folder = remote.scratch(output)
    with _alone(folder, output):
        mirror = all_or_none(partial(_begun, output, folder))
        _check_shared(folder)
        if mirror is None:
            yield NoMirror()
            return
        try:
            yield mirror
        except Exception:
            # An error's own words are the ones to be seen.
            with suppress(InputError):
                mirror.flush(ERROR_SECONDS)
            raise
        else:
            mirror.flush(tries=TRIES)
        finally:
            mirror.end()


def _begun(output: str, folder: Path) -> Mirror | None:
    """The mirror, on the process that has it."""
    if not is_first():
        return None
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(output, folder)
    mirror.begin()
    return mirror


@contextmanager
def _alone(folder: Path, output: str) -> Iterator[None]:
    """The folder is this run's until it ends, however that ends."""
    if not is_first():
        yield
        return
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.with_name(folder.name + ".lock"), "ab")  # noqa: SIM115 (it is the lock)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"output={output}: another run on this machine writes there; wait for it, stop it, "
                "or choose another output"
            ) from None
        yield


def _check_shared(folder: Path) -> None:
    """Raise InputError unless all processes see the folder that process 0 writes into."""
    if jax.process_count() == 1:
        return
    token = folder / ".shared"
    (name, *_) = exchange(uuid.uuid4().hex)
    all_or_none(lambda: write_atomic(token, name) if is_first() else None)

    def look() -> None:
        if not (token.is_file() and token.read_text(encoding="utf-8") == name):
            raise InputError(
                f"output: a URL, and {folder} of process 0 is not seen here: several hosts need a "
                "folder that all see: mount the bucket (gcsfuse, or NFS) and give that"
            )

    all_or_none(look)
