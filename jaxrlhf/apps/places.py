"""Where the stages of a pipeline lie: in folders here, or in a store by way of folders here."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError, refused
from jaxrlhf.core.files import below, is_url, write_atomic, writing
from jaxrlhf.core.reading import read_object
from jaxrlhf.run.copying import LEASE_NAME, STAGE, Bucket, signs
from jaxrlhf.run.lease import Lease
from jaxrlhf.run.session import lock

MOST = 2**26
"""Bytes of a record: what came out of a stage may be figures of many prompts."""

REMEDY = "remove this folder and those of later stages"


class Places:
    """The folders of a pipeline's stages, each with its record, ``stage.json``.

    Args:
      output: of the pipeline, a folder or a URL.
      names: of the stages, in their order.
    """

    def __init__(self, output: str, names: Sequence[str]):
        self.output = output
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        self._store = Bucket(output) if is_url(output) else None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Nobody else carries out this pipeline.

        Raises:
          InputError: another does, or nothing can be written there.
        """
        if self._store is None:
            with lock(self.output):
                yield
            return
        with self._asking():
            lease = Lease(
                self._store.url,
                partial(self._store.read, LEASE_NAME),
                partial(self._store.write, LEASE_NAME),
                partial(self._store.remove, LEASE_NAME),
                f"pipeline {os.getpid()}",
            )
            lease.take()
        try:
            yield
        finally:
            lease.give_back()

    def path(self, name: str) -> str:
        """What other stages call the folder of one."""
        return below(self.output, name)

    def here(self, name: str) -> Path:
        """The folder of this machine that a stage writes into."""
        return remote.scratch(self.path(name))

    def record(self, name: str) -> dict[str, Any]:
        """The record of a stage; empty where there is none.

        Raises:
          InputError: it cannot be read, or is none.
        """
        path = self.here(name) / STAGE
        if self._store is not None:
            with self._asking():
                try:
                    write_atomic(self._made(path), self._store.read(f"{name}/{STAGE}").decode())
                except FileNotFoundError:
                    path.unlink(missing_ok=True)
        return read_record(path)

    def sign(self, name: str, record: dict[str, Any]) -> None:
        """Write the record of a stage, with its number."""
        path = self._made(self.here(name) / STAGE)
        record = {**record, "number": self._numbers[name]}
        write_atomic(path, json.dumps(record, indent=2) + "\n")
        if self._store is not None:
            with self._asking():
                self._store.put(f"{name}/{STAGE}", path)

    def made(self, name: str) -> list[str]:
        """The names of what a stage has made, its record left out."""
        if self._store is None:
            found = [x.relative_to(self.here(name)).as_posix() for x in self.here(name).rglob("*")]
        else:
            with self._asking():
                found = [x.removeprefix(f"{name}/") for x in self._store.names(name)]
        return [x for x in found if x not in (STAGE, LEASE_NAME, ".lock")]

    def send(self, name: str) -> None:
        """Copy what a stage that is no run has made to where the others look for it."""
        if self._store is None:
            return
        place = self.here(name)
        with self._asking():
            files = [x for x in signs(place) if x != STAGE and not x.startswith(".")]
            self._store.put_all({f"{name}/{x}": place / x for x in files})

    def sum_up(self, results: dict[str, Any]) -> None:
        """Write ``summary.json``: what each stage came to."""
        text = json.dumps(results, indent=2) + "\n"
        if self._store is None:
            write_atomic(Path(self.output) / "summary.json", text)
            return
        with self._asking():
            self._store.write("summary.json", results)

    def _made(self, path: Path) -> Path:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def _asking(self) -> Iterator[None]:
        what = f"output={self.output}: cannot be read or written"
        with refused(what, "check it, the network, and who may write there"):
            yield


def put_beside(model: str, sources: Sequence[Path]) -> None:
    """Copy files into the folder of a run, or to its URL."""
    if not is_url(model):
        for source in sources:
            with writing(Path(model) / source.name):
                (Path(model) / source.name).write_bytes(source.read_bytes())
        return
    with refused(f"{model}: cannot be written", "check who may write there"):
        Bucket(model).put_all({source.name: source for source in sources})


def read_record(path: Path) -> dict[str, Any]:
    """The record at ``path``; empty where there is none."""
    if not path.exists():
        return {}
    record = read_object(path, MOST, REMEDY)
    parts = record.get("settings"), record.get("inputs", {}), record.get("files", {})
    # What came out is signed.
    signed = isinstance(record.get("id", ""), str) and ("id" in record or "result" not in record)
    if not signed or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path}: no record of a stage: {REMEDY}")
    return record
