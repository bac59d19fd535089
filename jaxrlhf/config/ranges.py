"""What each number of a config must be."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxrlhf.config.run import Config

RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 0",
        lambda x: x >= 0,
        "seed optim.learning_rate optim.warmup optim.weight_decay critic.learning_rate "
        "critic.warmup checkpoint.every eval.every eval.patience distributed.processes "
        "distributed.watchdog "
        "sample.temperature sample.top_k sample.pad sample.stop algorithm.clip_high "
        "algorithm.value_coef algorithm.entropy_coef algorithm.kl_coef algorithm.centre_coef "
        "algorithm.score_l2 "
        "algorithm.missing_eos_penalty algorithm.overlong_buffer algorithm.min_gap "
        "algorithm.margin algorithm.sft_coef algorithm.desirable_weight "
        "algorithm.undesirable_weight",
    ),
    (
        "at least 1",
        lambda x: x >= 1,
        "steps data.batch_size data.max_prompt_tokens sample.max_new_tokens sample.n "
        "optim.microbatches optim.max_skipped checkpoint.keep eval.n eval.batch_size "
        "distributed.initialization_timeout distributed.heartbeat "
        "algorithm.epochs algorithm.minibatches algorithm.length algorithm.rounds model.lora.rank "
        "model.decoder.vocab model.decoder.embed model.decoder.layers model.decoder.heads "
        "model.decoder.kv_heads model.decoder.head_dim model.decoder.mlp model.decoder.context",
    ),
    ("at least 2", lambda x: x >= 2, "data.max_tokens"),
    (
        "above 0",
        lambda x: x > 0,
        "optim.eps optim.max_grad_norm algorithm.value_clip algorithm.target_kl "
        "algorithm.kl_target algorithm.kl_horizon algorithm.off_policy_cap algorithm.beta "
        "algorithm.delta "
        "model.lora.alpha model.decoder.rope_theta "
        "model.decoder.norm_eps",
    ),
    ("above 1", lambda x: x > 1, "algorithm.dual_clip"),
    ("below 4294967296", lambda x: x < 2**32, "seed"),
    (
        "below 2147483648",
        lambda x: x < 2**31,
        "steps optim.warmup critic.warmup sample.top_k sample.pad sample.stop",
    ),
    (
        "in [0, 1]",
        lambda x: 0 <= x <= 1,
        "max_excluded algorithm.gamma algorithm.lam algorithm.clip_low",
    ),
    ("in [0, 1)", lambda x: 0 <= x < 1, "optim.b1 optim.b2 sample.min_p"),
    ("in [0, 0.5)", lambda x: 0 <= x < 0.5, "algorithm.label_smoothing"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "sample.top_p"),
)
"""What a number must be, and the dotted keys it is asked of, of lists each number; absent and None
fields are passed."""


def out_of_range(config: Config) -> Iterator[str]:
    """The numbers that are not what they must be, a line each."""
    for what, holds, keys in RANGES:
        for key in keys.split():
            value = _get(config, key)
            several = isinstance(value, tuple)
            if value is not None and not all(map(holds, value if several else (value,))):
                yield f"{key}={list(value) if several else value}: must be {what}"


def below_least(given: Mapping[str, Any], least: Mapping[str, float]) -> Iterator[str]:
    """The numbers of ``given`` that are below their least value, a line each; None is passed."""
    for name, bound in least.items():
        value = given[name]
        if value is not None and value < bound:
            yield f"{name}={value}: must be at least {bound}"


def _get(config: Config, key: str) -> Any:
    """The value at a dotted key; None where a part is missing."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value
