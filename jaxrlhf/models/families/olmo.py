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
    rope,
    said_of_rope,
    said_of_scaling,
    windows,
)


def read_olmo2(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    bias = said.flag("attention_bias")
    return {"norms": "after", "qk_norm_all": True, "qkv_bias": bias, "o_bias": bias}


def write_olmo2(c: DecoderConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", **said_of_rope(c), "attention_bias": c.qkv_bias}


def read_olmo3(said: Said) -> dict[str, Any]:
    layers, context = said.number("num_hidden_layers"), said.number("max_position_embeddings")
    kinds = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    found = said.table_of("rope_parameters")
    full, near = (found.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    for key, table in (("full_attention", full), ("sliding_attention", near)):
        if not isinstance(table, dict):
            raise said.wrong(f"rope_parameters.{key}", table, "it must be an object")
    if near.get("rope_type", "default") != "default":
        raise said.wrong("rope_parameters.sliding_attention", near, "its rope_type is not default")
    turned = rope(said, context, full or None, 500_000.0)
    theta = near.get("rope_theta") or turned["rope_theta"]
    return {
        **read_olmo2(said),
        **turned,
        "windows": windows(
            said, said.texts("layer_types") or kinds, said.left_out("sliding_window", 4096)
        ),
        "window_rope_theta": said.as_number("rope_theta", theta, float),
    }


def write_olmo3(c: DecoderConfig) -> dict[str, Any]:
    both = {
        "full_attention": {
            "rope_type": "default",
            "rope_theta": c.rope_theta,
            **(said_of_scaling(c.rope_scaling) or {}),
        },
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": c.window_rope_theta or c.rope_theta,
        },
    }
    return {**write_olmo2(c), **layer_types(c), "rope_parameters": both}


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
