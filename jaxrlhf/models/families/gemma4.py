"""Gemma 4: full layers have other heads than those with a window, and values a norm of their own.

Scores are not scaled, norms have no offset, and the full layers' rotary frequencies are 0 but for
the first of them. Of a folder of the model that sees and hears, the language model is read alone.
"""

from collections.abc import Mapping
from typing import Any

from jaxrlhf.config.model import DecoderConfig, MoeConfig, RopeScaling
from jaxrlhf.models.families.family import (
    Family,
    Said,
    layer_types,
    naming,
    rope_by_window,
    said_of_rope_by_window,
    windows,
)

ACT = "gelu_pytorch_tanh"
FULL, NEAR = "full_attention", "sliding_attention"


def read(said: Said) -> dict[str, Any]:
    if said.get("hidden_activation", ACT) != ACT:
        raise said.wrong("hidden_activation", said.get("hidden_activation"), f"only {ACT!r}")
    if said.get("use_bidirectional_attention") not in (None, False, "vision"):  # text is causal
        raise said.wrong(
            "use_bidirectional_attention",
            said.get("use_bidirectional_attention"),
            "tokens of a text look back alone",
        )
    layers = said.number("num_hidden_layers")
    kinds = said.texts("layer_types") or [NEAR if (i + 1) % 6 else FULL for i in range(layers)]
    if len(kinds) != layers:
        raise said.wrong("layer_types", f"{len(kinds)} of them", f"num_hidden_layers={layers}")
    kinds = [*kinds[:-1], FULL]  # the last one always, as in transformers
    cap, bias = said.get("final_logit_softcapping"), said.flag("attention_bias")
    return {
        **_rope(said),
        **_full_heads(said, kinds),
        **_smaller(said, kinds),
        **_experts(said),
        "windows": windows(said, kinds, said.get("sliding_window")),
        "logit_softcap": 0.0
        if cap is None
        else said.as_number("final_logit_softcapping", cap, float),
        "embed_multiplier": said.number("hidden_size") ** 0.5,
        "activation": "gelu",
        "norms": "both",
        "qk_norm": True,
        "value_norm": True,
        "attention_scale": 1.0,
        "layer_scale": True,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _smaller(said: Said, kinds: list[str]) -> dict[str, Any]:
    """What E2B and E4B have beside: an embedding for each layer, and keys that are shared."""
    own, shared = (
        said.left_out(name, _DEFAULTS[name]) or 0
        for name in ("hidden_size_per_layer_input", "num_kv_shared_layers")
    )
    found = {}
    if own:
        found["layer_embed"] = said.as_number("hidden_size_per_layer_input", own)
        vocab = said.number("vocab_size_per_layer_input", 262_144)
        if vocab != said.number("vocab_size"):
            raise said.wrong("vocab_size_per_layer_input", vocab, "it must be vocab_size")
    if shared:
        count = said.as_number("num_kv_shared_layers", shared)
        if not set(kinds[-count:]) <= set(kinds[: max(len(kinds) - count, 0)]):
            raise said.wrong("num_kv_shared_layers", count, "none before them is of their type")
        found["shared_kv_layers"] = count
        if said.flag("use_double_wide_mlp"):
            found["shared_mlp"] = 2 * said.number("intermediate_size")
    for name in ("use_double_wide_mlp", "vocab_size_per_layer_input"):
        said.get(name)  # of these alone
    return found


def _experts(said: Said) -> dict[str, Any]:
    """What the mixture has beside: experts, next to an MLP."""
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not said.flag("enable_moe_block"):
        said.asked.update(names)
        return {}
    if said.flag("use_double_wide_mlp"):
        raise said.wrong("use_double_wide_mlp", True, "it is not supported of a mixture")
    count, each, wide = (said.number(name) for name in names)
    if each > count:
        raise said.wrong("top_k_experts", each, f"there are num_experts={count}")
    return {"mlp": wide, "moe": MoeConfig(count, each, True, said.number("intermediate_size"))}


def _rope(said: Said) -> dict[str, Any]:
    """rope_theta and rope_scaling of full layers, window_rope_theta of the others."""
    found = said.table_of("rope_parameters")
    full = (
        found.get(FULL) if found else {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    )
    if not isinstance(full, dict) or full.get("rope_type") != "proportional":
        return rope_by_window(said, 1_000_000.0, 10_000.0)
    plain = {**found, FULL: {"rope_type": "default", **_without(full, "rope_type")}}
    turned = rope_by_window(
        Said(said.path, {**said.table, "rope_parameters": plain}, said.defaults),
        1_000_000.0,
        10_000.0,
    )
    factor, share = (
        said.as_number(name, full.get(name, 1.0), float)
        for name in ("factor", "partial_rotary_factor")
    )
    if share > 1:
        raise said.wrong("partial_rotary_factor", share, "it must be at most 1")
    return {**turned, "rope_scaling": RopeScaling(factor, kind="proportional", share=share)}


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: x for key, x in table.items() if key != name}


def _full_heads(said: Said, kinds: list[str]) -> dict[str, Any]:
    """Heads of full layers: of ``global_head_dim`` and ``num_global_key_value_heads``, or as
    transformers 5 writes them, of each layer in ``per_layer_config``."""
    same = said.flag("attention_k_eq_v")
    usual = {"head_dim": said.number("head_dim"), "num_key_value_heads": None}
    usual["num_key_value_heads"] = said.left_out("num_key_value_heads", 4)
    own = {"head_dim": said.get("global_head_dim"), "num_key_value_heads": None}
    count = said.get("num_global_key_value_heads")
    if same:
        own["num_key_value_heads"] = count
    if each := said.table_of("per_layer_config"):
        own = _alike(said, each, kinds)
    named = {"full_head_dim": "head_dim", "full_kv_heads": "num_key_value_heads"}
    found = {
        ours: said.as_number(theirs, own[theirs])
        for ours, theirs in named.items()
        if own.get(theirs) not in (None, usual[theirs])
    }
    heads = said.number("num_attention_heads")
    if heads % found.get("full_kv_heads", 1):
        raise said.wrong("num_attention_heads", heads, f"{found['full_kv_heads']} do not divide it")
    return {**found, "keys_are_values": same}


def _alike(said: Said, each: Mapping[str, Any], kinds: list[str]) -> Mapping[str, Any]:
    """What ``per_layer_config`` says of full layers."""
    # Numbers of layers, as texts that may begin with zeros.
    given = {key.lstrip("0") or "0": here for key, here in each.items()}
    full = given.get(str(kinds.index(FULL)))
    for i, kind in enumerate(kinds):
        here = given.pop(str(i), None)
        named = isinstance(here, dict) and set(here) <= {"head_dim", "num_key_value_heads"}
        if here != (full if kind == FULL else None) or not (named or here is None):
            raise said.wrong(f"per_layer_config.{i}", here, "only full layers differ, all alike")
    if given:
        key, here = next(iter(given.items()))
        raise said.wrong(f"per_layer_config.{key}", here, "there is no such layer")
    return full or {}


def write(c: DecoderConfig) -> dict[str, Any]:
    turned = said_of_rope_by_window(c)
    scaling = c.rope_scaling
    if scaling is not None and scaling.kind == "proportional":
        said = {"rope_type": "proportional", "partial_rotary_factor": scaling.share}
        said |= {"factor": scaling.factor, "rope_theta": c.rope_theta}
        turned["rope_parameters"][FULL] = said
    return {
        "hidden_activation": ACT,
        **turned,
        **layer_types(c),
        "global_head_dim": c.full_head_dim or c.head_dim,
        "num_global_key_value_heads": c.full_kv_heads or c.kv_heads,
        "attention_k_eq_v": c.keys_are_values,
        "final_logit_softcapping": c.logit_softcap or None,
        "attention_bias": c.qkv_bias,
        "hidden_size_per_layer_input": c.layer_embed,
        "vocab_size_per_layer_input": c.vocab,
        "num_kv_shared_layers": c.shared_kv_layers,
        "use_double_wide_mlp": bool(c.shared_mlp),
        "enable_moe_block": c.moe is not None,
        **_said_of_experts(c),
    }


def _said_of_experts(c: DecoderConfig) -> dict[str, Any]:
    if c.moe is None:
        return {}
    count, wide = {"num_experts": c.moe.experts, "top_k_experts": c.moe.per_token}, c.mlp
    return {**count, "moe_intermediate_size": wide, "intermediate_size": c.moe.beside or wide}


def _beside(within: str) -> dict[str, str]:
    """Names of what lies beside the layers."""
    return {
        "embed/table": f"{within}embed_tokens",
        "each_layer/table": f"{within}embed_tokens_per_layer.weight",
        "each_layer/kernel": f"{within}per_layer_model_projection.weight",
        "each_norm": f"{within}per_layer_projection_norm",
        "norm": f"{within}norm",
    }


_NAMES = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
    "layer_scale": "layer_scalar",
    "own_gate": "per_layer_input_gate",
    "own_out": "per_layer_projection",
    "own_norm": "post_per_layer_input_norm",
    "beside_norm": "post_feedforward_layernorm_1",
    "experts_norm": "pre_feedforward_layernorm_2",
    "experts_out_norm": "post_feedforward_layernorm_2",
    "experts/router": "router.proj",
    "experts/router_scale": "router.scale",
    "experts/expert_scale": "router.per_expert_scale",
    "experts/down/kernel": "experts.down_proj",
    **_beside("model."),
}
_HOW: dict[str, Any] = {
    "fused": {"experts.gate_up_proj": ("experts/gate/kernel", "experts/up/kernel")},
    "experts_as_one": True,
    "experts_out_first": True,
}
_INSIDE = naming(
    {**_NAMES, **_beside("model.language_model.")},
    within="model.language_model.",
    **_HOW,
    left_out=(
        "model.vision_tower.",
        "model.audio_tower.",
        "model.embed_vision.",
        "model.embed_audio.",
    ),
)
_DEFAULTS = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512,
    "max_position_embeddings": 131_072, "sliding_window": 512, "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 0, "enable_moe_block": False,
}  # fmt: skip

FAMILIES = [
    Family("gemma4_text", "Gemma4", read, write, naming(_NAMES, **_HOW), _DEFAULTS, scored="none"),
    Family(
        "gemma4",
        "Gemma4",
        read,
        write,
        _INSIDE,
        _DEFAULTS,
        scored="none",
        language="ForConditionalGeneration",
        inside="text_config",
        written="gemma4_text",
    ),
]
