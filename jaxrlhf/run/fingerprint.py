"""What must stay the same: from one launch of a run to the next, and among its processes."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from jaxrlhf.algorithms import kl_kind
from jaxrlhf.config import Config, OnPolicyConfig, is_on_policy
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.messages import exchange


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
    if isinstance(config.algorithm, OnPolicyConfig) and "kl_estimator" in full["algorithm"]:
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


def told(config: Config) -> dict[str, Any]:
    """What all processes of a run have to be told alike: its configuration, and the versions."""
    fields = _without(dataclasses.asdict(config), "distributed")
    return fields | {name: version(name) for name in ("jaxrlhf", "jax", "jaxlib", "flax", "optax")}


def check_alike(facts: Mapping[str, Any]) -> None:
    """Refuse to train where the processes of a run were told different things.

    Each would go its own way, in silence, or wait for the others for ever. All call it together.

    Args:
      facts: what has to be the same on all of them, JSON-able.

    Raises:
      InputError: it is not; the message names the fields, with both values.
    """
    said = [json.loads(text) for text in exchange(json.dumps(facts))]
    for process, theirs in enumerate(said):
        if found := list(_differences(said[0], theirs)):
            listed = ", ".join(f"{name}={new!r} (0: {old!r})" for name, old, new in found)
            raise InputError(
                f"process {process} was told otherwise than process 0: {listed}: start all with "
                "the same command, on the same files and versions"
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
