"""A whole run, its parts that are neither networks nor algorithms, and what it asks for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from jaxrlhf.config.algorithms import (
    AlgorithmConfig,
    OnPolicyConfig,
    PPOConfig,
)
from jaxrlhf.config.model import CriticConfig, ModelConfig, ReferenceConfig
from jaxrlhf.config.offline import (
    OfflineConfig,
)
from jaxrlhf.config.rewards import RewardConfig
from jaxrlhf.core.reading import parse_yaml, problem_of


def _mapping(words: list[str]) -> Any:
    """A mapping as YAML writes it in one line; what is none is refused as YAML's is."""
    try:
        return parse_yaml(words[0])
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {problem_of(error)}") from None


_MAPPING = PrimitiveConstructorSpec(
    nargs=1,
    metavar="'{KEY: VALUE, …}'",
    instance_from_str=_mapping,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)
"""How the command line reads a mapping."""


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from. Formats: JSONL and Parquet, with TRL's column names."""

    train: str = ""
    """A .jsonl or .parquet file; package:path names one inside an installed package,
    hf:org/name[/subset][@revision][:split] a dataset of the Hugging Face hub."""
    eval: str = ""
    """Held-out rows of the same kind."""
    batch_size: int = 8
    """Rows of the data (prompts, pairs) an iteration; with packing, packed rows."""
    max_prompt_tokens: int = 64
    """Width that prompts are padded to; a longer prompt is an error."""
    max_tokens: int = 128
    """Most tokens of a whole row (prompt and answer), offline; longer is an error. Rows are padded
    to the longest that there is."""
    packing: bool = False
    """SFT: lay short rows one after the other in rows of max_tokens, where they do not see each
    other. Held-out rows are never packed."""
    skip_bad_rows: bool = False
    """Skip malformed or overlong rows, instead of stopping at the first. Their number is said at
    the start, with the first of them, and in summary.json."""
    chat_template: str = ""
    """A Jinja file that chats are rendered with, in place of the tokenizer's template; package:path
    names one inside an installed package, such as jaxrlhf:templates/qwen3.jinja."""
    template_kwargs: Annotated[dict[str, Any], _MAPPING] = field(default_factory=dict, hash=False)
    """What the chat template is given besides the chat, such as {enable_thinking: false}."""
    date: str = ""
    """Today, YYYY-MM-DD, for chat templates that write the date; if one does, a run fills in the
    day that it starts on."""
    allow_dropped: bool = False
    """Accept chats of which the template leaves something out (a thought, a call, the tools). The
    number of such rows is said at the start, with the first of them."""


RENDERING = {
    "messages",
    "conversation",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "strftime_now",
}
"""What a chat template is given by the rows and the run."""


def chat_problems(data: DataConfig) -> Iterator[str]:
    """What is wrong with the settings of chats, a line each."""
    try:
        # Only one of the forms that it reads: the day is compared as text.
        good = not data.date or date.fromisoformat(data.date).isoformat() == data.date
    except ValueError:
        good = False
    if not good:
        yield f"data.date={data.date}: no such day: give YYYY-MM-DD"
    for name in sorted(RENDERING & data.template_kwargs.keys()):
        yield f"data.template_kwargs.{name}: comes from the rows or the run: leave it out"


@dataclass(frozen=True)
class SampleConfig:
    """How responses are drawn."""

    max_new_tokens: int = 24
    """Most tokens of a response, stop token included."""
    temperature: float = 1.0
    """Logits are divided by this; 0 is greedy (evaluation only)."""
    n: int = 4
    """G, samples a prompt."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with at least this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest."""
    stop: tuple[int, ...] = ()
    """Token ids that end a response; a run adds those of the model (tokenizer, generation_config,
    config)."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response, with the token that completes one."""
    pad: int = 0
    """Token id written after the end; masks, not ids, say what is padding."""
    slots: int = 0
    """Most responses decoded at once; 0: all. With fewer, a response that ends makes room for the
    next, so that short ones do not wait for long ones. Each slot has a copy of its prompt's keys
    and values; draws are the same."""
    cache: Literal["model", "bfloat16", "int8"] = "model"
    """What keys and values are kept in while decoding: model.dtype, or a smaller one, int8 with a
    scale a vector. Draws are then of slightly another policy than the one that is scored:
    algorithm.old_logp has to be rescore."""
    router_replay: bool | None = None
    """Of a mixture of experts, keep which of them each token took, and take them again where the
    policy is scored and updated (R3; arXiv:2510.11370): a byte for each, up to 255 experts. None:
    in bfloat16, where sampling and scoring round differently and choose differently; in float32
    they do not."""
    forbidden: tuple[tuple[int, int], ...] = ()
    """Ranges (first, last + 1) of ids that are never drawn. A run writes those here that the model
    has and its tokenizer has not, and refuses others."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101; eps outside the square root) with global-norm clipping."""

    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay to 0 over the optimizer steps planned for what is trained: with a separate critic, the
    policy's begin after critic.warmup."""
    warmup: int = 0
    """Optimizer steps of linear rise to the learning rate, the first at 1/warmup of it."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Per step, relative to the learning rate; norms, biases and heads are spared."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What both moments are kept in: bfloat16 takes half the memory, and a few percent off the
    precision of each step; it asks for b1 and b2 of at most 0.99. Parameters stay float32."""
    microbatches: int = 1
    """Pieces that a minibatch is computed in, for memory; the result is the same."""
    max_skipped: int = 10
    """Stop with an error after this many updates in a row with a gradient that is not finite."""
    router_aux_loss_coef: float = 0.0
    """Of a mixture of experts, weight of the load-balancing loss (arXiv:2101.03961), which is as
    many as the experts that a token takes where all have the same load. 0: no token is dropped
    where experts are busy, and the loss pulls at what a short run is to learn."""
    router_z_loss_coef: float = 0.0
    """Of a mixture, weight of the mean squared log Σ exp of the routers (arXiv:2202.08906)."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, which means the rest. All axes but slices."""

    data: int = -1
    """Copies of the model; rows are split over data × fsdp × expert."""
    fsdp: int = 1
    """Pieces that parameters are split into by their embed axis."""
    tensor: int = 1
    """Pieces that heads, mlp and vocabulary are split into."""
    context: int = 1
    """Pieces that the tokens of whole rows are split into, for rows too long for one device; what
    is sampled is split over data × fsdp × context by rows. Parameters are split by it as by
    fsdp."""
    slices: int = 1
    """Groups of devices with fast links inside and the data-center network between them: TPU
    slices, or else hosts. data lies across them if it divides by their number, else fsdp; the other
    axes lie inside."""
    expert: int = 1
    """Pieces that the experts of a mixture are split into; other parameters by it as by fsdp."""


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run; left alone, JAX_* variables or the cluster say who they are."""

    coordinator: Annotated[str, arg(aliases=("--coordinator",))] = ""
    """HOST:PORT of process 0; with processes and process: all three, or none."""
    processes: Annotated[int, arg(aliases=("--processes",))] = 0
    """How many processes there are; 0 leaves it open."""
    process: Annotated[int, arg(aliases=("--process",))] = -1
    """The number of this one, from 0; -1 leaves it open."""
    initialization_timeout: int = 300
    """Seconds within which all processes must have come up."""
    heartbeat: int = 20
    """Seconds without a sign of life after which a process counts as dead, and all end."""
    watchdog: float | None = None
    """Seconds without progress after which the processes end, six times that where much may take
    long (the set-up, the first iteration, rewards, evaluations, saves); 0 waits for ever; null: for
    one process for ever, for several 300, and less once it is known how long a step takes here:
    five times the longest so far, 40 at least."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Orbax checkpoints under output/checkpoints; a run resumes from the newest by itself."""

    every: int = 20
    """Iterations between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True)
class EvalConfig:
    """What held-out rows are measured with before and after training, and in between."""

    every: int = 0
    """Iterations between evaluations besides the first and the last; 0: only those."""
    n: int = 2
    """Completions a held-out prompt."""
    batch_size: int = 32
    """Most held-out rows at once; prompts, for a policy."""
    patience: int = 0
    """Offline: stop after this many evaluations in a row without a lower held-out loss, and end
    with the parameters of the lowest (also if steps run out); 0 is off. Keeps a second copy of what
    is trained."""
    gold: tuple[RewardConfig, ...] = ()
    """Rewards that are measured and never trained on."""


@dataclass(frozen=True)
class Config:
    """A run. YAML, command line and this class have the same fields."""

    algorithm: AlgorithmConfig = field(default_factory=PPOConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    rewards: tuple[RewardConfig, ...] = ()
    max_excluded: float = 0.5
    """Share of a batch's rows that may go without a reward, and are left out of learning; above it
    the run stops. Evaluations warn instead."""
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    steps: int = 100
    """Iterations: rollouts on policy, optimizer steps offline."""
    seed: int = 0
    """Every draw follows from seed and step."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the figures of metrics.jsonl and the completions also go; each has an extra of its name
    that installs it. TensorBoard's files lie in output/tensorboard."""
    output: str = "runs/run"
    """Folder of the run: config.yaml, metrics.jsonl, samples.jsonl, summary.json, report.html, …"""


def is_on_policy(config: Config) -> bool:
    """Whether the run learns from responses it samples."""
    return isinstance(config.algorithm, OnPolicyConfig)


def has_critic(config: Config) -> bool:
    """Whether the run learns a value function."""
    return isinstance(config.algorithm, OnPolicyConfig) and config.algorithm.has_critic


def has_reference(config: Config) -> bool:
    """Whether the run compares the policy with a reference."""
    return isinstance(config.algorithm, OnPolicyConfig) or config.algorithm.has_reference


def is_reward_model(config: Config) -> bool:
    """Whether the run trains a scalar head to judge."""
    return isinstance(config.algorithm, OfflineConfig) and config.algorithm.is_reward_model


def on_policy(config: Config) -> OnPolicyConfig:
    """The settings of an algorithm that samples; only for runs that do."""
    assert isinstance(config.algorithm, OnPolicyConfig)
    return config.algorithm
