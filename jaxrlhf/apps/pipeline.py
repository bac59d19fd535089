"""From data to evidence in one command: the stages of a pipeline, each done once.

A stage's folder holds ``stage.json``: what it was made from and, once it is done, what came out. A
stage that is done is skipped, one that was interrupted goes on (a run from its checkpoint, the
others from their start), and one whose settings or inputs have changed since is refused, unless it
had made nothing yet: nothing stale is used, and nothing is thrown away. Where the output is a URL,
the folders are there, and stages find each other's work by its URL (``places``).

What the stages name is looked for before the first one begins. What an earlier stage is still to
make is taken on trust, but for the shape of a model, which the stage's own start has.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.apps.places import Places, put_beside
from jaxrlhf.apps.preferences import write_pairs
from jaxrlhf.config import (
    DecoderConfig,
    MeshConfig,
    PipelineConfig,
    PreferencesConfig,
    RewardConfig,
    StageConfig,
    check,
    stage_evaluation,
    stage_run,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import below, is_url
from jaxrlhf.data.rows import locate, on_hub
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.hub import HEADER, fetch
from jaxrlhf.models.load import check_context, is_run, scores_texts
from jaxrlhf.models.read import read_decoder
from jaxrlhf.models.transformer import Model
from jaxrlhf.rewards.functions import MOVED, resolve
from jaxrlhf.rewards.isolation import check_host
from jaxrlhf.run.folder import run_here
from jaxrlhf.run.loop import train
from jaxrlhf.run.record import plain
from jaxrlhf.run.report import write_report
from jaxrlhf.study.diagnose import examine, read_history, save
from jaxrlhf.study.evaluate import evaluate_model

STOPPED = 143
"""Exit status after a SIGTERM or Ctrl-C: what was asked for is not all done."""


def run_pipeline(
    config: PipelineConfig, mesh: Mesh | None = None, own_process: bool = False
) -> dict[str, Any]:
    """Carry out the stages that are not done yet.

    All files, models and functions that the stages name are looked for first, so that a slip in the
    last stage is found before the first has begun.

    Args:
      mesh: where to; if None, on all devices, runs as their own ``mesh`` says.
      own_process: whether the process may end where a stop cannot wait for this function to return.

    Returns:
      What each stage came to, by its name; ``summary.json`` in ``output`` holds it too.

    Raises:
      InputError: a stage cannot be used, or is not the one that its folder was made by.
    """
    settings = {stage.name: _settings(stage, config) for stage in config.stages}
    places = Places(config.output, list(settings))
    check_stages(config, [x for x in settings if "result" in places.record(x)])
    with places.claimed():
        return _carry_out(config, settings, places, mesh, STOPPED if own_process else None)


def _carry_out(
    config: PipelineConfig,
    settings: dict[str, Any],
    places: Places,
    mesh: Mesh | None,
    leave: int | None,
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    ids: dict[str, str] = {}
    for number, stage in enumerate(config.stages, 1):
        # Any text among the settings may be a path: of an earlier stage's work, known by the id of
        # the making, or of a file, known by its digest.
        texts = set(_texts(settings[stage.name]))
        made_from = {
            "settings": settings[stage.name],
            "inputs": {
                name: x
                for name, x in ids.items()
                if any(Path(text).is_relative_to(places.path(name)) for text in texts)
            },
            "files": {x: _digest(x) for x in sorted(texts) if os.path.isfile(x)},
        }
        record = _record(places, stage.name, made_from)
        title = f"stage {number} of {len(config.stages)}: {stage.name}"
        if "result" in record:
            print(f"{title}: done before")
        else:
            print(title)
            began = time.perf_counter()
            try:
                result = _run_stage(stage, places, config.seed, mesh, leave)
            except SystemExit as stopped:  # a run that was asked to stop has; its stages have not
                raise SystemExit(stopped.code or STOPPED) from stopped
            result = plain({**result, "stage_seconds": time.perf_counter() - began})
            record = {**made_from, "id": uuid.uuid4().hex, "result": result}
            places.sign(stage.name, record)
        ids[stage.name], results[stage.name] = record["id"], record["result"]
    places.sum_up(results)
    return results


def _run_stage(
    stage: StageConfig, places: Places, seed: int, mesh: Mesh | None, leave: int | None
) -> dict[str, Any]:
    if stage.train:
        return train(stage_run(stage, places.path(stage.name), seed), mesh, leave=leave)
    folder, found = places.here(stage.name), {}
    if stage.make:
        _maker(stage)(folder, seed, **stage.set)
    elif stage.preferences:
        mesh = mesh or make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            found = write_pairs(stage.preferences, folder, seed, mesh)
    else:
        found = evaluate_model(stage_evaluation(stage, str(folder), seed), mesh)
        # A run also gets evaluation, diagnosis and page in its own folder.
        if is_run(model := stage.evaluate):
            put_beside(model, [folder / "evaluation.json"])
            place = run_here(model)
            history = read_history(place)
            save(place, history, examine(history))
            page = Path(write_report([model]))
            if is_url(model):
                put_beside(model, [place / "diagnosis.json", page])
    places.send(stage.name)
    return {name: x for name, x in found.items() if name not in ("completions", "best_of_n")}


def _maker(stage: StageConfig) -> Callable[..., Any]:
    """The function of a ``make`` stage; an InputError if it does not take what ``set`` gives."""
    function: Callable[..., Any] = resolve(stage.make)
    try:
        inspect.signature(function).bind(Path(), 0, **stage.set)
    except TypeError as error:
        raise InputError(f"{stage.name}.set: {stage.make}: {error}: mend the names") from None
    return function


def _settings(stage: StageConfig, config: PipelineConfig) -> dict[str, Any]:
    """All that a stage does, files that it names read, as JSON has it; checked."""
    folder = below(config.output, stage.name)
    content = dataclasses.asdict(stage) | {"seed": config.seed}
    if stage.make:
        _maker(stage)
    if stage.train:
        run = stage_run(stage, folder, config.seed)
        check(run)
        content = {"name": stage.name, "run": dataclasses.asdict(run)}
    if stage.evaluate:
        wish = stage_evaluation(stage, folder, config.seed)
        content = {"name": stage.name, "evaluation": dataclasses.asdict(wish)}
    return json.loads(json.dumps(content))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a piece of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(places: Places, name: str, made_from: dict[str, Any]) -> dict[str, Any]:
    """The record of a stage, signed now if it has none; refused if it was made otherwise."""
    record = places.record(name)
    changes = {}
    for part, now in made_from.items():
        before = _as_now(record.get(part, {}), now)
        changes[part] = sorted(x for x in {*before, *now} if before.get(x) != now.get(x))
    # Nothing was made yet: what interrupted the stage may be what its new settings mend.
    made = places.made(name)
    if not record or (any(changes.values()) and not _has_made(made, record, made_from)):
        places.sign(name, made_from)
        return made_from
    for part, names in changes.items():
        if names:
            raise InputError(
                f"{places.path(name)}: was made with other {part} ({', '.join(names)}): choose "
                "another --output, or remove this folder and those of later stages"
            )
    return record


def _as_now(before: Any, now: Any, key: str = "") -> Any:
    """What an older version has recorded, in the words of this one.

    Modules that have moved are named anew, and settings that an algorithm no longer has are left
    out: nothing read them.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        kept = {x: y for x, y in before.items() if x in now or key != "algorithm"}
        return {x: _as_now(y, now.get(x), x) for x, y in kept.items()}
    if isinstance(before, list) and isinstance(now, list):
        pairs = zip_longest(before, now[: len(before)])
        return [_as_now(x, y) for x, y in pairs]
    if isinstance(before, str):
        module, colon, name = before.partition(":")
        return f"{MOVED.get(module, module)}{colon}{name}"
    return before


def _has_made(made: list[str], record: dict[str, Any], made_from: dict[str, Any]) -> bool:
    """Whether the stage of a record has made what would be lost; a run has with a checkpoint.

    Args:
      made: the names of what is in its folder.
    """
    if "run" in record["settings"] and "run" in made_from["settings"]:
        made = [name for name in made if re.match("checkpoints/[0-9]", name)]
    return bool(made) or "result" in record


Shapes = dict[Path, DecoderConfig | None]
"""By the folders of stages to come, the shape of the model that each trains, if it does."""


def check_stages(config: PipelineConfig, done: Collection[str] = ()) -> None:
    """Refuse files, models and functions that are not there and that no earlier stage makes.

    Args:
      done: names of stages that are done: what they have made must be there, and what they were
        made from need not be.

    Raises:
      InputError: the first that cannot be had, with its stage; tokens that exceed a context.
    """
    shapes: Shapes = {}
    for stage in config.stages:
        if stage.name in done:
            continue
        shape = None
        try:
            if stage.preferences:
                _preferences(stage.preferences, shapes)
            elif stage.train:
                shape = _run(stage, shapes)
            elif stage.evaluate:
                _evaluation(stage, shapes)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from error
        shapes[Path(below(config.output, stage.name))] = shape


def _preferences(wish: PreferencesConfig, shapes: Shapes) -> None:
    check_host(RewardConfig(function=wish.judge))
    _files((wish.train, wish.eval), shapes)
    shape = _shape(wish.model, shapes)
    tokens = wish.max_prompt_tokens + wish.max_new_tokens
    if shape is not None and tokens > shape.context:
        raise InputError(
            f"max_prompt_tokens + max_new_tokens = {tokens} tokens exceed the context of "
            f"{wish.model}, {shape.context}: lower them"
        )


def _run(stage: StageConfig, shapes: Shapes) -> DecoderConfig | None:
    """The shape of the model that the stage trains."""
    run = stage_run(stage, "", 0)
    _files((run.data.train, run.data.eval, run.algorithm.normalise_on), shapes)
    for reward in (*run.rewards, *run.eval.gold):
        if reward.function or reward.verifier:
            check_host(reward)
        _reward_models(reward.ensemble or (reward.model,), shapes)
    for path in (run.reference.path, run.critic.path):
        _shape(path, shapes)
    shape = run.model.decoder or _shape(run.model.path, shapes)
    if shape is not None:
        check_context(run, Model(shape))
    return shape


def _evaluation(stage: StageConfig, shapes: Shapes) -> None:
    wish = stage_evaluation(stage, "", 0)
    _files((wish.data,), shapes)
    if wish.reward:
        check_host(RewardConfig(function=wish.reward))
    _reward_models((wish.reward_model,), shapes)
    for path in (wish.model, wish.reference, wish.against):
        _shape(path, shapes)


def _reward_models(paths: Sequence[str], shapes: Shapes) -> None:
    for path in paths:
        if path and not _makers(path, shapes) and not scores_texts(path):
            raise InputError(f"{path}: no reward model: give its run's folder, or a classifier's")


def _files(paths: Sequence[str], shapes: Shapes) -> None:
    for path in paths:
        if path and not on_hub(path) and not _makers(path, shapes):
            locate(path)


def _shape(path: str, shapes: Shapes) -> DecoderConfig | None:
    """The shape of a model; None where there is none to have, or a stage makes it otherwise."""
    if not path:
        return None
    if makers := _makers(path, shapes):
        return shapes[makers[0]]
    return read_decoder(fetch(path, HEADER))


def _makers(path: str, shapes: Shapes) -> list[Path]:
    """The folder that ``path`` is or lies in, of those of stages to come."""
    here = Path(path).absolute()
    return [x for x in shapes if here.is_relative_to(x.absolute())]
