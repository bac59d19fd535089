"""The networks: policy, critic, reference, and the decoder they are made of."""

from dataclasses import dataclass
from typing import Literal

Remat = Literal["none", "dots", "full"]
"""How much of a layer is computed again in the backward pass, from nothing to all of it."""

AttentionKernel = Literal["auto", "pieces", "cudnn", "splash"]
"""By what attention over whole rows is computed; see ``ModelConfig.attention``."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched rotary frequencies (``rope_type: llama3`` of a config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int
    """Tokens of context that the model was first trained with."""


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
    activation: Literal["silu", "gelu"] = "silu"
    """Of the MLP's gate; gelu is its tanh approximation (Gemma)."""
    norm_offset: bool = False
    """Norms scale by 1 + their parameter (Gemma)."""
    embed_scale: bool = False
    """Embeddings are multiplied by √embed on their way in (Gemma)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters W + (alpha/rank)·A·B on the frozen weights (arXiv:2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = (
        "q", "k", "v", "o", "gate", "up", "down",
    )  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """A language model: weights from a path, or a fresh decoder."""

    path: str = ""
    """smollm2, a Hugging Face folder, a .gguf file, or the output folder of a run."""
    decoder: DecoderConfig | None = None
    """The shape of a model that starts from random weights; leave out when ``path`` is given."""
    tokenizer: str = ""
    """Where the tokenizer comes from, if not from ``path``: any of the same, words:TEXT or
    chars:TEXT."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; parameters are kept in float32. float32 is that on every device:
    GPUs do not multiply in TF32, nor TPUs in bfloat16, at several times the cost of bfloat16."""
    lora: LoraConfig | None = None
    """Train adapters and leave the weights as they are."""
    attention: AttentionKernel = "auto"
    """Over whole rows, in scoring and updates. cudnn (NVIDIA GPUs), splash (TPUs): scores are never
    in memory; bfloat16 alone, rows not split by mesh.context, and with cudnn not packed. pieces:
    some queries at a time. auto: the devices' kernel where it fits, else pieces."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it, for memory. none: nothing. dots:
    all of a layer but its products with weights. full: whole layers, for a third more time."""


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
    """The policy that the KL term holds on to."""

    path: str = ""
    """As model.path; "" = the policy at its start (with LoRA: the base without the adapters)."""
    offload: bool = False
    """Keep its weights in host memory, and on the devices only while it scores: less memory for the
    other steps, and a copy from host to device each time."""
