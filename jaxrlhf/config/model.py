"""The networks: policy, critic, reference, and the decoder they are made of."""

import math
from dataclasses import dataclass, field
from typing import Literal

Remat = Literal["none", "elementwise", "dots", "full"]
"""How much of a layer is computed again in the backward pass, from nothing to all of it."""

AttentionKernel = Literal["auto", "pieces", "cudnn", "splash"]
"""By what attention over whole rows is computed; see ``ModelConfig.attention``."""

Nf4Product = Literal["auto", "plain"]
"""By what decoding multiplies by weights of nf4; see ``ModelConfig.nf4_product``."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for rows longer than a model was first trained with."""

    factor: float = 1.0
    low_freq_factor: float = 1.0
    """Of llama3, with the next."""
    high_freq_factor: float = 4.0
    original_context: int = 0
    """Tokens of context that the model was first trained with."""
    kind: Literal["llama3", "linear", "yarn", "longrope", "proportional"] = "llama3"
    """linear: all frequencies / factor. llama3: the low ones / factor. yarn (arXiv:2309.00071):
    likewise, by turns over the first context. longrope (arXiv:2402.13753): each by its own.
    proportional: as linear, and but for the first ``share`` of them they are 0 (Gemma 4)."""
    beta_fast: float = 32.0
    """Of yarn, with the next: turns from which on, and up to which, one is kept, or divided."""
    beta_slow: float = 1.0
    truncate: bool = True
    """Of yarn: the ramp begins and ends at whole pairs."""
    attention_factor: float = 1.0
    """cos and sin are multiplied by it."""
    factors: tuple[float, ...] = ()
    """Of longrope, what each frequency is divided by where ``context`` is no more than the original
    one; ``long_factors`` where it is more. ``factor`` is then the most that it can be stretched."""
    long_factors: tuple[float, ...] = ()
    share: float = 1.0
    """Of proportional: the part of a head's pairs that is turned at all."""


@dataclass(frozen=True)
class MoeConfig:
    """An MLP of many experts, each ``decoder.mlp`` wide, of which a token takes a few."""

    experts: int
    per_token: int
    """Experts that a token takes: the likeliest of its router."""
    normalise: bool = True
    """Their weights add up to 1 (Mixtral, Qwen3); else they are their probabilities (OLMoE)."""
    beside: int = 0
    """Beside the experts lies an MLP so wide: what each makes has a norm of its own, and is added.
    The router then reads what goes through the layers, by a norm without a weight and a scale, and
    an expert's weight is multiplied by a number of its own (Gemma 4); 0: none."""


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only transformer; families differ in these fields alone."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    context: int = 2048
    """Longest row, in tokens."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    """The output projection is the embedding table."""
    qkv_bias: bool = False
    """Biases on query, key and value (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    activation: Literal["silu", "gelu", "gelu_exact", "clamped"] = "silu"
    """Of the MLP; gelu is its tanh approximation (Gemma), gelu_exact is without it (Pythia).
    clamped: with g = min(gate, 7) and u = up within ±7, g·σ(1.702·g)·(u + 1) (gpt-oss)."""
    norm_offset: bool = False
    """Norms scale by 1 + their parameter (Gemma)."""
    embed_multiplier: float = 1.0
    """Embeddings are multiplied by it on their way in (Gemma: √embed)."""
    family: str = field(default="", compare=False)
    """Whose files the weights are written as, a model_type of transformers; "": llama, qwen2, qwen3
    or gemma, which these features are of. It changes nothing of what is computed."""
    windows: tuple[int, ...] = ()
    """How many tokens a layer's token looks at, up to itself; 0: all before it. Of one layer after
    the other, over and over: (4096, 0) is every second layer (Gemma 2). Empty: all of all."""
    window_rope_theta: float | None = None
    """rope_theta of layers with a window, unscaled (Gemma 3, OLMo 3); None: as the others."""
    no_rope: tuple[bool, ...] = ()
    """Which layers' queries and keys are not rotated, over and over as ``windows`` (SmolLM3)."""
    rotary_dim: int = 0
    """Numbers of a head that are rotated, the first ones (GLM-4, Phi-4-mini); 0: all."""
    positions: Literal["rotary", "learned"] = "rotary"
    """learned: a table of context vectors is added to the embeddings (GPT-2)."""
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    """Of norm: layer."""
    norms: Literal["before", "after", "both"] = "before"
    """Where attention and MLP have a norm: on what they read, on what they add (OLMo 2), or on both
    (Gemma 2)."""
    block: Literal["serial", "parallel", "one_norm"] = "serial"
    """parallel: the MLP reads what attention reads, not what it adds to (Pythia); one_norm: through
    the same norm (Cohere)."""
    gated: bool = True
    """The MLP is down(act(gate(x)) · up(x)), else down(act(up(x))) (GPT-2)."""
    qk_norm_all: bool = False
    """qk_norm is of all heads at once (OLMo 2)."""
    o_bias: bool = False
    mlp_bias: bool = False
    """Of experts, the router's too (gpt-oss)."""
    attention_sinks: bool = False
    """A head's softmax has one more score, a weight of its own, and nothing is read of it: what is
    left to the tokens adds up to less than 1 (gpt-oss)."""
    attention_scale: float | None = None
    """Scores are q·k times it; None: 1/√head_dim."""
    attention_softcap: float = 0.0
    """Scores s become cap·tanh(s / cap) (Gemma 2); 0: they stay. Likewise the logits, below."""
    logit_softcap: float = 0.0
    logit_scale: float = 1.0
    """Logits are multiplied by it (Cohere, Granite)."""
    moe: MoeConfig | None = None
    """Each layer's MLP is a mixture of experts."""
    residual_multiplier: float = 1.0
    """What attention and MLP add is multiplied by it (Granite)."""
    full_head_dim: int = 0
    """head_dim of layers without a window (Gemma 4), and with it kv_heads; 0: as the others'."""
    full_kv_heads: int = 0
    keys_are_values: bool = False
    """Layers without a window have no projection of values: they are what keys are before their
    norm (Gemma 4)."""
    value_norm: bool = False
    """A norm on each value head, without a weight (Gemma 4)."""
    layer_scale: bool = False
    """What leaves a layer is multiplied by a number of its own, which nothing trains (Gemma 4)."""
    shared_kv_layers: int = 0
    """So many last layers have no keys and values: they look at those of the last layer before them
    that has a window as they do, or none (Gemma 4 E2B)."""
    shared_mlp: int = 0
    """mlp of these layers; 0: as the others'."""
    layer_embed: int = 0
    """Each layer also reads an embedding of its own of the token, of so many numbers, through a
    gate (Gemma 4 E2B); 0: none."""

    @property
    def most_context(self) -> int:
        """Tokens of the longest row that rotary frequencies can be chosen for."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return self.context
        return round(scaling.factor * scaling.original_context)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters W + (alpha/rank)·A·B on the frozen weights (arXiv:2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = (
        "q", "k", "v", "o", "gate", "up", "down",
    )  # fmt: skip
    rank_stabilised: bool = False
    """alpha/√rank in place of alpha/rank (rsLoRA; arXiv:2312.03732): with it, a higher rank learns
    at the same rate."""
    path: str = ""
    """An adapter of the package peft's, a folder or org/name of the hub, to go on with: all of the
    above are then its own. The reference is still the model without it; see reference.path."""
    dora: bool = False
    """Outputs are as long as a magnitude that is learnt says, and A·B turns them alone (DoRA;
    arXiv:2402.09353): W' = m·(W + s·A·B)/‖W + s·A·B‖."""

    @property
    def scale(self) -> float:
        """What A·B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """A language model: weights from a path, or a fresh decoder."""

    path: str = ""
    """smollm2, a Hugging Face folder, org/name[@revision] of its hub, a .gguf file, the output
    folder of a run, or an adapter of peft's, which is merged into its base."""
    decoder: DecoderConfig | None = None
    """The shape of a model that starts from random weights; leave out when ``path`` is given."""
    tokenizer: str = ""
    """Where the tokenizer comes from, if not from ``path``: any of the same, words:TEXT or
    chars:TEXT."""
    context: int | None = None
    """Most tokens of a row, prompt and response. Of longrope (Phi-3.5, Phi-4-mini): above the first
    context, all rows, short ones too, have the frequencies of long ones. None: the model's context;
    of longrope the first one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; what is trained is kept in float32. float32 is that on every
    device: GPUs do not multiply in TF32, nor TPUs in bfloat16, at several times the cost."""
    frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    """What weights that nothing trains are kept in: reference, reward models, those under adapters.
    None: as their files have them, or in dtype where that is smaller. int8 and nf4: the linear maps
    of the layers in as many bits (the extra quantise), all else as with None."""
    nf4_product: Nf4Product = "auto"
    """In decoding, of frozen_dtype: nf4. auto: on NVIDIA GPUs and TPUs a kernel reads four bits a
    weight. plain: XLA's products, which write each weight out wide first; so elsewhere."""
    lora: LoraConfig | None = None
    """Train adapters and leave the weights as they are."""
    attention: AttentionKernel = "auto"
    """Over whole rows, in scoring and updates. cudnn (NVIDIA GPUs), splash (TPUs): scores are never
    in memory; bfloat16 alone, rows not split by mesh.context, and with cudnn not packed, nor
    with softcap or sinks. pieces: some queries at a time. auto: the devices' kernel where it fits,
    else pieces."""
    remat: Remat = "elementwise"
    """What the backward pass computes again instead of keeping it, for memory. none: nothing.
    elementwise: all of a layer but its products with weights and what attention gives, which takes
    about as long as keeping it. dots: attention too. full: whole layers, for a third more time."""


@dataclass(frozen=True)
class CriticConfig:
    """The value function V(s)."""

    kind: Literal["shared", "separate"] = "shared"
    """shared: a head on the policy's trunk. separate: a network of its own."""
    path: str = ""
    """Start of a separate critic: as model.path, reward models included; "" = the policy."""
    learning_rate: float | None = None
    """Of a separate critic; None: as the policy's."""
    warmup: int = 0
    """First iterations in which only the value function learns."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The policy that the KL term holds on to; the teacher, of a distillation (gkd)."""

    path: str = ""
    """As model.path; "" = the policy at its start (with LoRA: the base without the adapters). A
    teacher is named."""
    offload: bool = False
    """Keep its weights in host memory, and on the devices only while it scores: less memory for the
    other steps, and a copy from host to device each time."""
