"""Mixtures of experts: Mixtral, Qwen3 with experts, OLMoE."""

from typing import Any

from jaxrlhf.config.model import DecoderConfig, MoeConfig
from jaxrlhf.models.families.family import Family, Said, naming, one_window, said_of_rope
from jaxrlhf.models.families.qwen import read_qwen3, write_qwen3


def moe_of(said: Said, count: str, normalise: bool) -> MoeConfig:
    """Experts and how many a token takes.

    Args:
      count: what a config.json of the family calls their number.
    """
    # transformers 5 writes either name.
    names = (count, *({"num_experts", "num_local_experts"} - {count}))
    said.asked.update(names)
    written = next((name for name in names if said.table.get(name) is not None), count)
    experts, each = said.number(written), said.number("num_experts_per_tok")
    if each > experts:
        raise said.wrong("num_experts_per_tok", each, f"there are {count}={experts}")
    said.only("router_jitter_noise", 0.0)
    return MoeConfig(experts, each, normalise)


def said_of_moe(c: DecoderConfig, count: str) -> dict[str, Any]:
    """What config.json says of them."""
    assert c.moe is not None
    return {count: c.moe.experts, "num_experts_per_tok": c.moe.per_token}


def read_mixtral(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    return {
        "moe": moe_of(said, "num_local_experts", normalise=True),
        "windows": one_window(said, None),
    }


def write_mixtral(c: DecoderConfig) -> dict[str, Any]:
    window = c.windows[0] if c.windows else None
    rest = {"hidden_act": "silu", **said_of_rope(c), "sliding_window": window}
    return {**rest, **said_of_moe(c, "num_local_experts")}


def read_qwen3_moe(said: Said) -> dict[str, Any]:
    """Every layer is a mixture."""
    said.only("decoder_sparse_step", 1)
    if said.get("mlp_only_layers"):
        raise said.wrong("mlp_only_layers", said.get("mlp_only_layers"), "it must be empty")
    return {
        **read_qwen3(said),
        "moe": moe_of(said, "num_experts", said.flag("norm_topk_prob")),
        "mlp": said.number("moe_intermediate_size"),
    }


def write_qwen3_moe(c: DecoderConfig) -> dict[str, Any]:
    normalised = c.moe is not None and c.moe.normalise
    mixture = {**said_of_moe(c, "num_experts"), "norm_topk_prob": normalised}
    return {**write_qwen3(c), **mixture, "moe_intermediate_size": c.mlp}


def read_olmoe(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    said.only("clip_qkv", None)
    bias = said.flag("attention_bias")
    return {
        "qk_norm_all": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "moe": moe_of(said, "num_experts", said.flag("norm_topk_prob")),
    }


def write_olmoe(c: DecoderConfig) -> dict[str, Any]:
    normalised = c.moe is not None and c.moe.normalise
    mixture = {**said_of_moe(c, "num_experts"), "norm_topk_prob": normalised}
    return {"hidden_act": "silu", **said_of_rope(c), **mixture, "attention_bias": c.qkv_bias}


_MIXTRAL_NAMES = naming(
    {
        "mlp/router": "block_sparse_moe.gate",
        "mlp/gate": "block_sparse_moe.experts.{}.w1",
        "mlp/up": "block_sparse_moe.experts.{}.w3",
        "mlp/down": "block_sparse_moe.experts.{}.w2",
    }
)
_NAMES = naming(
    {
        "mlp/router": "mlp.gate",
        "mlp/gate": "mlp.experts.{}.gate_proj",
        "mlp/up": "mlp.experts.{}.up_proj",
        "mlp/down": "mlp.experts.{}.down_proj",
    }
)
_MIXTRAL = {
    "max_position_embeddings": 131_072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1_000_000.0,
}  # fmt: skip
_QWEN = {
    "max_position_embeddings": 32_768, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
_OLMOE = {
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64,
    "num_experts_per_tok": 8, "intermediate_size": 2048,
}  # fmt: skip

FAMILIES = [
    Family("mixtral", "Mixtral", read_mixtral, write_mixtral, _MIXTRAL_NAMES, _MIXTRAL),
    Family("qwen3_moe", "Qwen3Moe", read_qwen3_moe, write_qwen3_moe, _NAMES, _QWEN),
    Family("olmoe", "Olmoe", read_olmoe, write_olmoe, _NAMES, _OLMOE, scored="none"),
]
