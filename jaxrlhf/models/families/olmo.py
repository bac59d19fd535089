"""OLMo 2 and 3: norms on what attention and MLP add, and on all heads of query and key at once.

The third has a window in three of four layers, and stretches the frequencies of the others alone.
"""

from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.models.families.family import (
    Family,
    Said,
    layer_types,
    naming,
    rope_by_window,
    said_of_rope,
    said_of_rope_by_window,
    windows,
)


def read_olmo2(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    bias = said.flag("attention_bias")
    return {"norms": "after", "qk_norm_all": True, "qkv_bias": bias, "o_bias": bias}


def write_olmo2(c: DecoderConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", **said_of_rope(c), "attention_bias": c.qkv_bias}


def read_olmo3(said: Said) -> dict[str, Any]:
    layers, window = said.number("num_hidden_layers"), said.left_out("sliding_window", 4096)
    kinds = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    seen = windows(said, said.texts("layer_types") or kinds, window)
    return {**read_olmo2(said), **rope_by_window(said, 500_000.0, None), "windows": seen}


def write_olmo3(c: DecoderConfig) -> dict[str, Any]:
    return {**write_olmo2(c), **layer_types(c), **said_of_rope_by_window(c)}


_NAMES = naming(
    {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
)
_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}

FAMILIES = [
    Family("olmo2", "Olmo2", read_olmo2, write_olmo2, _NAMES, _DEFAULTS),
    Family("olmo3", "Olmo3", read_olmo3, write_olmo3, _NAMES, _DEFAULTS),
]
