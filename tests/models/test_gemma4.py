"""Gemma 4 as folders have it: both ways to write a config.json, the towers beside the language
model, its adapters, and what ends a turn."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.numpy import load_file, save_file
from test_families import CASES, MASKS, TOKEN, our_logp, theirs, torch_logp
from transformers import AutoConfig, AutoModelForCausalLM, Gemma4VisionConfig

from jaxrlhf.config import DataConfig, DecoderConfig, MeshConfig
from jaxrlhf.config.model import RopeScaling
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.chat import chat_settings
from jaxrlhf.data.formats import read_completions
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.adapters import Adapter, read_adapter, write_adapter
from jaxrlhf.models.ends import read_ends
from jaxrlhf.models.hf import read_hf
from jaxrlhf.models.hf_config import read_config, write_config
from jaxrlhf.models.load import Loader
from jaxrlhf.steps.score import score

DENSE = {
    "model_type": "gemma4_text", "vocab_size": 262_144, "hidden_size": 5376,
    "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16,
    "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 4,
    "intermediate_size": 21_504, "attention_k_eq_v": True, "sliding_window": 1024,
    "final_logit_softcapping": 30.0, "max_position_embeddings": 262_144,
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": False,
    "use_bidirectional_attention": "vision", "tie_word_embeddings": True,
}  # fmt: skip
"""Of the size of the 31B."""
DECODER = DecoderConfig(
    vocab=262_144, embed=5376, layers=60, heads=32, kv_heads=16, head_dim=256, mlp=21_504,
    context=262_144, norm_eps=1e-6, windows=(1024,) * 5 + (0,), full_head_dim=512, full_kv_heads=4,
    keys_are_values=True, value_norm=True, layer_scale=True, qk_norm=True, norms="both",
    activation="gelu", attention_scale=1.0, logit_softcap=30.0, embed_multiplier=5376**0.5,
    rope_theta=1e6, rope_scaling=RopeScaling(kind="proportional", share=0.25),
    window_rope_theta=10_000.0,
)  # fmt: skip


def read(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return read_config(path)


def test_config_of_the_dense_model(tmp_path):
    """As its folder says it, as transformers 5 writes that, and inside the model that sees."""
    assert read(tmp_path, DENSE) == DECODER
    again = AutoConfig.for_model(**DENSE).to_dict()
    assert "per_layer_config" in again
    assert "global_head_dim" not in again
    assert read(tmp_path, json.loads(json.dumps(again, default=str))) == DECODER
    seeing = {"model_type": "gemma4", "text_config": DENSE, "tie_word_embeddings": True}
    found = read(tmp_path, {**seeing, "architectures": ["Gemma4ForConditionalGeneration"]})
    assert (found, found.family) == (DECODER, "gemma4")
    written = write_config(found, "bfloat16")
    assert (written["model_type"], written["architectures"]) == (
        "gemma4_text", ["Gemma4ForCausalLM"],
    )  # fmt: skip
    assert read(tmp_path, written) == DECODER


def test_layers_without_a_type_are_five_with_a_window_and_one_without(tmp_path):
    """And the last one has none; the numbers left out are those of transformers."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size")
    said = {key: DENSE[key] for key in ("model_type", *sizes)}
    found = read(tmp_path, said | {"num_hidden_layers": 8, "hidden_size_per_layer_input": 0})
    theirs = AutoConfig.for_model(**said, num_hidden_layers=8, hidden_size_per_layer_input=0)
    assert found.windows == (512,) * 5 + (0, 512, 0)
    assert [kind == "full_attention" for kind in theirs.layer_types] == [
        not window for window in found.windows
    ]
    assert (found.heads, found.kv_heads) == (8, 4)
    each = [layer.head_dim for layer in theirs.per_layer_config]
    assert each == [256 if window else 512 for window in found.windows]
    assert (found.head_dim, found.full_head_dim) == (256, 512)
    assert (found.full_kv_heads, found.keys_are_values) == (0, False)
    assert (found.rope_scaling, found.context) == (DECODER.rope_scaling, 131_072)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"layer_types": ["full_attention"] * 2}, "'2 of them'; num_hidden_layers=60"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"num_global_key_value_heads": 5}, "num_attention_heads=32; 5 do not divide it"),
        ({"per_layer_config": {"5": {"head_dim": 512}}}, "per_layer_config.11=None; only full"),
        ({"per_layer_config": {"0": {"head_dim": 512}}}, "per_layer_config.0={"),
        ({"per_layer_config": {"5": {"window": 2}}}, "per_layer_config.5={'window': 2}"),
        ({"per_layer_config": {"65": {"head_dim": 2}}}, "per_layer_config.65={'head_dim': 2}; the"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 9}, "it must be vocab_s"),
        ({"num_kv_shared_layers": 58}, "num_kv_shared_layers=58; none before them"),
        ({"num_kv_shared_layers": 60}, "num_kv_shared_layers=60; none before them"),
        ({"enable_moe_block": True}, "num_experts=None"),
        (
            {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 3,
             "moe_intermediate_size": 8},
            "top_k_experts=3; there are num_experts=2",
        ),
        ({"enable_moe_block": True, "use_double_wide_mlp": True}, "use_double_wide_mlp=True"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "proportional",
                                                    "partial_rotary_factor": 1.5}}},
            "partial_rotary_factor=1.5; it must be at most 1",
        ),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "rope_type is not"),
    ],
)  # fmt: skip
def test_config_refuses(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, DENSE | changes)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_config_of_a_model_that_sees_refuses(tmp_path):
    seeing = {"model_type": "gemma4", "text_config": DENSE}
    with pytest.raises(InputError, match="text_config is missing: it describes"):
        read(tmp_path, {"model_type": "gemma4"})
    with pytest.raises(InputError, match="quantization_config="):
        read(tmp_path, seeing | {"quantization_config": {"bits": 4}})
    with pytest.raises(InputError, match=r"config.json: text_config: head_dim='x'"):
        read(tmp_path, seeing | {"text_config": DENSE | {"head_dim": "x"}})
    with pytest.raises(InputError, match="Gemma4ForCausalLM"):
        read(tmp_path, seeing | {"architectures": ["Gemma4ForCausalLM"]})


def test_towers_are_left_out(tmp_path):
    """The language model of a folder with one that sees; another tensor too many is refused."""
    family, own = CASES["gemma4 folder"]
    vision = Gemma4VisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, intermediate_size=16, position_embedding_size=16,
    )  # fmt: skip
    text = AutoConfig.for_model(family, **own, vision_config=None, audio_config=None)
    config = AutoConfig.for_model(
        family, text_config=text.text_config, vision_config=vision, audio_config=None
    )
    whole = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    alone = theirs(family, own)
    whole.model.language_model.load_state_dict(alone.model.language_model.state_dict())
    whole.save_pretrained(tmp_path)
    decoder, params = read_hf(tmp_path)
    expected = torch_logp(alone, MASKS["left"]).detach().numpy()
    params = jax.tree.map(jnp.asarray, params)
    np.testing.assert_allclose(our_logp(decoder, params, MASKS["left"]), expected, atol=1e-4)
    whole.model.extra = torch.nn.Parameter(torch.ones(2))
    whole.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.extra has no place in the model"):
        read_hf(tmp_path)


def test_keys_of_layers_that_share_may_be_in_files(tmp_path):
    """transformers leaves them out when it writes, the first folders have them."""
    theirs(*CASES["gemma4 shared"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    assert not any("layers.8.self_attn.k" in name for name in held)
    extra = {"k_proj": (32, 32), "v_proj": (32, 32), "k_norm": (8,)}
    for name, shape in extra.items():
        held[f"model.layers.8.self_attn.{name}.weight"] = np.ones(shape, np.float32)
    save_file(held, file, {"format": "pt"})
    decoder, _ = read_hf(tmp_path)
    assert (decoder.shared_kv_layers, decoder.shared_mlp, decoder.layer_embed) == (4, 80, 12)
    held["model.layers.8.self_attn.sinks"] = np.ones(4, np.float32)
    save_file(held, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.8\.self_attn\.sinks has no place"):
        read_hf(tmp_path)


SETTINGS = {
    "all": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_dora": True},
    "full layers": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [2, 5]},
}


@pytest.mark.parametrize("case", ["gemma4", "gemma4 folder"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_of_peft_comes_in_and_goes_out(case, settings, tmp_path):
    """Full layers, whose values are their keys, have no adapter of values."""
    peft = pytest.importorskip("peft", reason="the extra test")
    base = str(tmp_path / "base")
    theirs(*CASES[case]).save_pretrained(base)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"),
        peft.LoraConfig(r=3, lora_alpha=6, **SETTINGS[settings]),
    )
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_magnitude" in name:
            weight.data *= 1 + 0.3 * torch.rand_like(weight)
        elif "lora_" in name:
            torch.nn.init.normal_(weight, std=0.4)
    model.save_pretrained(tmp_path / "adapter")
    expected = torch_logp(model.eval(), MASKS["left"]).detach().numpy()
    network = Loader(make_mesh(MeshConfig(), jax.devices()[:1])).trained(str(tmp_path / "adapter"))
    found = np.asarray(_logp(network))
    assert np.abs(found - _logp(replace(network, lora=None))).max() > 0.3
    np.testing.assert_allclose(found, expected, atol=1e-4)

    decoder = network.model.decoder
    read_first = read_adapter(str(tmp_path / "adapter"), decoder)
    (tmp_path / "out").mkdir()
    write_adapter(
        tmp_path / "out", decoder, Adapter(read_first.lora, base, read_first.layers, None),
        np.dtype("float32"),
    )  # fmt: skip
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), tmp_path / "out"
    )
    np.testing.assert_allclose(torch_logp(again, MASKS["left"]).detach(), expected, atol=1e-5)
    jax.tree.map(
        np.testing.assert_array_equal,
        read_adapter(str(tmp_path / "out"), decoder).layers, read_first.layers,
    )  # fmt: skip


def _logp(network):
    mask_BT, model, params = MASKS["left"], network.model, network.params
    logp_BT = score(model, params, jnp.array(TOKEN), jnp.array(mask_BT), lora=network.lora)
    return logp_BT[:, 1:][(mask_BT[:, 1:] * mask_BT[:, :-1]) != 0]


TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ m.content | trim + '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)


def test_what_ends_a_turn(tmp_path):
    """Turns are between <|turn> and <turn|>; the latter ends a response by what generation_config
    says, also of a config.json that says it inside."""
    tokenizer = tiny_models.byte_level(more=("<|turn>", "<turn|>"), template=TURNS)
    eos, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<turn|>"])
    folder = tiny_models.rigged_folder(
        tmp_path / "model", tokenizer, 300, generation={"eos_token_id": [eos, turn]}
    )
    assert read_ends(folder, tokenizer, 300).stop == (eos, turn)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (Path(folder) / "generation_config.json").unlink()
    inside = {"model_type": "gemma4", "text_config": config | {"eos_token_id": turn}}
    path.write_text(json.dumps(inside), encoding="utf-8")
    assert read_ends(folder, tokenizer, 300).stop == (eos, turn)


def test_a_chat_is_trained_up_to_the_end_of_its_turn(tmp_path):
    tokenizer = tiny_models.byte_level(more=("<|turn>", "<turn|>"), template=TURNS)
    chat = {"prompt": [{"role": "user", "content": "go"}]}
    chat |= {"completion": [{"role": "assistant", "content": "hello"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat), encoding="utf-8")
    settings = chat_settings(DataConfig())
    rows = read_completions(read_rows(str(path)), tokenizer, chat=settings)
    row = encode_rows(rows, tokenizer, len(tokenizer), 100).items[0]
    assert tokenizer.decode(row.prompt) == "<bos><|turn>user\ngo<turn|>\n<|turn>model\n"
    assert tokenizer.decode(row.answers[0]).startswith("hello<turn|>")
