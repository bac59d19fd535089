"""Phi-3, Phi-4 and Phi-4-mini: q, k, v in one tensor, gate and up in another; longrope."""

from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.models.families.family import (
    Family,
    Said,
    naming,
    one_window,
    rotary_share,
    said_of_rope,
)


def read(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    return {"windows": one_window(said, None)}


def write(c: DecoderConfig) -> dict[str, Any]:
    scaling = c.rope_scaling
    original = scaling.original_context if scaling else c.context
    return {
        "hidden_act": "silu",
        **said_of_rope(c),
        "partial_rotary_factor": rotary_share(c),
        "original_max_position_embeddings": original,
        "sliding_window": c.windows[0] if c.windows else None,
    }


NAMING = naming(
    fused={
        "self_attn.qkv_proj": ("attention/q", "attention/k", "attention/v"),
        "mlp.gate_up_proj": ("mlp/gate", "mlp/up"),
    }
)
_DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}

FAMILIES = [Family("phi3", "Phi3", read, write, NAMING, _DEFAULTS)]
