"""``jaxrlhf init``: a config that runs, with a comment at each line that a beginner would change.

The numbers are those of this package's own config for the algorithm, which were measured; widths
are those of the data, which is read as the run will read it.
"""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from jaxrlhf.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    EvalConfig,
    OfflineConfig,
    RewardConfig,
    check,
    is_on_policy,
    load,
)
from jaxrlhf.config.load import packaged
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import check_file, check_no_url, write_atomic
from jaxrlhf.data.formats import column_names
from jaxrlhf.data.rows import Rows, read_rows
from jaxrlhf.data.tokens import ANY_LENGTH, Encoded, load_data
from jaxrlhf.models.load import tokenizer_path
from jaxrlhf.models.read import read_decoder
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.rewards.isolation import Isolated, host_source
from jaxrlhf.rewards.judge import Reward, check_columns

NAMES = {kind.name: kind for kind in get_args(AlgorithmConfig)}
"""The algorithms by their names."""

OPENINGS = "jaxrlhf:demo/openings_train.jsonl"
"""Prompts where no data is given."""

EXAMPLES = {"judged": "labelled"}
"""The file of example rows of a kind, where it has another name than the kind."""

NEW_TOKENS = 256
"""Most tokens of a response to prompts of the user's own; those of OPENINGS are shorter."""

LEAST_STEPS, MOST_STEPS = 20, 1000
"""A pass over the data has so many steps, or is made to."""

COMMENTS = {
    "algorithm.kl_coef": "β: the higher, the closer to the model as it was (reward units a nat)",
    "algorithm.beta": "β: the higher, the closer to the reference",
    "gkd.beta": "1: KL(student‖teacher), as reinforcement learning has it; 0: KL(teacher‖student)",
    "reference.path": "the teacher: any model of the same tokenizer",
    "algorithm.epochs": "passes over each rollout",
    "algorithm.minibatches": "optimizer steps a pass",
    "algorithm.separator": "the text between two steps of an answer",
    "algorithm.train_on": "of chats: assistant learns all of its turns, completion the last",
    "model.path": "or a Hugging Face folder, a .gguf file, the output folder of a run",
    "model.lora": "adapters; without them all weights, at a tenth of the learning rate",
    "data.eval": "held-out rows of the same kind, measured before and after, and in between",
    "sample.max_new_tokens": "most tokens of a response",
    "sample.n": "responses a prompt",
    "sample.temperature": "1 is the policy as it is",
    "optim.learning_rate": "the first thing to lower if it does not learn, or to raise",
    "optim.warmup": "steps over which it rises to that",
    "optim.schedule": "it falls to 0 at the end",
    "checkpoint.every": "iterations; started again, the run goes on from there",
    "output": "config, metrics, samples, report and checkpoints",
}
"""What is said of a line."""


def write_config(algorithm: str, data: str, reward: str, model: str, path: str) -> str:
    """Write the config of a run, and return what to say of it.

    Args:
      algorithm: a name of ``NAMES``.
      data: rows of the kind that it learns from; "": prompts or rows that come with the package.
      reward: a function (module:name, or a built-in), or a reward model's folder; "": sentiment.
      model: whatever ``model.path`` may be.
      path: the new YAML file; "": the algorithm's name.

    Raises:
      InputError: something that cannot be used, or is there already; nothing is written then.
    """
    if algorithm not in NAMES:
        close = difflib.get_close_matches(algorithm, NAMES, 1)
        known = f"did you mean {close[0]}?" if close else f"known: {', '.join(NAMES)}"
        raise InputError(f"{algorithm}: unknown algorithm ({known})")
    path = path or f"{algorithm}.yaml"
    if Path(path).exists():
        raise InputError(f"{path}: is there already: give another file with -o, or remove it")
    check_file(path)
    config = _described(algorithm, data, reward, model, Path(path).stem)
    config, rows = _fitted(config, own=bool(data))
    if config.rewards:
        _check_reward(config.rewards[0], rows)
    check(config)
    write_atomic(path, text_of(config, path, len(rows)))
    return f"{path}: written; next: jaxrlhf train {path}"


def _described(algorithm: str, data: str, reward: str, model: str, name: str) -> Config:
    """The config, with widths and steps yet to be fitted."""
    kind = NAMES[algorithm]
    base = load(min(packaged().glob(f"{algorithm}_smollm2*.yaml")))
    offline = issubclass(kind, OfflineConfig)
    if reward and (offline or kind.has_teacher):
        what = "data" if offline else "teacher"
        raise InputError(
            f"--reward {reward}: {algorithm} learns from its {what} alone: leave it out"
        )
    rewards: tuple[RewardConfig, ...] = ()
    if offline:
        train = data or f"jaxrlhf:examples/{EXAMPLES.get(kind.rows, kind.rows)}.jsonl"
    else:
        train = data or OPENINGS
    if not offline and not kind.has_teacher:
        check_no_url("reward", reward)
        of_model = Path(reward).is_dir() and bool(reward)
        rewards = (RewardConfig(model=reward) if of_model else RewardConfig(reward or "sentiment"),)
    return replace(
        base,
        model=replace(base.model, path=model),
        rewards=rewards,
        data=DataConfig(train=train, batch_size=base.data.batch_size),
        eval=EvalConfig(),
        checkpoint=replace(base.checkpoint, every=20),
        output=f"runs/{name}",
    )


def _fitted(config: Config, own: bool) -> tuple[Config, Rows[Encoded]]:
    """The config as wide as its rows ask for, for one pass over them; and the rows."""
    check(config)  # a URL, say, before it is read
    decoder = read_decoder(config.model.path)
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    sampled = is_on_policy(config)
    width = "max_prompt_tokens" if sampled else "max_tokens"
    wide = replace(config, data=replace(config.data, **{width: ANY_LENGTH}))
    rows = load_data(wide, config.data.train, tokenizer, decoder.vocab)
    longest = max(len(row.prompt) + max(map(len, row.answers), default=0) for row in rows.items)
    if longest + sampled > decoder.context:
        raise InputError(
            f"{config.data.train}: its longest row has {longest} tokens, and the model's context "
            f"is {decoder.context}: shorten it, or take another model"
        )
    # A multiple of 8, which is what devices compute in any case.
    fitting = min(-(-longest // 8) * 8, decoder.context - sampled)
    if sampled:
        new = min(NEW_TOKENS if own else config.sample.max_new_tokens, decoder.context - fitting)
        config = replace(config, sample=replace(config.sample, max_new_tokens=new))
    steps = -(-len(rows) // config.data.batch_size)
    steps = min(max(steps, LEAST_STEPS), MOST_STEPS) if own else config.steps
    data = replace(config.data, **{width: fitting})
    return replace(config, data=data, steps=steps), rows


def _check_reward(reward: RewardConfig, rows: Rows[Encoded]) -> None:
    """The function can be had, and the rows have the columns that it asks for."""
    if not reward.function:
        return
    source = host_source(reward)
    needs = getattr(source, "needs", ())
    if isinstance(source, Isolated):
        source.close()
    named = Reward(reward.function, 1.0, None, source, needs=needs)
    check_columns([named], column_names([row.source for row in rows.items]))


def text_of(config: Config, path: str, rows: int) -> str:
    """The config as commented YAML, which loads to an equal Config."""
    kind = type(config.algorithm)
    about = " ".join((kind.__doc__ or "").split())
    head = [
        f"# {config.algorithm.name}: {about}",
        f"# Launch:  jaxrlhf train {path}",
        "#          (the same command goes on with a run that was stopped)",
        f"# Then:    jaxrlhf report {config.output}    # a page of curves and samples",
        f"#          jaxrlhf diagnose {config.output}  # what is wrong, and the remedy",
        "# jaxrlhf train CONFIG --help lists all fields.",
    ]
    return "\n".join([*head, *_lines(config, rows)]) + "\n"


def _lines(config: Config, rows: int) -> Iterator[str]:
    sampled = is_on_policy(config)
    algorithm = {"name": config.algorithm.name, **_set(config.algorithm, "kl_coef", "beta")}
    yield from _section("algorithm", algorithm)
    lora = config.model.lora
    adapters = {"lora": _set(lora, "rank", "alpha")} if lora else {}
    yield from _section("model", {"path": config.model.path, **adapters})
    if config.reference.path:
        yield from _section("reference", {"path": config.reference.path})
    if config.rewards:
        yield "rewards:  # several are summed, with a weight each"
        kind, said = ("model", "a reward model") if config.rewards[0].model else ("function", "")
        said = said or "module:name: (prompts, completions, **columns) → a number each"
        yield f"  - {kind}: {_value(getattr(config.rewards[0], kind))}  # {said}"
    yield "data:"
    first = read_rows(config.data.train).items[0].values
    yield _line("train", config.data.train, f"rows such as {_shape(first)}")
    yield f"  # eval: held_out.jsonl  # {COMMENTS['data.eval']}"
    batch = "prompts an iteration" if sampled else "rows a step"
    yield _line("batch_size", config.data.batch_size, batch)
    width = "max_prompt_tokens" if sampled else "max_tokens"
    longest = "prompt" if sampled else "row"
    yield _line(width, getattr(config.data, width), f"at least those of the longest {longest}")
    if sampled:
        shown = _set(config.sample, "max_new_tokens", "n", "temperature")
        yield from _section("sample", shown)
    yield from _section("optim", _set(config.optim, "learning_rate"))
    yield f"steps: {config.steps}  # iterations; the data has {rows} rows"
    yield from _section("checkpoint", {"every": config.checkpoint.every})
    yield f"output: {_value(config.output)}  # {COMMENTS['output']}"


def _set(section: Any, *always: str) -> dict[str, Any]:
    """The fields of a section that are not at their defaults, and those that are always shown."""
    return {
        field.name: getattr(section, field.name)
        for field in fields(section)
        if field.name != "name"
        and (getattr(section, field.name) != field.default or field.name in always)
    }


def _section(name: str, values: dict[str, Any]) -> Iterator[str]:
    yield f"{name}:"
    for key, value in values.items():
        # Of algorithms that give a name another meaning, that one.
        said = COMMENTS.get(f"{name}.{key}", "")
        yield _line(key, value, COMMENTS.get(f"{values.get('name')}.{key}", said))


def _line(key: str, value: Any, comment: str) -> str:
    return f"  {key}: {_value(value)}" + (f"  # {comment}" if comment else "")


def _value(value: Any) -> str:
    """A value as YAML has it in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _shape(row: dict[str, Any]) -> str:
    """A row as JSON, its long texts cut."""

    def brief(value: Any) -> Any:
        if isinstance(value, str):
            return value if len(value) <= 30 else f"{value[:29]}…"
        if isinstance(value, list):
            return [brief(x) for x in value[:3]]
        return {k: brief(x) for k, x in value.items()} if isinstance(value, dict) else value

    return json.dumps(brief(row), ensure_ascii=False)
