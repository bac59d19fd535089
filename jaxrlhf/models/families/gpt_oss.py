"""gpt-oss: experts with biases, sinks in attention, a window in every other layer.

Its experts are read from MXFP4 (``mxfp4``) or as they are, and written as they are.
"""

from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.models.families.family import (
    LLAMA,
    Family,
    Said,
    layer_types,
    rope,
    said_of_rope,
    windows,
)
from jaxrlhf.models.families.mixtures import moe_of, said_of_moe
from jaxrlhf.models.names import Naming

YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""What transformers takes where a config.json says nothing of scaling."""


def read(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    said.only("swiglu_alpha", 1.702)
    said.only("swiglu_limit", 7.0)
    method = said.table_of("quantization_config").get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise said.wrong("quantization_config", method, "only mxfp4 is read")
    layers = said.number("num_hidden_layers")
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    scaled = said.table_of("rope_scaling") or said.table_of("rope_parameters")
    context, bias = said.number("max_position_embeddings"), said.flag("attention_bias", True)
    return {
        **rope(said, context, None if scaled else YARN, 150_000.0),
        "windows": windows(said, said.texts("layer_types") or kinds, said.get("sliding_window")),
        "moe": moe_of(said, "num_local_experts", normalise=True),
        "activation": "clamped",
        "mlp_bias": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "attention_sinks": True,
    }


def write(c: DecoderConfig) -> dict[str, Any]:
    turned = said_of_rope(c)
    return {
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        **turned,
        "rope_scaling": turned["rope_scaling"] or {"rope_type": "default"},
        **layer_types(c),
        **said_of_moe(c, "num_local_experts"),
        "attention_bias": c.qkv_bias,
    }


NAMING = Naming(
    "model.layers.{}.",
    {
        **LLAMA,
        "attention/sinks": "self_attn.sinks",
        "mlp/router": "mlp.router",
        "mlp/down/kernel": "mlp.experts.down_proj",
        "mlp/down/bias": "mlp.experts.down_proj_bias",
    },
    fused={
        "mlp.experts.gate_up_proj": ("mlp/gate/kernel", "mlp/up/kernel"),
        "mlp.experts.gate_up_proj_bias": ("mlp/gate/bias", "mlp/up/bias"),
    },
    experts_as_one=True,
)
_DEFAULTS = {
    "max_position_embeddings": 131_072, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4,
}  # fmt: skip

FAMILIES = [Family("gpt_oss", "GptOss", read, write, NAMING, _DEFAULTS)]
