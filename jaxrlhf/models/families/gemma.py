"""Gemma: norms that scale by 1 + their weight, embeddings times √embed, and gelu.

The second generation has caps, norms on both sides, and a window in every other layer; the third
has norms on query and key in place of caps, and frequencies of their own where there is a window.
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

ACT = "gelu_pytorch_tanh"


def read_gemma(said: Said) -> dict[str, Any]:
    for key in ("hidden_act", "hidden_activation"):
        if said.get(key, ACT) not in (ACT, "gelu"):  # of a Gemma they are the same
            raise said.wrong(key, said.get(key), f"a gemma has {ACT!r}")
    return _common(said)


def _common(said: Said) -> dict[str, Any]:
    multiplier = said.number("hidden_size") ** 0.5
    return {"activation": "gelu", "norm_offset": True, "embed_multiplier": multiplier}


def write_gemma(c: DecoderConfig) -> dict[str, Any]:
    return {"hidden_act": ACT, **said_of_rope(c)}


def _read_later(said: Said, full_every: int, caps: dict[str, float]) -> dict[str, Any]:
    """Of the second and third generation; ``caps`` where a config.json says nothing of them."""
    if said.get("hidden_activation", ACT) != ACT:
        raise said.wrong("hidden_activation", said.get("hidden_activation"), f"only {ACT!r}")
    layers = said.number("num_hidden_layers")
    every = said.number("sliding_window_pattern", full_every)
    kinds = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)
    ]

    def cap(name: str) -> float:
        value = said.left_out(_CAPS[name], caps.get(name))
        return 0.0 if value is None else said.as_number(_CAPS[name], value, float)

    return {
        **_common(said),
        **{name: cap(name) for name in _CAPS},
        "norms": "both",
        "attention_scale": said.number("query_pre_attn_scalar", 256, float) ** -0.5,
        "windows": windows(said, said.texts("layer_types") or kinds, said.get("sliding_window")),
    }


_CAPS = {
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}


def _write_later(c: DecoderConfig) -> dict[str, Any]:
    caps = {theirs: getattr(c, ours) or None for ours, theirs in _CAPS.items()}
    scalar = (c.attention_scale or c.head_dim**-0.5) ** -2
    whole = round(scalar)
    scalar = whole if abs(scalar - whole) < 1e-6 * whole else scalar
    found = {"hidden_activation": ACT, "query_pre_attn_scalar": scalar, **caps, **layer_types(c)}
    return {**found, "sliding_window": found["sliding_window"] or 4096}


def read_gemma2(said: Said) -> dict[str, Any]:
    return _read_later(said, 2, {"attention_softcap": 50.0, "logit_softcap": 30.0})


def write_gemma2(c: DecoderConfig) -> dict[str, Any]:
    return {**_write_later(c), **said_of_rope(c)}


def read_gemma3(said: Said) -> dict[str, Any]:
    near = said.number("rope_local_base_freq", 10_000.0, float)
    turned = rope_by_window(said, 1_000_000.0, near)
    return {**_read_later(said, 6, {}), **turned, "qk_norm": True}


def write_gemma3(c: DecoderConfig) -> dict[str, Any]:
    # In the words of transformers 4 too, which knows no rope_parameters.
    older = {**said_of_rope(c), "rope_local_base_freq": c.window_rope_theta or c.rope_theta}
    return {**_write_later(c), **older, **said_of_rope_by_window(c)}


_OF_ALL = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_GEMMA = {**_OF_ALL, "max_position_embeddings": 8192, "num_key_value_heads": 16}
_GEMMA2 = {**_OF_ALL, "max_position_embeddings": 8192, "sliding_window": 4096}
_GEMMA3 = {**_OF_ALL, "max_position_embeddings": 131_072, "sliding_window": 4096}
_NORMS = naming(
    {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
)

FAMILIES = [
    Family("gemma", "Gemma", read_gemma, write_gemma, naming(), _GEMMA),
    Family("gemma2", "Gemma2", read_gemma2, write_gemma2, _NORMS, _GEMMA2),
    Family(
        "gemma3_text",
        "Gemma3",
        read_gemma3,
        write_gemma3,
        _NORMS,
        _GEMMA3,
        scored="Gemma3TextForSequenceClassification",
    ),
]
