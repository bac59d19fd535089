"""GLM-4 (0414): norms on both sides, half of a head rotated in neighbouring pairs."""

from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.models.families.family import Family, Said, naming, rotary_share, said_of_rope


def read(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    return {"norms": "both", "qkv_bias": said.flag("attention_bias", True)}


def write(c: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        **said_of_rope(c),
        "partial_rotary_factor": rotary_share(c),
        "attention_bias": c.qkv_bias,
    }


NAMING = naming(
    {
        "attention_out_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_mlp_layernorm",
    },
    fused={"mlp.gate_up_proj": ("mlp/gate", "mlp/up")},
    neighbours=True,
)
_DEFAULTS = {
    "max_position_embeddings": 131_072, "num_key_value_heads": 2, "head_dim": 128,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7,
}  # fmt: skip

FAMILIES = [Family("glm4", "Glm4", read, write, NAMING, _DEFAULTS)]
