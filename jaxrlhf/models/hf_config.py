"""config.json of a Hugging Face checkpoint ↔ DecoderConfig."""

import os
from pathlib import Path
from typing import Any

from jaxrlhf.config.model import DecoderConfig, RopeScaling
from jaxrlhf.core import reading
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.reading import check_text
from jaxrlhf.core.shown import shown

MOST_FLOAT = 1e38
"""Beyond it float32, which computes with such numbers, has none."""

MOST_LAYERS = 10_000
"""Layers that a model can have: of each, some names are written out."""

_FAMILIES = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma": {"max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256},
}
"""What transformers takes where a config.json leaves it out; as many key heads as query heads, and
hidden_size / num_attention_heads, where it says nothing here either."""

_GEMMA = {"activation": "gelu", "norm_offset": True, "embed_scale": True}
"""What sets a Gemma of the first generation apart; later ones have more that is their own."""

_FIELDS = {
    "vocab": "vocab_size", "embed": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "mlp": "intermediate_size", "activation": "hidden_act", "context": "max_position_embeddings",
    "rope_theta": "rope_theta", "rope_scaling": "rope_scaling", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}  # fmt: skip
"""Fields of ``DecoderConfig`` → what config.json calls them, in its order."""

_SCALING = {
    "factor": "factor", "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}  # fmt: skip
"""Fields of ``RopeScaling`` → what config.json calls them."""


def read_config(path: Path, head: bool = False) -> DecoderConfig:
    """The decoder that a config.json describes.

    Fields that are left out take the family's defaults in transformers. ``rope_scaling`` with
    ``rope_theta`` (transformers 4) and ``rope_parameters`` (5) are both read.

    Args:
      head: of a reward model, which has one score and no logits (``tied`` is then true).

    Raises:
      InputError: the file is missing or malformed, or says something that the decoder cannot do.
    """
    config = read_object(path)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise InputError(
            f"{path}: model_type={shown(family)}; supported are {', '.join(_FAMILIES)}"
        )
    _refuse_unsupported(path, config, "ForSequenceClassification" if head else "ForCausalLM")

    gemma, default = family == "gemma", _FAMILIES[family]
    heads, embed = (_number(path, config, _FIELDS[x]) for x in ("heads", "embed"))
    head_dim = default.get("head_dim")
    if config.get("head_dim") is None and not head_dim and embed % heads:
        raise InputError(f"{path}: hidden_size={embed} % num_attention_heads={heads}; add head_dim")
    # Null is as many as query heads; the family's default is for what is left out.
    kv_heads = _number(path, {**default, **config}, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(
            f"{path}: num_attention_heads={heads} % num_key_value_heads={kv_heads} is not 0"
            + ("" if "num_key_value_heads" in config else f"; a {family}'s default: write it down")
        )
    sizes = {"head_dim": head_dim or embed // heads, "context": default["max_position_embeddings"]}
    for name in ("vocab", "layers", "head_dim", "mlp", "context"):
        sizes[name] = _number(path, config, _FIELDS[name], sizes.get(name))
    if sizes["layers"] > MOST_LAYERS:
        raise InputError(f"{path}: num_hidden_layers={sizes['layers']}; at most {MOST_LAYERS}")
    theta, scaling = _rope(path, config, sizes["context"])
    return DecoderConfig(
        **sizes,
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(path, config, "rms_norm_eps", 1e-6, float),
        tied=head or config.get("tie_word_embeddings", gemma),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        **(_GEMMA if gemma else {}),
    )


def is_reward_model(path: Path) -> bool:
    """Whether a config.json is that of a …ForSequenceClassification: a trunk with a score."""
    if not os.path.isfile(path):
        return False
    architectures = _texts(path, read_object(path), "architectures")
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def read_bias(path: Path) -> float:
    """What a reward model adds to its score, ``score_bias``; transformers' own have no bias."""
    bias = read_object(path).get("score_bias", 0.0)
    if not isinstance(bias, int | float) or isinstance(bias, bool) or not abs(bias) < MOST_FLOAT:
        raise InputError(f"{path}: score_bias={shown(bias)}; it must be a number")
    return float(bias)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an InputError where it is missing or none."""
    if not os.path.exists(path):
        raise InputError(f"{path}: missing; give a folder with config.json")
    config = reading.read_object(path, remedy="download it again")
    check_text(config, str(path))
    return config


def _number(path: Path, table: dict, key: str, default: Any = None, kind: type = int) -> Any:
    """A positive number that an array can have, or be as long as; ``default`` where it is missing
    or null."""
    value = table.get(key)
    value = default if value is None else value
    ok = isinstance(value, int) or (kind is float and isinstance(value, float))
    most = MOST_FLOAT if kind is float else 2**31
    # So written that NaN fails too.
    if not ok or isinstance(value, bool) or not 0 < value < most:
        raise InputError(f"{path}: {key}={shown(value)}; it must be a positive {kind.__name__}")
    return kind(value)


def _texts(path: Path, table: dict, key: str) -> list[str]:
    """A list of texts; empty where it is missing or null."""
    value = table.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{path}: {key}={shown(value)}; it must be a list of texts")
    return value


def _refuse_unsupported(path: Path, config: dict[str, Any], kind: str) -> None:
    """Raises InputError for the first field that asks for what the decoder does not do."""
    gemma = config["model_type"] == "gemma"
    tanh = ("gelu_pytorch_tanh", "gelu")  # of a Gemma they are the same
    activation = config.get("hidden_act", tanh[0])
    if gemma and activation not in tanh:
        raise InputError(f"{path}: hidden_act={shown(activation)}; a gemma has {tanh[0]!r}")
    only = {
        **({} if gemma else {"hidden_act": "silu"}),
        "use_bidirectional_attention": False,
        "attention_bias": False,  # of Llama and Qwen3: biases on q, k, v and o
        "mlp_bias": False,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    for key, value in only.items():
        if config.get(key) is not None and config[key] != value:
            raise InputError(f"{path}: {key}={shown(config[key])} is not supported, only {value!r}")
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise InputError(f"{path}: tie_word_embeddings must be true or false")
    for architecture in _texts(path, config, "architectures"):
        if not architecture.endswith(kind):
            raise InputError(f"{path}: architectures={shown(architecture)}; give a …{kind} model")
    for layer in _texts(path, config, "layer_types"):
        if layer != "full_attention":
            raise InputError(f"{path}: layer_types has {shown(layer)}; supported is full_attention")
    if config["model_type"] == "mistral":
        window = config.get("sliding_window", 4096)
        # Null is none at all, and one as wide as any row hides nothing.
        window = window if window is None else _number(path, config, "sliding_window", 4096)
        default = _FAMILIES["mistral"]["max_position_embeddings"]
        context = _number(path, config, "max_position_embeddings", default)
        if window is not None and window < context:
            raise InputError(
                f"{path}: sliding_window={window} is not supported; set it to null and "
                f"max_position_embeddings to at most {window} if rows are no longer than that"
            )


def _rope(path: Path, config: dict[str, Any], context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from either generation of transformers."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_scaling={shown(rope)}; it must be an object or null")
    default = _number(path, config, "rope_theta", 10_000.0, float)
    theta = _number(path, rope, "rope_theta", default, float)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"{path}: partial_rotary_factor={shown(rope['partial_rotary_factor'])} is not supported"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{path}: rope_type={shown(kind)}; supported are default and llama3")
    context = _number(path, rope, _SCALING["original_context"], context)
    names = [name for name in _SCALING if name != "original_context"]
    factors = {name: _number(path, rope, _SCALING[name], None, float) for name in names}
    return theta, RopeScaling(**factors, original_context=context)


def write_config(decoder: DecoderConfig, dtype: str, bias: float | None = None) -> dict[str, Any]:
    """The config.json of ``decoder``, in the words of transformers 4, which 5 reads too.

    Args:
      bias: of a reward model's score; None for a language model.

    Raises:
      InputError: no architecture of transformers has this combination of features.
    """
    if decoder.qkv_bias and decoder.qk_norm:
        raise InputError("decoder: no Hugging Face architecture has both qkv_bias and qk_norm")
    family = "qwen3" if decoder.qk_norm else "qwen2" if decoder.qkv_bias else "llama"
    own = {name: getattr(decoder, name) == value for name, value in _GEMMA.items()}
    if any(own.values()):
        if not all(own.values()) or family != "llama":
            listed = ", ".join(f"{name}={getattr(decoder, name)}" for name in own)
            raise InputError(f"decoder: {listed}: no Hugging Face architecture has just these")
        family = "gemma"
    if family == "llama" and decoder.embed % decoder.heads:
        raise InputError(
            f"decoder: embed={decoder.embed} % heads={decoder.heads}: LlamaForCausalLM refuses it"
        )
    said = {theirs: getattr(decoder, ours) for ours, theirs in _FIELDS.items()}
    said["hidden_act"] = "gelu_pytorch_tanh" if family == "gemma" else "silu"
    if scaling := decoder.rope_scaling:
        numbers = {theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()}
        said["rope_scaling"] = {"rope_type": "llama3", **numbers}
    kind = "ForCausalLM" if bias is None else "ForSequenceClassification"
    return {
        "architectures": [family.capitalize() + kind],
        "model_type": family,
        **said,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **({} if bias is None else {"num_labels": 1, "score_bias": bias}),
    }
