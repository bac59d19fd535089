"""Whether a run may go on in a folder: nobody else writes there, and it is still the same run."""

import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from jaxrlhf.algorithms import kl_kind
from jaxrlhf.config import Config, OnPolicyConfig, is_on_policy
from jaxrlhf.errors import InputError


def lock(output: str | Path) -> TextIO:
    """Claim a run's folder until the returned file is closed or the process ends, however it ends.

    Keep the result: ``with lock(output): …``. Process 0 of a multi-host run holds it for all.

    Raises:
      InputError: another run writes to ``output``, or the folder cannot be written.
    """
    if jax.process_index() != 0:
        return open(os.devnull)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        file = open(Path(output) / ".lock", "a+")  # noqa: SIM115 -- open is what holds the lock
    except OSError as error:
        raise InputError(
            f"output={str(output)!r}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise InputError(
            f"output={str(output)!r}: another run writes there ({holder}); "
            "wait for it, stop it, or choose another output"
        ) from error
    file.truncate(0)
    print(f"pid {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


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
    if config.optim.schedule != "constant":
        optim["steps"] = config.steps
    unread = "max_tokens" if is_on_policy(config) else "max_prompt_tokens"
    return {
        "algorithm": {k: x for k, x in full["algorithm"].items() if isinstance(x, str | bool)},
        "model": _without(full["model"], "remat"),
        "critic": _without(full["critic"], "warmup"),
        "reference": _without(full["reference"], "offload"),
        "optim": optim,
        "data": _without(full["data"], "eval", unread),
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
