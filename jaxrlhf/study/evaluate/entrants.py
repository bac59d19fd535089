"""From what is asked for to the networks that are compared, and the bench they are measured on."""

from dataclasses import replace
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxrlhf.config import (
    Config,
    EvaluateConfig,
    ModelConfig,
    OfflineConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
    is_on_policy,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import READERS, Prompt, read_prompts
from jaxrlhf.data.rows import Rows, read_rows
from jaxrlhf.data.tokens import Encoded, encode_rows
from jaxrlhf.models.load import Loader, Network, is_run, run_config, scores_texts, tokenizer_path
from jaxrlhf.models.tokenizer import check_vocab, ends_of, load_tokenizer
from jaxrlhf.rewards.judge import Judge, make_judge
from jaxrlhf.study.evaluate.drawing import Bench

NEW_TOKENS = 64
"""Most tokens of a completion by a model that is no run."""

FEW_TOKENS = 16
"""Fewer have to be asked for: most completions would be cut off, and say nothing of the policy."""

ANY_LENGTH = 2**31
"""Tokens of a prompt: the context of the networks is the limit."""


class Entrants(NamedTuple):
    """The networks of an evaluation."""

    model: Network
    reference: Network | None
    against: Network | None
    """None: the reference."""
    names: dict[str, str | None]
    """What each is."""


def config_of(path: str) -> Config:
    """A run's config; for another model, one that says no more than where its weights are.

    Raises:
      InputError: a reward model, which completes nothing.
    """
    if scores_texts(path):
        raise InputError(f"{path}: a reward model, which completes nothing: give a policy")
    if not is_run(path):
        return Config(algorithm=SFTConfig(), model=ModelConfig(path=path))
    return run_config(path)


def read_entrants(wish: EvaluateConfig, config: Config, mesh: Mesh) -> tuple[Bench, Entrants]:
    """Read everything that takes part.

    Raises:
      InputError: something that cannot be used, networks that do not share the tokenizer, or
        prompts and completions that exceed the context of one.
    """
    path = wish.data or config.data.eval
    if not path:
        raise InputError(
            f"data: missing: {wish.model} has no held-out rows: give a file of prompts"
        )
    loader = Loader(mesh, dtype=config.model.dtype)
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    model = _network(wish.model, loader)
    vocab = model.model.decoder.vocab
    check_vocab(tokenizer, model.model.decoder)
    prompts = _prompts(path, config, tokenizer, vocab, own=not wish.data)
    width = max(len(row.prompt) for row in prompts.items)
    new = wish.max_new_tokens or _new_tokens(config, is_run(wish.model), width)
    entrants = Entrants(
        model=model,
        reference=_reference(wish, config, loader),
        against=_network(wish.against, loader) if wish.against else None,
        names=_names(wish, config),
    )
    for name, network in entrants._asdict().items():
        if isinstance(network, Network):
            _check_fits(name, network, vocab, width + new)
    stop, pad = ends_of(tokenizer)
    bench = Bench(
        prompts=prompts,
        width=width,
        sampling=SampleConfig(
            max_new_tokens=new, stop=tuple(sorted({*config.sample.stop, *stop})), pad=pad
        ),
        rows=wish.rows,
        judges=_judges(wish, config, loader, tokenizer, vocab),
        tokenizer=tokenizer,
        mesh=mesh,
    )
    return bench, entrants


def _network(path: str, loader: Loader) -> Network:
    """A policy without its value head, so that it shares the programs of its reference."""
    config = config_of(path)
    if not is_run(path):
        return loader.base(config.model)
    network = loader.trained(path)
    body = {name: x for name, x in network.params.items() if name != "head"}
    return replace(network, params=body)


def _reference(wish: EvaluateConfig, config: Config, loader: Loader) -> Network | None:
    """What was asked for, else what the run started from, or holds on to."""
    if wish.reference:
        return _network(wish.reference, loader)
    if not is_run(wish.model):
        return None
    if config.reference.path:
        return loader.base(replace(config.model, path=config.reference.path, decoder=None))
    return loader.base(config.model, config.seed)


def _names(wish: EvaluateConfig, config: Config) -> dict[str, str | None]:
    start = config.reference.path or config.model.path or "the run's random start"
    reference = wish.reference or (start if is_run(wish.model) else None)
    return {
        "policy": wish.model,
        "reference": reference,
        "against": wish.against or reference,
    }


def _prompts(path: str, config: Config, tokenizer: Any, vocab: int, own: bool) -> Rows[Encoded]:
    """The prompts of a file, of the run's ``own`` kind or of prompts; one in several rows once."""
    kind, skip = config.algorithm, config.data.skip_bad_rows
    read = READERS[kind.rows] if own and isinstance(kind, OfflineConfig) else read_prompts
    rows = read(read_rows(path, skip), tokenizer, skip)
    once: dict[str, Prompt] = {}
    for row in rows.items:
        prompt = row if isinstance(row, Prompt) else Prompt(row.prompt, row.columns, row.where)
        once.setdefault(prompt.text, prompt)
    rows = Rows(tuple(once.values()), rows.path, rows.skipped)
    return encode_rows(rows, tokenizer, vocab, ANY_LENGTH, skip_bad_rows=skip)


def _new_tokens(config: Config, run: bool, width: int) -> int:
    if is_on_policy(config):
        return config.sample.max_new_tokens
    if not run:
        return NEW_TOKENS
    left = config.data.max_tokens - width
    if left < FEW_TOKENS:
        raise InputError(
            f"max_new_tokens: missing: the run's data.max_tokens={config.data.max_tokens} leaves "
            f"{max(left, 0)} after the longest held-out prompt of {width}: give --max-new-tokens"
        )
    return left


def _judges(
    wish: EvaluateConfig, config: Config, loader: Loader, tokenizer: Any, vocab: int
) -> dict[str, Judge]:
    """``proxy``, the rewards that the run was trained on, and ``gold``, where there are such."""
    gold = config.eval.gold
    if wish.reward or wish.reward_model:
        gold = (RewardConfig(function=wish.reward, model=wish.reward_model),)
    sources = {"proxy": ("rewards", config.rewards), "gold": ("gold", gold)}
    return {
        name: make_judge(configs, loader, tokenizer, vocab, field)
        for name, (field, configs) in sources.items()
        if configs
    }


def _check_fits(name: str, network: Network, vocab: int, tokens: int) -> None:
    decoder = network.model.decoder
    if decoder.vocab != vocab:
        raise InputError(
            f"{name}: a vocabulary of {decoder.vocab}, and the model's has {vocab}: give one with "
            "the model's tokenizer"
        )
    if tokens > decoder.context:
        raise InputError(
            f"max_new_tokens: prompts and completions of {tokens} tokens exceed the context of "
            f"{name}, {decoder.context}: lower it"
        )
