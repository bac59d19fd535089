"""Whether a launch goes on with the same run: what must stay as it was, and what may change.

A run whose ``fingerprint`` differs is another run, and never goes on. Of the other fields, such as
β or a reward, ``changes`` has those that differ: a run may go on with them, but only where that is
asked for. A sweep that forgets to give each run an output would otherwise look done.
"""

import dataclasses
import json
import logging
import re
from typing import Any, NamedTuple

from jaxrlhf.config import Config, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.remote import scratch
from jaxrlhf.core.shown import shown
from jaxrlhf.run.page import fields

log = logging.getLogger(__name__)

FREE = re.compile(
    r"output|steps|trackers(\.\d+)?|(mesh|distributed|checkpoint)\..*"
    r"|optim\.(microbatches|max_skipped)|model\.remat|reference\.offload"
    r"|sample\.slots|eval\.batch_size|data\.(chat_template|allow_dropped)"
    r"|(rewards|eval\.gold)\.\d+\.(offload|timeout|in_process|isolate(\..*)?)"
)
"""Fields that change neither what is learnt nor what is measured, only where, how fast and how
long; of a template, the rows that it makes are compared."""

PATHS = ("data.train", "data.eval")
"""Files whose contents are compared: the same rows may lie elsewhere."""


class Change(NamedTuple):
    """A field, and what it was and is to be; an empty text where one of them has no such field."""

    field: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.field} {self.old or 'nothing'} → {self.new or 'nothing'}"


def changes(saved: Config, now: Config) -> list[Change]:
    """The fields that differ and are not free, in the order of the config."""
    old, new = (_leaves(config) for config in (saved, now))
    found = []
    for name in dict.fromkeys((*old, *new)):
        moved = name in PATHS and bool(old[name]) and bool(new[name])
        if old.get(name) != new.get(name) and not moved and not FREE.fullmatch(name):
            found.append(Change(name, *(shown(x[name]) if name in x else "" for x in (old, new))))
    return found


def _leaves(config: Config) -> dict[str, Any]:
    # Through JSON: tuples become lists, as in a file.
    return dict(fields(json.loads(json.dumps(dataclasses.asdict(config)))))


def changes_of(now: Config) -> list[Change]:
    """What ``now``, as it is resolved, changes in the run whose folder it names; nothing where that
    has no config.yaml that can be read."""
    path = scratch(now.output) / "config.yaml"
    if not path.is_file():
        return []
    try:
        return changes(load(path), now)
    except InputError as error:
        log.warning("%s: whether settings have changed cannot be told", error)
        return []


def refuse_changes(output: str, found: list[Change]) -> None:
    """Raise an InputError that names each field."""
    if found:
        listed = ", ".join(map(str, found))
        raise InputError(
            f"output={output!r}: the run there was begun with other settings: {listed}: choose "
            "another output, or go on with these by --resume-with-changes"
        )
