"""GPT-2, GPT-NeoX (Pythia), StableLM and Starcoder2: layer norms with biases."""

from typing import Any

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.models.families.family import (
    ACTIVATIONS,
    Family,
    Said,
    naming,
    one_window,
    rotary_share,
    said_of_rope,
)
from jaxrlhf.models.names import Naming

_LAYER = {"norm": "layer", "norm_bias": True}
_ALL_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


def _spelled(c: DecoderConfig, *choices: str) -> str:
    """The first of these names that is the decoder's activation."""
    return next(name for name in (*choices, *ACTIVATIONS) if ACTIVATIONS[name] == c.activation)


def read_gpt2(said: Said) -> dict[str, Any]:
    """Learned positions, and no rotary ones."""
    for key, value in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        said.only(key, value)
    return {
        **_LAYER,
        **_ALL_BIASES,
        "positions": "learned",
        "gated": False,
        "activation": said.activation("activation_function", "gelu_new"),
        "mlp": said.number("n_inner", 4 * said.number("n_embd")),
    }


def write_gpt2(c: DecoderConfig) -> dict[str, Any]:
    if c.context > 10**6:
        raise InputError(f"decoder: context={c.context}: learned positions are a table: too long")
    return {"activation_function": _spelled(c, "gelu_new"), "n_inner": c.mlp}


GPT2 = Naming(
    "transformer.h.{}.",
    {
        "embed/table": "transformer.wte",
        "embed/place": "transformer.wpe",
        "attention_norm": "ln_1",
        "attention/o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
        "norm": "transformer.ln_f",
        "unembed": "lm_head",
        "head": "score",
    },
    fused={"attn.c_attn": ("attention/q", "attention/k", "attention/v")},
    transposed=True,
)


def read_neox(said: Said) -> dict[str, Any]:
    """Attention and MLP beside each other, a quarter of a head rotated."""
    bias = said.flag("attention_bias", True)
    return {
        **_LAYER,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
        "gated": False,
        "activation": said.activation("hidden_act", "gelu"),
        "block": "parallel" if said.flag("use_parallel_residual", True) else "serial",
        "rope_theta": said.number("rotary_emb_base", 10_000.0, float),
    }


def write_neox(c: DecoderConfig) -> dict[str, Any]:
    share = rotary_share(c)
    return {
        "hidden_act": _spelled(c, "gelu"),
        **said_of_rope(c),
        "rotary_emb_base": c.rope_theta,
        "rotary_pct": share,
        "use_parallel_residual": c.block == "parallel",
        "attention_bias": c.qkv_bias,
    }


NEOX = Naming(
    "gpt_neox.layers.{}.",
    {
        "embed/table": "gpt_neox.embed_in",
        "attention_norm": "input_layernorm",
        "attention/o": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp/up": "mlp.dense_h_to_4h",
        "mlp/down": "mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "unembed": "embed_out",
        "head": "score",
    },
    fused={"attention.query_key_value": ("attention/q", "attention/k", "attention/v")},
    by_head=True,
)


def read_stablelm(said: Said) -> dict[str, Any]:
    said.only("hidden_act", "silu")
    said.only("qk_layernorm", False)
    return {
        **_LAYER,
        "qkv_bias": said.flag("use_qkv_bias"),
        "block": "one_norm" if said.flag("use_parallel_residual") else "serial",
    }


def write_stablelm(c: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        **said_of_rope(c),
        "partial_rotary_factor": rotary_share(c),
        "use_qkv_bias": c.qkv_bias,
        "use_parallel_residual": c.block == "one_norm",
    }


def read_starcoder2(said: Said) -> dict[str, Any]:
    biases = dict.fromkeys(_ALL_BIASES, said.flag("use_bias", True))
    return {
        **_LAYER,
        **biases,
        "gated": False,
        "activation": said.activation("hidden_act", "gelu_pytorch_tanh"),
        "windows": one_window(said, None),
    }


def write_starcoder2(c: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_act": _spelled(c, "gelu_pytorch_tanh"),
        **said_of_rope(c),
        "use_bias": c.mlp_bias,
        "sliding_window": c.windows[0] if c.windows else None,
    }


_GPT2_FIELDS = {
    "embed": "n_embd", "layers": "n_layer", "heads": "n_head", "kv_heads": "n_head",
    "context": "n_positions", "norm_eps": "layer_norm_epsilon", "mlp": "n_inner",
}  # fmt: skip
_GPT2 = {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
_NEOX = {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25}
_STABLELM = {"max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "num_key_value_heads": 32}
_STABLELM |= {"partial_rotary_factor": 0.25}
_STARCODER = {"max_position_embeddings": 4096, "norm_epsilon": 1e-5, "num_key_value_heads": 2}
_STARCODER |= {"tie_word_embeddings": True}
_EPS = {"norm_eps": "layer_norm_eps"}

FAMILIES = [
    Family(
        "gpt2", "GPT2", read_gpt2, write_gpt2, GPT2, _GPT2, _GPT2_FIELDS, language="LMHeadModel"
    ),
    Family(
        "gpt_neox",
        "GPTNeoX",
        read_neox,
        write_neox,
        NEOX,
        _NEOX,
        {**_EPS, "kv_heads": "num_attention_heads"},
    ),
    Family("stablelm", "StableLm", read_stablelm, write_stablelm, naming(), _STABLELM, _EPS),
    Family(
        "starcoder2",
        "Starcoder2",
        read_starcoder2,
        write_starcoder2,
        naming({"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}),
        _STARCODER,
        {"norm_eps": "norm_epsilon"},
    ),
]
