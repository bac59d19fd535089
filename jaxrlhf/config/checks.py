"""Rules between fields, checked before any array is made. Never imports jax."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jaxrlhf.config.algorithm import PPOConfig
from jaxrlhf.config.layout import axes_problems
from jaxrlhf.config.model import CriticConfig, ReferenceConfig
from jaxrlhf.config.run import Config, RewardConfig, SampleConfig
from jaxrlhf.errors import InputError

ON_POLICY = (PPOConfig,)
"""Algorithms that learn from responses they sample; the others learn from the rows of a file."""

RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 0",
        lambda x: x >= 0,
        "seed optim.learning_rate optim.warmup optim.weight_decay critic.learning_rate "
        "critic.warmup checkpoint.every eval.every sample.temperature sample.top_k sample.pad "
        "algorithm.clip_high "
        "algorithm.value_coef algorithm.entropy_coef algorithm.kl_coef algorithm.centre_coef "
        "algorithm.missing_eos_penalty",
    ),
    (
        "at least 1",
        lambda x: x >= 1,
        "steps data.batch_size data.max_prompt_tokens sample.max_new_tokens sample.n "
        "optim.microbatches optim.max_skipped checkpoint.keep eval.n eval.batch_size "
        "algorithm.epochs algorithm.minibatches algorithm.length model.lora.rank "
        "model.decoder.vocab model.decoder.embed model.decoder.layers model.decoder.heads "
        "model.decoder.kv_heads model.decoder.head_dim model.decoder.mlp model.decoder.context",
    ),
    ("at least 2", lambda x: x >= 2, "data.max_tokens"),
    (
        "above 0",
        lambda x: x > 0,
        "optim.eps optim.max_grad_norm algorithm.value_clip algorithm.target_kl "
        "algorithm.kl_target algorithm.kl_horizon model.lora.alpha model.decoder.rope_theta "
        "model.decoder.norm_eps",
    ),
    ("above 1", lambda x: x > 1, "algorithm.dual_clip"),
    ("below 4294967296", lambda x: x < 2**32, "seed"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "algorithm.gamma algorithm.lam algorithm.clip_low"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "optim.b1 optim.b2 sample.min_p"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "sample.top_p"),
)
"""What a number must be, and the dotted keys it is asked of; absent and None fields are passed."""


def is_on_policy(config: Config) -> bool:
    """Whether the run learns from responses it samples."""
    return isinstance(config.algorithm, ON_POLICY)


def on_policy(config: Config) -> PPOConfig:
    """The settings of an algorithm that samples; only for runs that do."""
    assert isinstance(config.algorithm, ON_POLICY)
    return config.algorithm


def check(config: Config) -> None:
    """Refuse a config that cannot train, or that sets something which would not be read.

    Raises:
      InputError: the first rule that does not hold.
    """
    learning = _on_policy if isinstance(config.algorithm, ON_POLICY) else _offline
    for problem in itertools.chain(
        _ranges(config),
        _model(config),
        _data(config),
        _sources("rewards", config.rewards),
        _sources("eval.gold", config.eval.gold),
        _critic(config),
        _warmup(config),
        axes_problems(config.mesh),
        learning(config),
    ):
        raise InputError(problem)


def check_sample(sample: SampleConfig) -> None:
    """Refuse numbers out of their range; a temperature of 0 is greedy and passes.

    Raises:
      InputError: the first field that is out of range.
    """
    for problem in _ranges(Config(sample=sample)):
        raise InputError(problem)


def rows_at_once(config: Config) -> int:
    """Rows of one microbatch: what one forward and backward pass of the update works on."""
    rows = config.data.batch_size
    if isinstance(config.algorithm, ON_POLICY):
        rows = rows * config.sample.n // config.algorithm.minibatches
    return rows // config.optim.microbatches


def _ranges(config: Config) -> Iterator[str]:
    for what, holds, keys in RANGES:
        for key in keys.split():
            value = _get(config, key)
            if value is not None and not holds(value):
                yield f"{key}={value}: must be {what}"


def _get(config: Config, key: str) -> Any:
    """The value at a dotted key; None where a part is missing."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _model(config: Config) -> Iterator[str]:
    model, decoder = config.model, config.model.decoder
    if not model.path and decoder is None:
        yield "model.path: missing: give a path (smollm2, a folder, a .gguf file), or model.decoder"
    if model.path and decoder is not None:
        yield f"model.path={model.path}: model.decoder is given too: keep one of them"
    if decoder is not None:
        if not model.tokenizer:
            yield "model.tokenizer: missing: a fresh decoder needs one, such as words:TEXT"
        if decoder.heads % decoder.kv_heads:
            yield (
                f"model.decoder: heads={decoder.heads} % kv_heads={decoder.kv_heads} is not 0: "
                "each key/value head serves the same number of query heads"
            )
        if decoder.head_dim % 2:
            yield f"model.decoder.head_dim={decoder.head_dim}: must be even, for rotary positions"
    if model.lora is not None and not model.lora.targets:
        yield "model.lora.targets: empty: name at least one of q, k, v, o, gate, up, down"


def _data(config: Config) -> Iterator[str]:
    if not config.data.train:
        yield "data.train: missing: give a .jsonl or .parquet file"
    for name in ("every", "gold"):
        value = getattr(config.eval, name)
        if value and not config.data.eval:
            yield f"eval.{name}={value!r:.80}: there are no rows to evaluate on: give data.eval"
    if not config.output:
        yield "output: empty: give the folder that the run is written to"


def _sources(key: str, rewards: tuple[RewardConfig, ...]) -> Iterator[str]:
    for i, reward in enumerate(rewards):
        if reward.function and reward.model:
            yield f"{key}.{i}: function and model are both given: make them two rewards"
        if not reward.function and not reward.model:
            yield f"{key}.{i}: give either function or model"


def _critic(config: Config) -> Iterator[str]:
    for name in ("path", "learning_rate"):
        value = getattr(config.critic, name)
        if config.critic.kind == "shared" and value not in ("", None):
            yield f"critic.{name}={value}: a shared critic has none: set critic.kind: separate"


def _warmup(config: Config) -> Iterator[str]:
    decay = config.optim.weight_decay
    if config.critic.kind == "shared" and config.critic.warmup and decay:
        yield (
            f"critic.warmup={config.critic.warmup}: optim.weight_decay={decay} would move the "
            "shared trunk meanwhile: set it to 0, or critic.kind: separate"
        )


def _on_policy(config: Config) -> Iterator[str]:
    sample, algorithm, data = config.sample, config.algorithm, config.data
    assert isinstance(algorithm, ON_POLICY)
    if sample.temperature == 0:
        yield "sample.temperature=0: greedy; refused in training: give a number above 0"
    for token in sample.stop:
        if token < 0:
            yield f"sample.stop={list(sample.stop)}: token ids are at least 0"
    if not config.rewards:
        yield "rewards: missing: give at least one, with a function or a model"
    rows = data.batch_size * sample.n
    named = f"data.batch_size={data.batch_size} · sample.n={sample.n} = {rows} rows"
    if rows % algorithm.minibatches:
        yield f"{named} % algorithm.minibatches={algorithm.minibatches} is not 0: change one"
    rows //= algorithm.minibatches
    if rows % config.optim.microbatches:
        yield (
            f"{named} / algorithm.minibatches={algorithm.minibatches} % "
            f"optim.microbatches={config.optim.microbatches} is not 0: change one"
        )
    drawn, horizon = data.batch_size * sample.n, algorithm.kl_horizon
    if algorithm.kl_controller == "adaptive" and drawn >= 5 * horizon:
        yield (
            f"algorithm.kl_horizon={horizon:g}: must exceed a fifth of the rows of a "
            f"rollout ({named}), or β changes sign: raise it"
        )
    for name in ("whiten_advantages", "whiten_rewards"):
        if getattr(algorithm, name) and data.batch_size * sample.n == 1:
            yield f"algorithm.{name}: one row has no variance: turn it off, or raise sample.n"
    if algorithm.length is not None and algorithm.aggregation != "fixed":
        yield (
            f"algorithm.length={algorithm.length}: aggregation={algorithm.aggregation} does not "
            "read it: set aggregation: fixed, or leave length out"
        )
    yield from _width(config, data.max_prompt_tokens + sample.max_new_tokens)


def _offline(config: Config) -> Iterator[str]:
    name, data = config.algorithm.name, config.data
    if config.rewards:
        yield f"rewards: algorithm.name={name} learns from its data alone: leave rewards out"
    if config.eval.gold:
        yield f"eval.gold: algorithm.name={name} samples nothing that it could judge: leave it out"
    ends = {"stop": config.sample.stop, "pad": config.sample.pad}  # a run writes the tokenizer's
    unread = {
        "critic": (config.critic, CriticConfig()),
        "reference": (config.reference, ReferenceConfig()),
        "sample": (config.sample, SampleConfig(**ends)),
    }
    for section, (given, default) in unread.items():
        if given != default:
            yield f"{section}: algorithm.name={name} does not read it: leave it out"
    if data.batch_size % config.optim.microbatches:
        yield (
            f"data.batch_size={data.batch_size} % optim.microbatches={config.optim.microbatches} "
            "is not 0: change one"
        )
    yield from _width(config, data.max_tokens)


def _width(config: Config, tokens: int) -> Iterator[str]:
    decoder = config.model.decoder
    if decoder is not None and tokens > decoder.context:
        yield (
            f"model.decoder.context={decoder.context}: rows are {tokens} tokens wide: "
            "raise it, or lower the token limits of data and sample"
        )
