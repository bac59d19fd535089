"""What `jaxrlhf eval` is to measure, and the stages of `jaxrlhf pipeline`."""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from jaxrlhf.config.checks import below_least, check_seed
from jaxrlhf.config.load import build, locate_config, read
from jaxrlhf.config.run import Config
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import below
from jaxrlhf.core.remote import check_url
from jaxrlhf.core.shown import shown


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a policy on held-out prompts, sampled at T = 1, untruncated, or a reward model on
    pairs."""

    model: str
    """The output folder of a run, or smollm2, a Hugging Face folder, a .gguf file."""
    data: str = ""
    """Prompts, a .jsonl or .parquet file; "" = the run's data.eval. For a reward model
    pairs: prompt, chosen, rejected, and perhaps subset, as RewardBench has them."""
    reference: str = ""
    """What the KL is measured to and the best of n is drawn from; as model. "" = the run's
    reference."""
    against: str = ""
    """Whose completions are to be beaten; as model. "" = the reference."""
    reward: str = ""
    """Gold measure: sentiment, or package.module:function. "" = the run's eval.gold."""
    reward_model: str = ""
    """Gold measure, instead: a reward model, as ``rewards.model``."""
    n: int = 8
    """Completions a prompt, of the model and of ``against``."""
    best_of: int = 64
    """Completions a prompt of the reference, for the best-of-n curve; 0 leaves it out."""
    correct_at: float | None = None
    """A completion with at least this gold measure (without one: reward) is correct, for pass@k and
    maj@k. None: the full score of a verifier, where one alone measures; else 1, if all are 0 or 1;
    else neither is measured."""
    max_new_tokens: int | None = None
    """Most tokens of a completion. None: as the run samples; what its data.max_tokens leaves, at
    least 16, if it learnt from rows; 64 for a model that is no run."""
    rows: int = 64
    """Completions that are drawn at once on each device."""
    fsdp: int | None = None
    """Pieces that parameters are split into by their embed axis; None: as the run."""
    tensor: int | None = None
    """Pieces that heads, mlp and vocabulary are split into; None: as the run."""
    context: int | None = None
    """Pieces that the tokens of whole rows are split into; None: as the run."""
    raw: bool = False
    """Of reward models alone: score pairs of text as they are, without the chat template."""
    seed: int = 0
    """Every draw follows from it."""
    output: str = ""
    """Folder, or its URL, that evaluation.json is written to; "" = the run's."""


def check_evaluate(wish: EvaluateConfig) -> None:
    """Refuse numbers out of their range, and two gold measures.

    Raises:
      InputError: the first that cannot be.
    """
    least = {
        "n": 1,
        "best_of": 0,
        "max_new_tokens": 1,
        "rows": 1,
        "fsdp": 1,
        "tensor": 1,
        "context": 1,
    }
    for problem in below_least(vars(wish), least):
        raise InputError(problem)
    check_seed(wish.seed)
    if wish.correct_at is not None and not math.isfinite(wish.correct_at):
        raise InputError(f"correct_at={wish.correct_at}: must be a finite number")
    if wish.reward and wish.reward_model:
        raise InputError("reward and reward_model are both given: keep one of them")


def parse_evaluate(words: Sequence[str]) -> EvaluateConfig:
    """The words after ``jaxrlhf eval``, checked.

    Raises:
      InputError: a value that cannot be.
      SystemExit: on ``--help``, and on words that tyro refuses.
    """
    positional = (tyro.conf.PositionalRequiredArgs,)
    wish = tyro.cli(EvaluateConfig, prog="jaxrlhf eval", args=words, config=positional)
    check_evaluate(wish)
    return wish


@dataclass(frozen=True)
class PreferencesConfig:
    """Preference data out of nothing but a policy and a judge: sample, score, compare."""

    model: str
    """The policy that writes: whatever ``model.path`` may be."""
    judge: str
    """The reward function that compares: a built-in or package.module:function."""
    train: str
    """Prompts for train.jsonl."""
    eval: str
    """Prompts for eval.jsonl, held out."""
    max_prompt_tokens: int
    max_new_tokens: int
    train_rounds: int = 1
    """Times that the training prompts are sampled from."""
    eval_rounds: int = 1
    n: int = 4
    """Completions a prompt and round; n // 2 pairs: best with worst, second with second worst."""
    batch_size: int = 16
    """Most prompts at once; it changes no completion."""
    min_gap: float = 0.1
    """Pairs closer than this, in the judge's units, are dropped."""


LEAST = {
    "max_prompt_tokens": 1,
    "max_new_tokens": 1,
    "train_rounds": 1,
    "eval_rounds": 1,
    "n": 2,
    "batch_size": 1,
    "min_gap": 0,
}
"""What each number of a PreferencesConfig must at least be."""


@dataclass(frozen=True)
class StageConfig:
    """One stage: exactly one of ``make``, ``preferences``, ``train``, ``evaluate``.

    In every text, ``{name}`` stands for the output folder of an earlier stage.
    """

    name: str
    make: str = ""
    """A Python function (folder, seed, **set) that writes files, by its dotted path. Its module is
    imported, and any function of any module can be named: read pipelines of others first."""
    preferences: PreferencesConfig | None = None
    """Sample from a policy and compare: train.jsonl and eval.jsonl."""
    train: str = ""
    """A run: the YAML file of a Config, relative to this file."""
    evaluate: str = ""
    """A model to evaluate on held-out prompts, as ``jaxrlhf eval`` does, its page written too."""
    set: dict[str, Any] = field(default_factory=dict)
    """Fields of that run, by dotted name, in place of the file's; or options of the
    evaluation; or further arguments of the function."""


@dataclass(frozen=True)
class PipelineConfig:
    """Stages in order, each in a folder of its own below ``output``."""

    stages: tuple[StageConfig, ...]
    seed: int = 0
    """Of every stage that does not set its own."""
    output: str = "runs/pipeline"


KINDS = ("make", "preferences", "train", "evaluate")
"""What a stage can be."""


def load_pipeline(path: str | Path, output: str = "", seed: int | None = None) -> PipelineConfig:
    """The pipeline that a YAML file describes, its stages' files found beside it.

    Args:
      path: a YAML file, or ``jaxrlhf:configs/pipelines/NAME``, one of this package's.
      output, seed: in place of the file's.

    Raises:
      InputError: no such file, an unknown key, a stage that is of no kind or of two, a name that
        is taken or refers to no earlier stage, a number out of its range.
    """
    path = locate_config(path)
    config: PipelineConfig = build(PipelineConfig, read(path), str(path))
    output, seed = output or config.output, config.seed if seed is None else seed
    check_url("output", output)
    if not 0 <= seed < 2**32:
        raise InputError(f"{path}: seed={seed}: give 0 or more, below {2**32}")
    if not config.stages:
        raise InputError(f"{path}: stages: empty: give at least one")
    folders: dict[str, str] = {}
    stages = []
    for index, stage in enumerate(config.stages):
        where = f"{path}: stages.{index}"
        _check(stage, where, folders)
        stages.append(_resolved(stage, path.parent, folders, where))
        folders[stage.name] = below(output, stage.name)
    return PipelineConfig(tuple(stages), seed, output)


def stage_run(stage: StageConfig, output: str, seed: int) -> Config:
    """The run that a ``train`` stage is: its file, with ``set``, this folder and this seed.

    Raises:
      InputError: as ``load``; a field of ``set`` counts as one of the file's.
    """
    content = read(Path(stage.train))
    if not isinstance(content, dict):
        raise InputError(f"{stage.train}: should be keys with values, one a line")
    for dotted, value in {"seed": seed, **stage.set, "output": output}.items():
        *sections, name = dotted.split(".")
        at = content
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise InputError(f"{stage.name}.set: {dotted}: {section} is no section")
        at[name] = value
    return build(Config, content, f"{stage.train} with stage {stage.name}")


def stage_evaluation(stage: StageConfig, output: str, seed: int) -> EvaluateConfig:
    """What an ``evaluate`` stage is to measure.

    Raises:
      InputError: an option that is not known, or out of its range.
    """
    content = {"seed": seed, **stage.set, "model": stage.evaluate, "output": output}
    wish: EvaluateConfig = build(EvaluateConfig, content, f"stage {stage.name}")
    check_evaluate(wish)
    return wish


def _check(stage: StageConfig, where: str, earlier: Mapping[str, str]) -> None:
    given = [kind for kind in KINDS if getattr(stage, kind)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InputError(f"{where}: {stage.name}: give one of {', '.join(KINDS)}, not {found}")
    if not stage.name.isidentifier():
        raise InputError(
            f"{where}.name={shown(stage.name)}: letters, digits and _ only: it is a folder"
        )
    if stage.name in earlier:
        raise InputError(f"{where}.name={stage.name}: an earlier stage has this name")
    for name in {"output", "model" if stage.evaluate else "output"} & set(stage.set):
        raise InputError(f"{where}.set: {name}: the pipeline's own: leave it out")
    for problem in below_least(vars(stage.preferences), LEAST) if stage.preferences else ():
        raise InputError(f"{where}.preferences.{problem}")
    if stage.set and given[0] == "preferences":
        raise InputError(f"{where}.set: a stage with {given[0]} has no such fields: leave it out")


def _resolved(
    stage: StageConfig, folder: Path, folders: Mapping[str, str], where: str
) -> StageConfig:
    """The stage with the folders of earlier ones written out."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return _fill(value, folders, where)
        if isinstance(value, Mapping):
            return {key: fill(x) for key, x in value.items()}
        return [fill(x) for x in value] if isinstance(value, list) else value

    wishes = stage.preferences
    if wishes is not None:
        wishes = PreferencesConfig(**fill(vars(wishes)))
    train = str(folder / stage.train) if stage.train else ""
    return StageConfig(
        name=stage.name,
        make=stage.make,
        preferences=wishes,
        train=train,
        evaluate=fill(stage.evaluate),
        set=fill(stage.set),
    )


def _fill(text: str, folders: Mapping[str, str], where: str) -> str:
    said = f"{where}: {shown(text)}"
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InputError(f"{said}: {error}: write {{{{ for a brace") from None
    # Names and no more: of str.format, {a:>2000000000} fills memory and {a.__class__} tells tales.
    for _, name, form, conversion in parts:
        if form or conversion or (name is not None and not name.isidentifier()):
            raise InputError(
                f"{said}: {{name}} of a stage is all that can be filled in: {{{{ is a brace"
            )
        if name is not None and name not in folders:
            known = ", ".join(folders) or "none"
            raise InputError(
                f"{said}: no earlier stage is called {name} (earlier: {known}): mend the name, or "
                "write {{ for a brace"
            )
    return "".join(before + ("" if name is None else folders[name]) for before, name, *_ in parts)
