"""Qwen2, with biases on query, key and value, and Qwen3, with norms on query and key."""

from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.models.families.family import Family, Said, layer_types, naming, said_of_rope, windows


def _read(said: Said) -> dict[str, Any]:
    """Where ``use_sliding_window``, layers from ``max_window_layers`` on have a window."""
    said.only("hidden_act", "silu")
    layers, first = said.number("num_hidden_layers"), said.get("max_window_layers", 28)
    first = said.as_number("max_window_layers", first, least=-1)
    kinds = said.texts("layer_types")
    window = said.get("sliding_window", 4096)
    if not said.flag("use_sliding_window"):
        for kind in kinds:
            if kind != "full_attention":
                raise said.wrong(
                    "layer_types", kind, "and use_sliding_window is not true: mend one"
                )
        return {}
    kinds = kinds or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    return {"windows": windows(said, kinds, window)}


def _write(c: DecoderConfig) -> dict[str, Any]:
    window = {**layer_types(c), "use_sliding_window": True} if c.windows else {}
    return {"hidden_act": "silu", **said_of_rope(c), **window}


def read_qwen2(said: Said) -> dict[str, Any]:
    return {**_read(said), "qkv_bias": True}


def read_qwen3(said: Said) -> dict[str, Any]:
    bias = said.flag("attention_bias")
    return {**_read(said), "qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def write_qwen3(c: DecoderConfig) -> dict[str, Any]:
    return {**_write(c), "attention_bias": c.qkv_bias}


_BOTH = {"max_position_embeddings": 32_768, "num_key_value_heads": 32}

FAMILIES = [
    Family("qwen2", "Qwen2", read_qwen2, _write, naming(), _BOTH),
    Family("qwen3", "Qwen3", read_qwen3, write_qwen3, naming(), {**_BOTH, "head_dim": 128}),
]
