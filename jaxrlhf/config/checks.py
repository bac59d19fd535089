"""A run's rules between fields, and their ranges; asked before any array is made.

Those of a reward's fields are in ``rewards``, those of an evaluation and of stages in ``stages``.

A rule is a line of a generator: it yields what is wrong, where, and the remedy. ``check`` raises
the first; a setting that nothing would read is refused like one that cannot be.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxrlhf.config.algorithms import (
    GKDConfig,
    OnPolicyConfig,
    ReinforceConfig,
)
from jaxrlhf.config.axes import axes_problems
from jaxrlhf.config.decoder import decoder_problems
from jaxrlhf.config.model import CriticConfig, ReferenceConfig
from jaxrlhf.config.offline import (
    DPOConfig,
    OfflineConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
)
from jaxrlhf.config.rewards import name_of, normalise_problems, reward_problems
from jaxrlhf.config.run import (
    Config,
    EvalConfig,
    SampleConfig,
    chat_problems,
    has_critic,
    has_reference,
    is_on_policy,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.remote import check_url


def check(config: Config) -> None:
    """Refuse a config that cannot train, or that sets something which would not be read.

    Raises:
      InputError: the first rule that does not hold.
    """
    for field, path in _places(config):
        check_url(field, path)
    # Ranges first: the rules after them may divide by what they have checked.
    learning = _on_policy if is_on_policy(config) else _offline
    for problem in itertools.chain(
        out_of_range(config),
        _model(config),
        _memory(config),
        reward_problems("rewards", config.rewards),
        reward_problems("eval.gold", config.eval.gold),
        _data(config),
        _ends(config.sample),
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
    for problem in itertools.chain(out_of_range(Config(sample=sample)), _ends(sample)):
        raise InputError(problem)


def check_seed(seed: int) -> None:
    """Refuse a seed that a run could not have.

    Raises:
      InputError: it is out of its range.
    """
    for problem in out_of_range(Config(seed=seed)):
        raise InputError(problem)


def rows_at_once(config: Config) -> int:
    """Rows of one microbatch: what one forward and backward pass of the update works on."""
    rows = config.data.batch_size
    if isinstance(config.algorithm, OnPolicyConfig):
        samples = 1 if config.algorithm.on_pairs else config.sample.n  # one pair a prompt
        rows = rows * samples // config.algorithm.minibatches
    return rows // config.optim.microbatches


RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 0",
        lambda x: x >= 0,
        "seed optim.learning_rate optim.warmup optim.weight_decay optim.router_aux_loss_coef "
        "optim.router_z_loss_coef critic.learning_rate "
        "critic.warmup checkpoint.every eval.every eval.patience distributed.processes "
        "distributed.watchdog "
        "sample.temperature sample.top_k sample.pad sample.stop sample.slots algorithm.clip_high "
        "algorithm.value_coef algorithm.entropy_coef algorithm.kl_coef algorithm.centre_coef "
        "algorithm.score_l2 "
        "algorithm.missing_eos_penalty algorithm.overlong_buffer algorithm.min_gap "
        "algorithm.margin algorithm.sft_coef algorithm.desirable_weight "
        "algorithm.undesirable_weight model.decoder.windows model.decoder.rotary_dim "
        "model.decoder.full_head_dim model.decoder.full_kv_heads model.decoder.shared_kv_layers "
        "model.decoder.shared_mlp model.decoder.layer_embed model.decoder.moe.beside "
        "model.decoder.attention_softcap model.decoder.logit_softcap",
    ),
    (
        "at least 1",
        lambda x: x >= 1,
        "steps data.batch_size data.max_prompt_tokens sample.max_new_tokens sample.n "
        "optim.microbatches optim.max_skipped checkpoint.keep eval.n eval.batch_size "
        "distributed.initialization_timeout distributed.heartbeat "
        "algorithm.epochs algorithm.minibatches algorithm.length algorithm.rounds model.lora.rank "
        "model.context "
        "model.decoder.vocab model.decoder.embed model.decoder.layers model.decoder.heads "
        "model.decoder.kv_heads model.decoder.head_dim model.decoder.mlp model.decoder.context "
        "model.decoder.moe.experts model.decoder.moe.per_token",
    ),
    ("at least 2", lambda x: x >= 2, "data.max_tokens"),
    (
        "above 0",
        lambda x: x > 0,
        "optim.eps optim.max_grad_norm algorithm.value_clip algorithm.target_kl "
        "algorithm.kl_target algorithm.kl_horizon algorithm.off_policy_cap algorithm.beta "
        "algorithm.delta "
        "model.lora.alpha model.decoder.rope_theta model.decoder.window_rope_theta "
        "model.decoder.norm_eps model.decoder.embed_multiplier model.decoder.attention_scale "
        "model.decoder.logit_scale model.decoder.residual_multiplier",
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
        "max_excluded algorithm.gamma algorithm.lam algorithm.clip_low algorithm.lmbda",
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
            # of a distillation β is a share, and 0 is one: see _taught
            if key == "algorithm.beta" and isinstance(config.algorithm, GKDConfig):
                continue
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


def _places(config: Config) -> Iterator[tuple[str, str]]:
    """The fields that name a file or a folder, and what they name."""
    keys = (
        "output model.path reference.path critic.path data.train data.eval data.chat_template "
        "algorithm.normalise_on"
    )
    yield from ((key, _get(config, key) or "") for key in keys.split())
    for field, rewards in (("rewards", config.rewards), ("eval.gold", config.eval.gold)):
        for i, reward in enumerate(rewards):
            yield f"{field}.{i}.model", reward.model
            yield from ((f"{field}.{i}.ensemble", path) for path in reward.ensemble)


def _model(config: Config) -> Iterator[str]:
    model, decoder = config.model, config.model.decoder
    if not model.path and decoder is None and not (model.lora and model.lora.path):
        yield "model.path: missing: give a path (smollm2, a folder, a .gguf file), or model.decoder"
    if model.path and decoder is not None:
        yield f"model.path={model.path}: model.decoder is given too: keep one of them"
    if decoder is not None:
        if model.context is not None:
            yield f"model.context={model.context}: model.decoder.context says it: leave it out"
        if not model.tokenizer:
            yield "model.tokenizer: missing: a fresh decoder needs one, such as words:TEXT"
        yield from decoder_problems(decoder)
    if model.lora is not None and not model.lora.targets:
        yield "model.lora.targets: empty: name at least one of q, k, v, o, gate, up, down"


def _memory(config: Config) -> Iterator[str]:
    """What cannot be saved, or would cost more than memory."""
    if config.reference.offload and config.model.lora and not config.reference.path:
        yield (
            "reference.offload: with model.lora the reference is the weights under the adapters, "
            "which the policy needs all the time: leave it out"
        )
    for name in ("b1", "b2"):
        decay = getattr(config.optim, name)
        if config.optim.state_dtype == "bfloat16" and decay > 0.99:
            yield (
                f"optim.{name}={decay}: what a step adds to a bfloat16 moment would be lost in its "
                "rounding: give at most 0.99, or optim.state_dtype: float32"
            )


def _data(config: Config) -> Iterator[str]:
    if not config.data.train:
        yield "data.train: missing: give a .jsonl or .parquet file"
    given = {"every": config.eval.every, "gold": ", ".join(map(name_of, config.eval.gold))}
    for name, value in given.items():
        if value and not config.data.eval:
            yield f"eval.{name}={value}: there are no rows to evaluate on: give data.eval"
    if config.eval.patience and not (config.eval.every and config.data.eval):
        yield (
            f"eval.patience={config.eval.patience}: counts evaluations, and there are none in "
            "between: give data.eval and eval.every"
        )
    if config.eval.patience and is_on_policy(config):
        name = config.algorithm.name
        yield f"eval.patience={config.eval.patience}: {name} has no held-out loss: leave it out"
    if config.data.packing and config.algorithm.name != "sft":
        yield f"data.packing: only sft packs rows, not {config.algorithm.name}: leave it out"
    yield from chat_problems(config.data)
    if not config.output:
        yield "output: empty: give the folder that the run is written to"


def _ends(sample: SampleConfig) -> Iterator[str]:
    if "" in sample.stop_strings:
        yield "sample.stop_strings: one of them is empty: leave it out"
    for start, end in sample.forbidden:
        if not 0 <= start < end:
            yield f"sample.forbidden: [{start}, {end}] is no range of ids: give first, last + 1"


def _critic(config: Config) -> Iterator[str]:
    # A shared critic is a head on the policy's trunk, trained by the policy's optimizer.
    for name in ("path", "learning_rate"):
        value = getattr(config.critic, name)
        if config.critic.kind == "shared" and value not in ("", None):
            yield f"critic.{name}={value}: a shared critic has none: set critic.kind: separate"
    value = getattr(config.algorithm, "value_coef", None)
    if config.critic.kind == "separate" and value != getattr(
        type(config.algorithm), "value_coef", None
    ):
        yield (
            f"algorithm.value_coef={value:g}: a separate critic has a loss of its own and does not "
            "read it: leave it out, or set critic.kind: shared"
        )


def _warmup(config: Config) -> Iterator[str]:
    decay = config.optim.weight_decay
    # Decay moves every weight, whether it has a gradient or not.
    if config.critic.kind == "shared" and config.critic.warmup and decay:
        yield (
            f"critic.warmup={config.critic.warmup}: optim.weight_decay={decay} would move the "
            "shared trunk meanwhile: set it to 0, or critic.kind: separate"
        )


def _on_policy(config: Config) -> Iterator[str]:
    sample, algorithm, data = config.sample, config.algorithm, config.data
    assert isinstance(algorithm, OnPolicyConfig)
    if sample.temperature == 0:
        yield "sample.temperature=0: greedy; refused in training: give a number above 0"
    rows = data.batch_size * sample.n
    named = f"data.batch_size={data.batch_size} · sample.n={sample.n} = {rows} rows"
    if algorithm.on_pairs:
        rows = data.batch_size
        named = f"data.batch_size={rows}"
    if rows % algorithm.minibatches:
        yield f"{named} % algorithm.minibatches={algorithm.minibatches} is not 0: change one"
    rows //= algorithm.minibatches
    if rows % config.optim.microbatches:
        yield (
            f"{named} / algorithm.minibatches={algorithm.minibatches} % "
            f"optim.microbatches={config.optim.microbatches} is not 0: change one"
        )
    for name in ("whiten_advantages", "whiten_rewards"):
        if getattr(algorithm, name, False) and data.batch_size * sample.n == 1:
            yield f"algorithm.{name}: one row has no variance: turn it off, or raise sample.n"
    if algorithm.length is not None and algorithm.aggregation != "fixed":
        yield (
            f"algorithm.length={algorithm.length}: aggregation={algorithm.aggregation} does not "
            "read it: set aggregation: fixed, or leave length out"
        )
    yield from _replayed(config, algorithm)
    if isinstance(algorithm, GKDConfig):
        yield from _taught(config, algorithm)
    else:
        yield from _rewarded(config, algorithm)
        yield from normalise_problems(algorithm, config.rewards)
        yield from _family(config, algorithm)
    if not has_critic(config) and config.critic != CriticConfig():
        yield f"critic: algorithm.name={algorithm.name} learns no value function: leave it out"
    yield from _width(config, data.max_prompt_tokens + sample.max_new_tokens)


def _replayed(config: Config, algorithm: OnPolicyConfig) -> Iterator[str]:
    """What router replay asks for; of a model in a folder its reader says."""
    if not config.sample.router_replay:
        return
    decoder = config.model.decoder
    if decoder is not None and decoder.moe is None:
        yield (
            "sample.router_replay=true: model.decoder is no mixture of experts, and has no router: "
            "leave it out"
        )
    if algorithm.on_pairs or algorithm.has_teacher:
        yield (
            f"sample.router_replay=true: {algorithm.name} does not compare log-probs with the "
            "sampler's, and would not read it: leave it out"
        )


def _rewarded(config: Config, algorithm: OnPolicyConfig) -> Iterator[str]:
    """What learning from rewards asks for."""
    if config.sample.cache != "model" and algorithm.old_logp == "sampler":
        yield (
            f"sample.cache={config.sample.cache}: log-probs of the sampler are not the policy's "
            "then: set algorithm.old_logp: rescore, or leave cache out"
        )
    if not config.rewards:
        yield "rewards: missing: give at least one, with a function or a model"
    drawn, horizon = config.data.batch_size * config.sample.n, algorithm.kl_horizon
    # β ← β·(1 + clip(KL/target − 1, −0.2, 0.2)·rows/horizon) must stay positive.
    if algorithm.kl_controller == "adaptive" and drawn >= 5 * horizon:
        yield (
            f"algorithm.kl_horizon={horizon:g}: must exceed a fifth of the rows of a "
            f"rollout ({drawn}), or β changes sign: raise it"
        )


def _taught(config: Config, algorithm: GKDConfig) -> Iterator[str]:
    """What learning from a teacher asks for, and what it would not read."""
    name, n = algorithm.name, config.sample.n
    if not 0 <= algorithm.beta <= 1:
        yield f"algorithm.beta={algorithm.beta:g}: must be in [0, 1]"
    if not config.reference.path:
        yield f"reference.path: missing: {name} learns from it: name the teacher, as in model.path"
    if config.rewards:
        yield (
            f"rewards: algorithm.name={name} learns from its teacher alone: leave rewards out, or "
            "measure held-out prompts by them as eval.gold"
        )
    if config.max_excluded != Config.max_excluded:
        yield f"max_excluded={config.max_excluded}: {name} asks for no rewards: leave it out"
    if algorithm.lmbda < 1 and n > 1:
        yield (
            f"sample.n={n}: with algorithm.lmbda={algorithm.lmbda:g} prompts have the one answer "
            "that is in the data: set n to 1, and raise data.batch_size instead"
        )


def _family(config: Config, algorithm: OnPolicyConfig) -> Iterator[str]:
    """What one family of algorithms asks for, and what it would not read."""
    name, n = algorithm.name, config.sample.n
    if algorithm.in_groups and n < 2:
        yield f"sample.n={n}: {name} compares the samples of a prompt: give at least 2"
    rows = config.data.batch_size * n
    if isinstance(algorithm, ReinforceConfig) and algorithm.baseline == "mean" and rows == 1:
        yield "algorithm.baseline=mean: one row is its own mean: raise data.batch_size or sample.n"
    if algorithm.kl_controller == "adaptive" and not algorithm.kl_coef:
        yield "algorithm.kl_coef=0: the adaptive controller multiplies it: give a start above 0"
    # Where nothing is truncated, the sampler's log-prob is that of the draw, and all weights are 1.
    truncated = config.sample.top_k or config.sample.top_p < 1 or config.sample.min_p
    if algorithm.off_policy != "none" and algorithm.old_logp == "sampler" and not truncated:
        yield (
            f"algorithm.off_policy={algorithm.off_policy}: the old log-probs are the sampler's, "
            "and all weights 1: set old_logp: rescore, or leave off_policy out"
        )
    # E[∇ log π] = 0: k1 has no gradient but noise.
    if algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1":
        yield (
            "algorithm.kl_estimator=k1: as a loss its gradient is 0 on average: take k2 or k3, or "
            "kl_in: exact_loss"
        )
    if algorithm.overlong_buffer > config.sample.max_new_tokens:
        yield (
            f"algorithm.overlong_buffer={algorithm.overlong_buffer}: more tokens than "
            f"sample.max_new_tokens={config.sample.max_new_tokens}: lower it"
        )
    if algorithm.off_policy != "none" and algorithm.off_policy_cap < 1:
        yield f"algorithm.off_policy_cap={algorithm.off_policy_cap}: must be at least 1"
    switched = {
        "kl_target": "kl_controller",
        "kl_horizon": "kl_controller",
        "off_policy_cap": "off_policy",
    }
    for key, switch in switched.items():
        value, setting = getattr(algorithm, key), getattr(algorithm, switch)
        if setting in ("fixed", "none") and value != getattr(type(algorithm), key):
            yield f"algorithm.{key}={value:g}: {switch}={setting} does not read it: leave it out"
    if getattr(algorithm, "kind", "") == "exo_pair":
        yield f"algorithm.kind=exo_pair: needs label smoothing, which {name} lacks: change it"


def _offline(config: Config) -> Iterator[str]:
    name, data = config.algorithm.name, config.data
    if config.rewards:
        yield f"rewards: algorithm.name={name} learns from its data alone: leave rewards out"
    if config.max_excluded != Config.max_excluded:
        yield f"max_excluded={config.max_excluded}: {name} asks for no rewards: leave it out"
    if isinstance(config.algorithm, DPOConfig):
        smoothing, kind = config.algorithm.label_smoothing, config.algorithm.kind
        if smoothing and kind not in ("sigmoid", "robust", "exo_pair"):
            yield f"algorithm.label_smoothing={smoothing}: kind={kind} does not read it: use 0"
        if kind == "exo_pair" and not smoothing:
            yield "algorithm.label_smoothing=0: the loss of exo_pair is infinite: give 0.1, say"
    pieces = config.optim.microbatches
    assert isinstance(config.algorithm, OfflineConfig)
    if isinstance(config.algorithm, PointwiseRewardModelConfig):
        delta, kind = config.algorithm.delta, config.algorithm.kind
        if kind != "huber" and delta != PointwiseRewardModelConfig.delta:
            yield f"algorithm.delta={delta}: kind={kind} does not read it: leave it out"
    if isinstance(config.algorithm, ProcessRewardModelConfig) and not config.algorithm.separator:
        yield "algorithm.separator: empty: give the text that stands between two steps"
    if config.algorithm.whole_batch and pieces > 1:
        yield f"optim.microbatches={pieces}: {name} has a mean over the batch inside: set it to 1"
    if config.algorithm.whole_batch and data.batch_size < 2:
        yield f"data.batch_size=1: {name} compares the rows of a batch: give at least 2"
    if config.eval.gold:
        yield f"eval.gold: algorithm.name={name} samples nothing that it could judge: leave it out"
    if config.eval.n != EvalConfig.n:
        yield f"eval.n={config.eval.n}: algorithm.name={name} samples nothing: leave it out"
    # A run writes what ends the model's responses to its config.yaml.
    names = ("stop", "stop_strings", "pad", "forbidden")
    ends = {name: getattr(config.sample, name) for name in names}
    unread = {
        "critic": (config.critic, CriticConfig()),
        **({} if has_reference(config) else {"reference": (config.reference, ReferenceConfig())}),
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
