"""Cohere's Command R7B: attention and MLP beside each other, rotary positions in windows alone."""

from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.models.families.family import (
    Family,
    Said,
    cycle,
    layer_types,
    naming,
    said_of_rope,
    windows,
)


def read(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    layers, every = said.number("num_hidden_layers"), said.number("sliding_window_pattern", 4)
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    kinds = said.texts("layer_types") or kinds
    bias = said.flag("attention_bias")
    still = tuple(kind == "full_attention" for kind in kinds)
    return {
        "norm": "layer",
        "block": "one_norm",
        "windows": windows(said, kinds, said.left_out("sliding_window", 4096)),
        "no_rope": cycle(still) if any(still) else (),
        "qkv_bias": bias,
        "o_bias": bias,
        "logit_scale": said.number("logit_scale", 0.0625, float),
    }


def write(c: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        **said_of_rope(c),
        **layer_types(c),
        "attention_bias": c.qkv_bias,
        "logit_scale": c.logit_scale,
    }


_DEFAULTS = {
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "layer_norm_eps": 1e-5,
}  # fmt: skip

FAMILIES = [
    Family(
        "cohere2",
        "Cohere2",
        read,
        write,
        naming(neighbours=True),
        _DEFAULTS,
        {"norm_eps": "layer_norm_eps"},
        scored="none",
    )
]
