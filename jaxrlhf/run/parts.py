"""A run of several processes whose output is a URL: each keeps its own pieces, the store all.

The hosts of a pod share no disk. So each process writes its pieces of a step into a folder of its
own (``mesh.saving``), and copies them from there; process 0 copies the rest too, and the mark comes
last, once all have said that theirs are there. The pieces of all, side by side, are the step as any
number of processes reads it: a start brings to each what its devices will hold, and no more, unless
one process alone wrote the step, whose files cannot be told apart.

The store has the word about which steps there are: one that has not come there is left, but where
all processes still have their pieces of it, it is sent first. While a step is on its way, later
ones are not taken; a link each keeps its files from the run, which deletes old steps.
"""

import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import write_atomic, writing
from jaxrlhf.core.reading import read_object
from jaxrlhf.core.shown import one_line
from jaxrlhf.mesh.messages import exchange, post, posted, withdraw
from jaxrlhf.mesh.notes import beside, note_path, steps_in
from jaxrlhf.mesh.processes import all_or_none, by_first, is_first, jointly
from jaxrlhf.run.copying import (
    BATCH,
    PAUSE,
    SENT,
    TRIES,
    Copier,
    Sign,
    bring_small,
    digest,
    make_room,
    mark,
    send_small,
    sign,
    signs,
)

log = logging.getLogger(__name__)

NOTE = "host/metadata"
"""The note of a step, by its name in the step."""

RUN = "run.json"
"""Which run the steps are of, beside them."""

PIECE = re.compile(r"state/(.+)/[0-9]+(\.[0-9]+)*")
"""A file that holds one piece of an array."""

WAIT = 0.1
"""Seconds between two looks at whether the others' pieces are there."""


def own_folder(folder: Path) -> Path:
    """Where this process keeps its pieces; ``folder`` stands for the output.

    Another number of processes has other pieces, and other folders.
    """
    return folder.with_name(f"{folder.name}.{jax.process_index()}-of-{jax.process_count()}")


@dataclass
class _Sending:
    """A step on its way."""

    step: int
    topic: str
    """Under which the processes say that theirs is there."""
    left: list[str]
    """Of this process's files, those that are not there yet."""
    note: Sign
    told: bool = False


class Parts(Copier):
    """This process's part in copying a run to a store; the ``Elsewhere`` of its checkpoints.

    Args:
      url: where to.
      output: the folder of the run's small files, which process 0 writes.

    Attributes:
      folder: of this process's pieces of the steps.
    """

    _count = itertools.count()

    def __init__(self, url: str, output: Path):
        super().__init__(url, own_folder(output), holds=is_first())
        self._output = output
        self._aside = self.folder.with_name(self.folder.name + ".sending")
        self._there: dict[int, str] = {}  # whole steps there at the start → digests of their notes
        self._whole: set[int] = set()  # those there now; process 0 alone knows
        self._begun: set[int] = set()  # those there without a mark, likewise
        self._taken: int | None = None
        self._newest: int | None = None
        self._sending: _Sending | None = None
        self._topic = ""
        self._sent: dict[str, Sign] = {}  # of small files
        self._notes: dict[int, Sign] = {}  # of notes there, which the run may amend
        self._failures = f"parts/failed/{next(Parts._count)}"
        self._elsewhere_failed = 0

    def offer(self, step: int) -> None:
        """A step is whole on the disks of all: copy it, if none is on its way.

        All processes call this, which waits for no copy.
        """
        self._newest = step
        if step == self._taken or not by_first(partial(self._accepts, step)):
            return
        try:
            all_or_none(partial(self._take, step, f"parts/{next(Parts._count)}"))
        except Exception as error:
            self._sending = None
            self.failed += 1
            log.warning("output=%s: step %d: %s", self.url, step, one_line(error))
            return
        self._taken = step
        self._awake.set()

    def flush(self, seconds: float | None = None, tries: tuple[float, ...] = ()) -> None:
        """As of ``Copier``: what is on its way, and what has been offered since."""
        until = None if seconds is None else time.monotonic() + seconds
        self._finish_all(seconds, tries)
        if self._newest is not None and self._newest != self._taken:
            self.offer(self._newest)
            left = None if until is None else max(0.1, until - time.monotonic())
            self._finish_all(left, tries)

    def _finish_all(self, seconds: float | None, tries: tuple[float, ...]) -> None:
        """``finish`` on all processes."""
        try:
            jointly(partial(self.finish, seconds, tries))
        except Exception:
            # What lacks then is another's part, which does not come.
            self.late |= self._sending is not None and not self._problem
            raise

    def bring(self, step: int, wanted: Mapping[str, Any]) -> None:
        """Bring the files of a step that hold what this process's devices will, and are not here.

        Args:
          wanted: arrays by name, as ShapeDtypeStruct with shardings (none: all of it).

        Raises:
          InputError: they cannot be read there.
        """
        if step not in self._there:
            return
        began = time.perf_counter()
        try:
            listed = [
                name.removeprefix(f"checkpoints/{step}/")
                for name in json.loads(self.store.read(mark(step)))
            ]
            # Beside the pieces stands how an array is cut.
            count = self._fetch(step, [name for name in listed if not PIECE.fullmatch(name)])
            there = [name for name in listed if PIECE.fullmatch(name)]
            count += self._fetch(step, needed(there, self.folder / str(step), wanted))
        except FileNotFoundError as error:
            # What is damaged is the reader's to tell, who can take the step before.
            log.warning("output=%s: step %d: %s", self.url, step, one_line(error))
            return
        except Exception as error:
            raise InputError(
                f"output={self.url}: step {step} cannot be brought ({one_line(error)}): check the "
                "network, and who may read it"
            ) from None
        spent = time.perf_counter() - began
        what = f"{count} of its {len(listed)} files in {spent:.1f} s"
        print(f"output: {self.url}: step {step}: {what}, to {self.folder}", file=sys.stderr)

    def _fetch(self, step: int, names: Iterable[str]) -> int:
        """Bring those that are not here; how many those are."""
        place = self.folder / str(step)
        new = {f"checkpoints/{step}/{x}": place / x for x in names if not (place / x).is_file()}
        if new:
            self.store.get_all(new)
        return len(new)

    def _open(self) -> None:
        all_or_none(self.lease.take if self.lease is not None else lambda: None)
        there = by_first(self._look)
        self._there = {int(step): note for step, note in there["steps"].items()}
        self._whole = set(self._there)
        said = [json.loads(text) for text in exchange(json.dumps(self._here()))]
        step = unsent(there, said)
        if step is not None:
            by_first(partial(self._clear, step))
            all_or_none(partial(self._take, step, f"parts/{next(Parts._count)}"))
            jointly(partial(self.finish, None, TRIES))
            self._there[step] = said[0]["steps"][str(step)]
        all_or_none(partial(self._align, bool(said[0]["sent"])))

    def _look(self) -> dict[str, Any]:
        """What the store has: of which run, and the digests of its whole steps' notes."""
        names = self.store.names()
        whole = self.store.whole(names)
        found = {match[1] for x in names if (match := re.match(r"checkpoints/(\d+)[/.]", x))}
        self._begun = {int(step) for step in found} - set(whole)
        run = ""
        with suppress(FileNotFoundError, ValueError):
            run = json.loads(self.store.read(f"checkpoints/{RUN}"))["run"]
        notes = {x: digest(self.store.read(f"checkpoints/{x}/{NOTE}")) for x in whole}
        return {"run": run, "steps": notes}

    def _here(self) -> dict[str, Any]:
        """What this process has: of which run, the digests of its steps' notes, and which steps
        have been whole in the store."""
        run, sent, notes = "", [], {}
        with suppress(InputError):
            run = str(read_object(self.folder / RUN).get("run", ""))
        with suppress(InputError):
            sent = [int(step) for step in read_object(self.folder / SENT).get("steps", [])]
        for step in steps_in(self.folder):
            with suppress(OSError):
                notes[str(step)] = digest(note_path(self.folder / str(step)).read_bytes())
        return {"run": run, "sent": sent, "steps": notes}

    def _align(self, sent_before: bool) -> None:
        """Make the folder hold the store's steps: of each, what is here already, or its note."""
        kept = set()
        for step in steps_in(self.folder):
            path = self.folder / str(step)
            note = note_path(path)
            if note.is_file() and digest(note.read_bytes()) == self._there.get(step):
                kept.add(step)
                continue
            # By a rename: no kill leaves half of it.
            trash = beside(self.folder, "trash")
            with writing(trash):
                trash.mkdir(exist_ok=True)
                os.replace(path, trash / f"{step}-{time.time_ns()}")
            shutil.rmtree(trash, ignore_errors=True)
        if is_first():
            self._align_small(max(kept, default=None), sent_before)
        for step in self._there:
            self._fetch(step, [NOTE])
            self._notes[step] = sign(note_path(self.folder / str(step)))
        if self._there:
            write_atomic(self.folder / RUN, self.store.read(f"checkpoints/{RUN}").decode())

    def _align_small(self, newest: int | None, sent_before: bool) -> None:
        """Keep the small files of here if they are as far as the store's steps; else bring those of
        there. ``newest``: of the steps that are here."""
        as_far = newest == max(self._there) if self._there else not sent_before
        names = self.store.names()
        if as_far:
            with suppress(InputError):
                sent = read_object(self.folder / SENT).get("small", {})
                self._sent = {name: about for name, about in sent.items() if name in names}
            return
        # Of a run by one process, whose steps may not have come to the store.
        alone = steps_in(self._output / "checkpoints")
        make_room(self.url, self._output, max(alone, default=0) > max(self._there, default=0))
        self._sent = bring_small(self.store, self._output, names)

    def _accepts(self, step: int) -> bool:
        """Whether a step can be taken now."""
        if self._sending is not None:
            return False
        try:
            self._clear(step)
        except Exception as error:
            log.debug("step %d as it was before: %s", step, error)
            return False
        return True

    def _clear(self, step: int) -> None:
        """Delete what is there of a step, damaged or of a copy that was killed."""
        if step in self._whole | self._begun:
            self.store.remove_step(step)
            self._whole.discard(step)
            self._begun.discard(step)

    def _take(self, step: int, topic: str) -> None:
        """Hold on to this process's files of a step, which are sent from now on."""
        shutil.rmtree(self._aside, ignore_errors=True)
        place = self.folder / str(step)
        names = [x for x in signs(place) if is_first() or PIECE.fullmatch(x)]
        for name in names:
            with writing(self._aside):
                (self._aside / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(place / name, self._aside / name)
        self._sending = _Sending(step, topic, names, sign(note_path(place)))

    def _pause(self) -> float:
        waits = self._sending is not None and not self._problem
        return min(WAIT, PAUSE) if waits else PAUSE

    def _finish(self, tries: tuple[float, ...]) -> None:
        super()._finish(tries)
        while self._sending is not None and not (self._problem or self._over.wait(WAIT)):
            self._copy()

    def _round(self) -> None:
        self._tell_failures()
        if is_first():
            send_small(self.store, self._output, self._sent)
        if (sending := self._sending) is not None:
            self._send(sending)
        if is_first():
            self._amend()
            # A step that is deleted here makes room there, once a newer one is whole.
            for step in sorted((self._whole | self._begun) - set(steps_in(self.folder))):
                if step < max(self._whole, default=0):
                    self._clear(step)
            known = {"small": self._sent, "steps": sorted(self._whole)}
            write_atomic(self.folder / SENT, json.dumps(known))

    def _send(self, sending: _Sending) -> None:
        """Copy this process's files; on process 0, write the mark once all have copied theirs."""
        step = sending.step
        while sending.left:
            batch = sending.left[:BATCH]
            self.store.put_all({f"checkpoints/{step}/{x}": self._aside / x for x in batch})
            del sending.left[:BATCH]
        if not is_first():
            # The next may be taken as soon as this is told.
            shutil.rmtree(self._aside, ignore_errors=True)
            self._sending = None
        if not sending.told:
            post(sending.topic, "there")
            # What was told before, process 0 has heard.
            if self._topic:
                withdraw(self._topic)
            self._topic, sending.told = sending.topic, True
        if is_first() and len(posted(sending.topic)) == jax.process_count():
            self.store.put(f"checkpoints/{RUN}", self.folder / RUN)
            self.store.write(mark(step), sorted(self.store.names(f"checkpoints/{step}")))
            self._whole.add(step)
            self._notes[step] = sending.note
            shutil.rmtree(self._aside, ignore_errors=True)
            self._sending = None

    def _amend(self) -> None:
        """Copy the newest note again, if the run has amended it: it is replaced as a whole."""
        newest = max(self._whole, default=None)
        if newest is None or not (note := note_path(self.folder / str(newest))).is_file():
            return
        about = sign(note)
        if self._notes.get(newest) != about:
            self.store.put(f"checkpoints/{newest}/{NOTE}", note)
            self._notes[newest] = about

    def _tell_failures(self) -> None:
        """What has failed on the others counts on process 0, whose figures are written down."""
        if not is_first():
            if self.failed:
                post(self._failures, str(self.failed))
            return
        others = sum(int(text) for text in posted(self._failures).values())
        self.failed += others - self._elsewhere_failed
        self._elsewhere_failed = others


def unsent(there: Mapping[str, Any], here: Sequence[Mapping[str, Any]]) -> int | None:
    """The newest step that all processes have of one save, later than what is in the store, and
    that was never whole there; None if there is none.

    Args:
      there: ``run``, and ``steps``: digests of the notes by step.
      here: the same of each process, and ``sent``: steps that have been whole.
    """
    runs = {x["run"] for x in here} | ({there["run"]} if there["run"] else set())
    if len(runs) > 1 or "" in runs:
        return None
    first, *others = here
    newest = max(map(int, there["steps"]), default=-1)
    common = [
        int(step)
        for step, note in first["steps"].items()
        if int(step) > newest
        and int(step) not in first["sent"]
        and all(other["steps"].get(step) == note for other in others)
    ]
    return max(common, default=None)


def needed(names: Sequence[str], place: Path, wanted: Mapping[str, Any]) -> list[str]:
    """Of the names of pieces, those that hold what the devices of this process will.

    Args:
      place: the folder of the step, where ``.zarray`` says of each array how it is cut.
      wanted: as of ``Parts.bring``.
    """
    found = []
    cut: dict[str, set[str] | None] = {}
    for name in names:
        match = PIECE.fullmatch(name)
        assert match is not None
        array = match[1]
        if array in wanted and array not in cut:
            chunk = tuple(read_object(place / "state" / array / ".zarray")["chunks"])
            x = wanted[array]
            cut[array] = x.sharding and cells(tuple(x.shape), chunk, x.sharding)
        cell = cut.get(array)
        if array in wanted and (cell is None or name.rpartition("/")[2] in cell):
            found.append(name)
    return found


def cells(
    shape: tuple[int, ...], chunk: tuple[int, ...], sharding: jax.sharding.Sharding
) -> set[str]:
    """The names of the pieces of an array, cut into ``chunk`` each, that this process's devices
    hold part of: the place along each axis, joined by dots; "0" of a scalar."""
    found: set[str] = set()
    for index in sharding.addressable_devices_indices_map(shape).values():
        along = [
            range((part.start or 0) // size, math.ceil((part.stop or length) / size))
            for part, size, length in zip(index or (), chunk, shape, strict=True)
        ]
        found |= {".".join(map(str, cell)) or "0" for cell in itertools.product(*along)}
    return found
