"""Llama, and what is a Llama but for a window, layers without rotary positions, or multipliers."""

from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.models.families.family import (
    Family,
    Said,
    cycle,
    layer_types,
    naming,
    one_window,
    said_of_rope,
    windows,
)


def read(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    bias = said.flag("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": said.flag("mlp_bias")}


def write(c: DecoderConfig) -> dict[str, Any]:
    biases = {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}
    return {"hidden_act": "silu", **said_of_rope(c), **biases}


def read_mistral(said: Said) -> dict[str, Any]:
    """Every layer has the window; null is none at all."""
    said.only("hidden_act", "silu")
    said.only("layer_types", None)
    return {"windows": one_window(said, 4096)}


def write_mistral(c: DecoderConfig) -> dict[str, Any]:
    window = layer_types(c)["sliding_window"]
    return {"hidden_act": "silu", **said_of_rope(c), "sliding_window": window}


def read_ministral(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    window = said.left_out("sliding_window", 4096)
    every = ["full_attention" if window is None else "sliding_attention"]
    return {"windows": windows(said, said.texts("layer_types") or every, window)}


def write_ministral(c: DecoderConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", **said_of_rope(c), **layer_types(c)}


def read_smollm3(said: Said) -> dict[str, Any]:
    """Every fourth layer has no rotary positions."""
    layers = said.number("num_hidden_layers")
    every = said.number("no_rope_layer_interval", 4)
    turned = said.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(turned, list) or len(turned) != layers or not set(turned) <= {0, 1}:
        raise said.wrong("no_rope_layers", turned, f"it must be {layers} times 0 or 1")
    kinds = said.texts("layer_types")
    if not said.flag("use_sliding_window"):
        kinds = ["full_attention"]
    still = tuple(not x for x in turned)
    found = windows(said, kinds or ["full_attention"], said.get("sliding_window"))
    return {**read(said), "no_rope": cycle(still) if any(still) else (), "windows": found}


def write_smollm3(c: DecoderConfig) -> dict[str, Any]:
    still = [bool(c.no_rope) and c.no_rope[i % len(c.no_rope)] for i in range(c.layers)]
    turned = {"no_rope_layers": [int(not x) for x in still], "use_sliding_window": bool(c.windows)}
    return {**write(c), **layer_types(c), **turned}


def read_granite(said: Said) -> dict[str, Any]:
    """Multipliers of what goes in, is added, and comes out."""
    return {
        **read(said),
        "embed_multiplier": said.number("embedding_multiplier", 1.0, float),
        "residual_multiplier": said.number("residual_multiplier", 1.0, float),
        "attention_scale": said.number("attention_multiplier", 1.0, float),
        "logit_scale": 1 / said.number("logits_scaling", 1.0, float),
    }


def write_granite(c: DecoderConfig) -> dict[str, Any]:
    return {
        **write(c),
        "embedding_multiplier": c.embed_multiplier,
        "residual_multiplier": c.residual_multiplier,
        "attention_multiplier": c.attention_scale or c.head_dim**-0.5,
        "logits_scaling": 1 / c.logit_scale,
    }


_MISTRAL = {"max_position_embeddings": 131_072, "num_key_value_heads": 8}
_SMOLLM3 = {
    "max_position_embeddings": 32_768, "num_key_value_heads": 4, "tie_word_embeddings": True,
    "rope_theta": 2_000_000.0,
}  # fmt: skip
_FIRST = {"max_position_embeddings": 2048}

FAMILIES = [
    Family("llama", "Llama", read, write, naming(), _FIRST),
    Family("mistral", "Mistral", read_mistral, write_mistral, naming(), _MISTRAL),
    Family("ministral", "Ministral", read_ministral, write_ministral, naming(), _MISTRAL),
    Family("smollm3", "SmolLM3", read_smollm3, write_smollm3, naming(), _SMOLLM3),
    Family("granite", "Granite", read_granite, write_granite, naming(), _FIRST, scored="none"),
]
