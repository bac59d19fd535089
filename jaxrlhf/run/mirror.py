"""A run whose output is a URL: it writes into a folder of this machine, which is mirrored there.

Stores of objects have no append, no rename and no lock, and a run's folder needs all three: lines
are appended to metrics.jsonl, a checkpoint becomes whole by a rename, and a lock keeps a second run
away. So nothing of a run knows of the store but this file and ``parts``. A thread copies what has
changed every ``PAUSE`` seconds. It keeps what the folder promises:

- A step is whole there once its mark, ``checkpoints/<step>.whole``, has come: written after all its
  files, and removed before the first of them. The lines of metrics.jsonl up to a step come before
  it. A half-copied step is never taken.
- A start in an empty folder, on another machine, brings back what is whole and goes on from there.
  One that finds the folder of before goes on with that, if it is as far.
- A copy that fails is a warning and a count (``failed_uploads``), and is tried again; the run goes
  on. Only its end, and a signal, wait for the last copy, and are an error without it.
- Instead of a lock there is a ``lease``: a second run is refused, and one that has lost its lease
  to another, after a long sleep, say, ends.

Of several processes, each copies its own pieces (``parts``).
"""

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import is_url, write_atomic, writing
from jaxrlhf.core.reading import read_object
from jaxrlhf.mesh.notes import steps_in
from jaxrlhf.run import copying
from jaxrlhf.run.copying import SENT, Copier, Sign, mark, sign, signs
from jaxrlhf.run.parts import Parts, own_folder


class Mirror(Copier):
    """Copies a run's folder to a store, in a thread.

    Args:
      url: where to.
      folder: of the run, which this process alone writes into.
    """

    def __init__(self, url: str, folder: Path):
        super().__init__(url, folder, holds=True)
        self._sent: dict[str, Sign] = {}
        self._there: dict[int, bool] = {}  # a step that has files there → whether it is whole

    def _open(self) -> None:
        assert self.lease is not None
        self.lease.take()
        self._bring()

    def _round(self) -> None:
        checkpoints = self.folder / "checkpoints"
        # Before the lines, which those of a step are then among.
        steps = {step: signs(checkpoints / str(step)) for step in steps_in(checkpoints)}
        copying.send_small(self.store, self.folder, self._sent)
        # The newest first: it is what a new start wants.
        for step in sorted(steps, reverse=True):
            self._copy_step(step, steps[step])
        # A step that is deleted here makes room there, once a newer one is whole.
        for step in sorted(set(self._there) - set(steps_in(checkpoints))):
            if any(whole and other > step for other, whole in self._there.items()):
                self._remove_step(step)
        write_atomic(self.folder / SENT, json.dumps(self._sent))

    def _copy_step(self, step: int, files: Mapping[str, Sign]) -> None:
        names = {f"checkpoints/{step}/{name}": about for name, about in files.items()}
        changed = {name: about for name, about in names.items() if self._sent.get(name) != about}
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
            self.store.remove(mark(step))
            self._there[step] = False
        for name, about in changed.items():
            self.store.put(name, sending / name)
            self._sent[name] = about
        if not self._there[step]:
            self.store.write(mark(step), sorted(names))
            self._there[step] = True
        shutil.rmtree(sending, ignore_errors=True)

    def _remove_step(self, step: int) -> None:
        self.store.remove_step(step)
        gone = [name for name in self._sent if name.startswith(f"checkpoints/{step}/")]
        for name in gone:
            del self._sent[name]
        del self._there[step]

    def _bring(self) -> None:
        """Make the folder what the store has, unless it is as far itself."""
        names = self.store.names()
        whole = self.store.whole(names)
        begun = {found[1] for name in names if (found := re.match(r"checkpoints/(\d+)/", name))}
        self._there = {int(step): int(step) in whole for step in begun}
        if (self.folder / SENT).is_file():
            with suppress(InputError):
                self._sent = dict(read_object(self.folder / SENT))
        if self._is_as_far(whole, self._sent):
            # What has gone from there since is copied again.
            self._sent = {name: about for name, about in self._sent.items() if name in names}
            return
        other = bool(steps_in(self.folder / "checkpoints")) and not self._is_same()
        copying.make_room(self.url, self.folder, keep=other)
        self._sent = copying.bring_small(self.store, self.folder, names)
        for name in {name for files in whole.values() for name in files}:
            path, size = self.folder / name, names[name].get("size")
            remote.get_whole(self.store.fs, self.store.path(name), path, size)
            self._sent[name] = sign(path)
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
            return here == json.loads(self.store.read("checkpoints/run.json"))
        return False


class NoMirror:
    """Of a run whose folder is its output."""

    failed = 0

    def check(self) -> None:
        """Nothing to check."""

    def flush(self, seconds: float | None = None, tries: tuple[float, ...] = ()) -> None:
        """Nothing to copy."""


@contextmanager
def mirrored(output: str) -> Iterator[Copier | NoMirror]:
    """The folder that stands for ``output`` is what is there, and what comes of it is copied.

    All processes call this. The last copy is waited for at the end, but for an error's.

    Raises:
      InputError: as ``Copier.begin``; at the end, what could not be copied.
    """
    if not is_url(output):
        yield NoMirror()
        return
    folder = remote.scratch(output)
    several = jax.process_count() > 1
    with _alone(own_folder(folder) if several else folder, output):
        copier = Parts(output, folder) if several else Mirror(output, folder)
        copier.begin()
        try:
            yield copier
        except Exception:
            # An error's own words are the ones to be seen, while there is time to say them.
            if not copier.late:
                with suppress(InputError):
                    copier.finish(copying.ERROR_SECONDS)
            raise
        else:
            copier.flush(tries=copying.TRIES)
        finally:
            copier.end()


@contextmanager
def _alone(folder: Path, output: str) -> Iterator[None]:
    """The folder is there, and this process's until the run ends, however that ends."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
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
