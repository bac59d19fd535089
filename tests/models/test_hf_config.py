"""config.json of both generations of transformers is read as they read it, written so that it reads
back, and refused where the decoder does something else."""

import json

import pytest
from transformers import AutoConfig

from jaxrlhf.config import DecoderConfig, RopeScaling
from jaxrlhf.core.errors import InputError
from jaxrlhf.models.hf_config import read_config, write_config

PLAIN = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=256)


def read(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PLAIN | changes))
    return read_config(path)


def test_read_config_defaults_are_those_of_transformers(tmp_path):
    assert read(tmp_path, num_key_value_heads=None) == DecoderConfig(
        vocab=100, embed=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp=64, context=512,
        rope_theta=10_000.0, norm_eps=1e-6, tied=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("mistral", {}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True}),
        ("gemma", {"activation": "gelu", "norm_offset": True, "embed_multiplier": 32**0.5}),
    ],
)
def test_read_config_families(tmp_path, family, own):
    decoder = read(
        tmp_path, model_type=family, sliding_window=None, head_dim=16, tie_word_embeddings=True,
        num_key_value_heads=2, rms_norm_eps=1e-5, architectures=["AForCausalLM"],
        **({"hidden_act": "gelu"} if family == "gemma" else {}),
    )  # fmt: skip
    assert decoder == DecoderConfig(
        vocab=100, embed=32, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=64, context=512,
        rope_theta=10_000.0, norm_eps=1e-5, tied=True, **own,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_read_config_left_out(tmp_path, family):
    """As transformers itself fills a config.json that says no more than sizes."""
    said = {"vocab_size": 100, "hidden_size": 256, "num_attention_heads": 64}
    said |= {"num_hidden_layers": 2, "intermediate_size": 64}
    theirs = AutoConfig.for_model(family, **said)
    path = tmp_path / "config.json"
    unsaid = {"sliding_window": None, "max_position_embeddings": None}
    path.write_text(json.dumps({"model_type": family, **said, **unsaid}))
    decoder = read_config(path)
    assert decoder.kv_heads == theirs.num_key_value_heads
    assert decoder.head_dim == getattr(theirs, "head_dim", 256 // 64)
    assert decoder.context == theirs.max_position_embeddings
    assert decoder.norm_eps == theirs.rms_norm_eps
    assert decoder.tied == theirs.tie_word_embeddings


def test_read_config_key_heads(tmp_path):
    """Null is as many as there are heads; what is left out may not fit them."""
    decoder = read(tmp_path, model_type="qwen2", num_key_value_heads=None)
    assert decoder.kv_heads == 4
    with pytest.raises(InputError, match=r"heads=4 % num_key_value_heads=32 .* a qwen2's default"):
        read(tmp_path, model_type="qwen2")
    with pytest.raises(
        InputError, match=r"num_attention_heads=4 % num_key_value_heads=3 is not 0$"
    ):
        read(tmp_path, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, SCALING),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}, SCALING),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, SCALING),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000}}, None),
    ],
)
def test_read_config_rope_of_both_generations(tmp_path, rope, scaling):
    decoder = read(tmp_path, **rope)
    assert (decoder.rope_theta, decoder.rope_scaling) == (5e5, scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"model_type": "gemma3", "text_config": {}}, "of models that see, save the language"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "mlp_bias": True}, "mlp_bias=True"),
        ({"mlp_bias": 1}, "mlp_bias=1; it must be true or false"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4; 3 of 8 have no pairs"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"sliding_window": 256}, "sliding_window=256"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types=["),
        ({"model_type": "ministral", "layer_types": ["chunked"]}, "layer_types='chunked'; supp"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers=[1, 2]; it must"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_scaling": {"rope_type": "xpos", "factor": 2.0}}, "rope_type='xpos'"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor=-2.0"),
        ({"rope_scaling": {"type": "longrope", "short_factor": 1}}, "short_factor=1; it must be"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate=1"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": None}}, "factor=None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.4}}, "partial_rotary_factor=0.4"),
        ({"rope_scaling": 2}, "rope_scaling=2"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_attention_heads": 5}, "hidden_size=32 % num_attention_heads=5"),
        ({"intermediate_size": None}, "intermediate_size=None"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"model_type": "gemma4_unified"}, "model_type='gemma4_unified': Gemma 4 with one decoder"),
        ({"model_type": "gemma9"}, "model_type='gemma9'; supported are llama"),
        ({"model_type": "gpt_oss", "swiglu_limit": 5.0}, "swiglu_limit=5.0; it is not supported"),
        ({"model_type": ["llama"]}, "model_type=['llama']"),
        ({"architectures": 5}, "architectures=5"),
        ({"architectures": [5]}, "architectures=[5]"),
        ({"layer_types": {"a": 1}}, "layer_types={'a': 1}"),
        ({"model_type": "ministral", "layer_types": {"a": 1}}, "layer_types={'a': 1}"),
        ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window='wide'"),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers=2000000000; at most 10000"),
        ({"vocab_size": 10**299}, "vocab_size=1000"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rms_norm_eps": 10**299}, "rms_norm_eps=1000"),
        ({"rope_scaling": ["x" * 10**6]}, "rope_scaling=['xxx"),
        ({"torch_dtype": "a\0b"}, "a NUL at character 2"),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act='silu'; a gemma has"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attenti"),
    ],
)
def test_read_config_refuses(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, **{"num_key_value_heads": 4, **changes})
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "not a JSON object")])
def test_read_config_malformed(tmp_path, text, message):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="missing"):
        read_config(path)
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(path)


SHAPE = {"vocab": 9, "layers": 1, "embed": 32, "heads": 4, "mlp": 8}
FEATURES = [
    {"tied": False, "rope_scaling": SCALING},
    {"qkv_bias": True, "rope_theta": 1e6},
    {"qk_norm": True, "head_dim": 16, "norm_eps": 1e-6},
    {"activation": "gelu", "norm_offset": True, "embed_multiplier": 32**0.5},
]


@pytest.mark.parametrize("features", FEATURES)
def test_write_config_reads_back(tmp_path, features):
    decoder = DecoderConfig(**SHAPE | {"kv_heads": 2, "head_dim": 8} | features)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(write_config(decoder, "float32")))
    assert read_config(path) == decoder


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "qk_norm=True: no Hugging Face model of type qwen2"),
        ({"activation": "gelu"}, "activation='gelu': no Hugging Face model of type"),
        (
            {"family": "gemma2", "norms": "both"},
            "norm_offset=False, .*: no Hugging Face model of type gemma2",
        ),
        ({"heads": 5}, "embed=32 % heads=5"),
    ],
)
def test_write_config_refuses_what_transformers_cannot_hold(features, message):
    decoder = DecoderConfig(**SHAPE | {"kv_heads": 1, "head_dim": 8} | features)
    with pytest.raises(InputError, match=message):
        write_config(decoder, "float32")
