"""Whether a launch goes on with the same run: what must stay as it was, and what may change.

A run whose ``fingerprint`` differs is another run, and never goes on. Of the other fields, such as
β or a reward, ``changes`` has those that differ: a run may go on with them, but only where that is
asked for. A sweep that forgets to give each run an output would otherwise look done.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.algorithms import kl_kind
from jaxrlhf.config import Config, OnPolicyConfig, is_on_policy, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import shown
from jaxrlhf.run.report import fields

log = logging.getLogger(__name__)

FREE = re.compile(
    r"output|steps|(mesh|distributed|checkpoint)\..*"
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
    path = Path(now.output) / "config.yaml"
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


def fingerprint(config: Config, **facts: Any) -> dict[str, Any]:
    """What must stay the same for a run to go on where it stopped, as JSON-able nested dicts.

    The number of steps counts only where the learning rate depends on it. Left out is what may
    change from launch to launch: mesh, microbatches, checkpoints, evaluation, output, the numbers
    of the algorithm (its words and switches, defaults filled in, say what is learnt, and from
    what), and the rewards.

    Args:
      config: the run's configuration.
      **facts: more of the kind that only the run knows, such as the number of rows of the data,
        and a digest of their ``contents``.
    """
    full = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as in a file
    if isinstance(config.algorithm, OnPolicyConfig):
        full["algorithm"]["kl_estimator"] = kl_kind(config.algorithm)
    optim = _without(full["optim"], "microbatches", "max_skipped")
    # A decaying rate depends on how many steps there will be.
    if config.optim.schedule != "constant":
        optim["steps"] = config.steps
    unread = "max_tokens" if is_on_policy(config) else "max_prompt_tokens"
    # The contents tell what a template made of the rows, wherever it lies.
    data = _without(full["data"], "eval", "chat_template", "allow_dropped", unread)
    return {
        "algorithm": {k: x for k, x in full["algorithm"].items() if isinstance(x, str | bool)},
        "model": _without(full["model"], "remat"),
        "critic": _without(full["critic"], "warmup"),
        "reference": _without(full["reference"], "offload"),
        "optim": optim,
        "data": data if data["date"] else _without(data, "date"),
        "sample": {"n": config.sample.n},
        "seed": config.seed,
        "eval": {"patience": "on" if config.eval.patience else "off"},  # a second set of parameters
        **facts,
    }


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose configuration has become another.

    A field that one side lacks came or went with a version of the program and is not compared.
    Rows with the same contents are the same rows, whichever path leads to them.

    Args:
      saved: the fingerprint in the checkpoint.
      now: the fingerprint of this launch.

    Raises:
      InputError: fields differ; the message names each, with both values. Or only the contents of
        the rows do.
    """
    differences = list(_differences(saved, json.loads(json.dumps(now))))
    if saved.get("contents", "") == now.get("contents"):
        differences = [found for found in differences if found[0] != "data.train"]
    fields = [found for found in differences if found[0] not in ("contents", "eval.contents")]
    if fields:
        listed = ", ".join(f"{name}={new!r} (was {old!r})" for name, old, new in fields)
        raise InputError(
            f"cannot resume with {listed}: set it back to what it was, or choose another output"
        )
    if differences:
        files = {"contents": now["data"]["train"], "eval.contents": "data.eval"}
        listed = " and ".join(files[name] for name, _, _ in sorted(differences))
        raise InputError(
            f"cannot resume: the rows of {listed} have changed: put them back as they were, or "
            "choose another output"
        )


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every field that both sides have and that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in (key for key in new if key in old):
            yield from _differences(old[key], new[key], f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
