"""What the stages of a pipeline name, looked for before the first stage begins.

What an earlier stage is still to make is taken on trust, but for the shape of a model, which the
stage's own start has.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from jaxrlhf.config import (
    DecoderConfig,
    PipelineConfig,
    PreferencesConfig,
    RewardConfig,
    StageConfig,
    stage_evaluation,
    stage_run,
)
from jaxrlhf.data.reading import normalise_path
from jaxrlhf.data.rows import locate
from jaxrlhf.errors import InputError
from jaxrlhf.models.reading import read_decoder
from jaxrlhf.models.transformer import Model
from jaxrlhf.networks import check_context, scores_texts
from jaxrlhf.rewards.functions import resolve
from jaxrlhf.rewards.local import host_function

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
        folder = Path(config.output) / stage.name
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
        shapes[folder] = shape


def _preferences(wish: PreferencesConfig, shapes: Shapes) -> None:
    resolve(wish.judge)
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
    _files((run.data.train, run.data.eval, normalise_path(run)), shapes)
    for reward in (*run.rewards, *run.eval.gold):
        _reward(reward, shapes)
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
        resolve(wish.reward)
    _reward_models((wish.reward_model,), shapes)
    for path in (wish.model, wish.reference, wish.against):
        _shape(path, shapes)


def _reward(reward: RewardConfig, shapes: Shapes) -> None:
    if (reward.function or reward.verifier) and not reward.isolate:
        host_function(reward)
    _reward_models(reward.ensemble or (reward.model,), shapes)


def _reward_models(paths: Sequence[str], shapes: Shapes) -> None:
    for path in paths:
        if path and not _makers(path, shapes) and not scores_texts(path):
            raise InputError(f"{path}: no reward model: give its run's folder, or a classifier's")


def _files(paths: Sequence[str], shapes: Shapes) -> None:
    for path in paths:
        if path and not _makers(path, shapes):
            locate(path)


def _shape(path: str, shapes: Shapes) -> DecoderConfig | None:
    """The shape of a model; None where there is none to have, or a stage makes it otherwise."""
    if not path:
        return None
    if makers := _makers(path, shapes):
        return shapes[makers[0]]
    return read_decoder(path)


def _makers(path: str, shapes: Shapes) -> list[Path]:
    """The folder that ``path`` is or lies in, of those of stages to come."""
    here = Path(path).absolute()
    return [x for x in shapes if here.is_relative_to(x.absolute())]
