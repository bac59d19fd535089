"""Import and export against transformers and torch, and what damaged folders say."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from jaxrlhf.config import RopeScaling
from jaxrlhf.core.errors import InputError
from jaxrlhf.models.hf import read_hf, write_hf
from jaxrlhf.models.transformer import Model

SHAPE = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 500.0}),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "gemma": GemmaConfig(**SHAPE, head_dim=16),
}
FEATURES = {
    "tied": {},
    "llama3": {
        "tied": False, "rope_theta": 100.0,
        "rope_scaling": RopeScaling(4.0, 1.0, 4.0, original_context=16),
    },
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "tied": False, "head_dim": 16},
    "gemma": {"activation": "gelu", "norm_offset": True, "embed_scale": True, "head_dim": 16},
}  # fmt: skip
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def rows():
    """Random tokens, left-padded by 0, 5 and 30 of 40."""
    token_BT = np.random.default_rng(0).integers(0, 48, (3, 40))
    mask_BT = (np.arange(40) >= np.array([[0], [5], [30]])).astype(np.int32)
    return token_BT, mask_BT


def torch_logits(model, rows):
    token_BT, mask_BT = (torch.tensor(x) for x in rows)
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(token_BT, attention_mask=mask_BT, position_ids=position_BT).logits.numpy()


def our_logits(decoder, params, rows):
    model = Model(decoder=decoder)
    hidden_BTD, _ = model.apply(params, *(jnp.asarray(x) for x in rows))
    return np.asarray(model.logits(params, hidden_BTD))


def assert_agree(ours_BTV, theirs_BTV, rows):
    real = rows[1] != 0
    assert np.abs(theirs_BTV[real]).max() > 1  # not a comparison of zeros
    assert np.abs(ours_BTV - theirs_BTV)[real].max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_read_hf_logits_equal_torch(tmp_path, rows, family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    for weight in model.parameters():  # norms and biases too, which start at 1 and 0
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path)
    decoder, params = read_hf(tmp_path)
    assert_agree(our_logits(decoder, params, rows), torch_logits(model, rows), rows)


@pytest.mark.parametrize("features", FEATURES)
def test_write_hf_is_loaded_by_transformers(
    tmp_path, tiny, random_params, tiny_tokenizer, rows, features
):
    decoder = replace(tiny, **FEATURES[features])
    params = random_params(decoder)
    write_hf(tmp_path / "out", decoder, params, tiny_tokenizer)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert_agree(our_logits(decoder, params, rows), torch_logits(model, rows), rows)


def test_write_hf_tokenizer_and_ids(tmp_path, tiny, random_params, tiny_tokenizer):
    write_hf(tmp_path / "out", tiny, random_params(tiny), tiny_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w3 w1<eos>").input_ids == tiny_tokenizer("w3 w1<eos>").input_ids == [5, 3, 1]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id) == (1, 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == 1
    assert "pad_token_id" not in config  # torch's embedding would not train that row
    # the name of the class that transformers 4 knows too
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_write_hf_reads_back_bit_equal(
    tmp_path, tiny, random_params, tiny_tokenizer, features, shard_bytes
):
    decoder = replace(tiny, **FEATURES[features])
    params = random_params(decoder)
    out = tmp_path / "out"
    write_hf(
        out, decoder, jax.tree.map(jnp.asarray, params), tiny_tokenizer, "float32", shard_bytes
    )
    assert (out / INDEX).exists() == (shard_bytes < 10**9)
    assert (out / WEIGHTS).exists() == (shard_bytes == 10**9)
    read_decoder, read_params = read_hf(out)
    assert read_decoder == decoder
    jax.tree.map(np.testing.assert_array_equal, read_params, params)
    assert {x.dtype for x in jax.tree.leaves(read_params)} == {np.dtype(np.float32)}


def test_write_hf_shards_load_in_transformers(tmp_path, tiny, random_params, tiny_tokenizer):
    params = random_params(tiny)
    write_hf(tmp_path / "out", tiny, params, tiny_tokenizer, shard_bytes=20_000)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    down = params["layers"]["mlp"]["down"]["kernel"][1]
    np.testing.assert_array_equal(state["model.layers.1.mlp.down_proj.weight"].numpy(), down.T)


def test_write_hf_bfloat16(tmp_path, tiny, random_params, tiny_tokenizer):
    params = random_params(tiny)
    write_hf(tmp_path / "out", tiny, params, tiny_tokenizer, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, read_hf(tmp_path / "out")[1], rounded)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_write_hf_refuses_a_folder_in_use(tmp_path, tiny, random_params, tiny_tokenizer):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_hf(tmp_path, tiny, random_params(tiny), tiny_tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_write_hf_appears_whole_or_not_at_all(tmp_path, tiny, random_params):
    class Broken:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_hf(tmp_path / "out", tiny, random_params(tiny), Broken())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path, tiny, random_params, tiny_tokenizer):
    write_hf(tmp_path / "model", tiny, random_params(tiny), tiny_tokenizer)
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, tiny, random_params, tiny_tokenizer):
    write_hf(tmp_path / "model", tiny, random_params(tiny), tiny_tokenizer, shard_bytes=20_000)
    return tmp_path / "model"


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_read_hf_float16_and_old_buffers(folder):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(np.float16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    table = read_hf(folder)[1]["embed"]["table"]
    edit(folder, change)
    np.testing.assert_array_equal(
        read_hf(folder)[1]["embed"]["table"], table.astype(np.float16).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing (1 in all)"),
        (lambda t: t.update(score=np.zeros(3)), "tensor score has no place"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            "model.norm.weight has shape [31], but config.json implies [32]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}),
            "model.norm.weight has dtype I8",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((48, 32), np.float32)}),
            "lm_head.weight differs from the embedding",
        ),
    ],
)
def test_read_hf_wrong_tensors(folder, change, message):
    edit(folder, change)
    with pytest.raises(InputError) as caught:
        read_hf(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_read_hf_truncated(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated or damaged"):
        read_hf(folder)


def test_read_hf_refuses_pickle(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        read_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: pickled weights"):
        read_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"model.norm.weight": "../secret.safetensors"}), "'../secret"),
        (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "'/etc/passwd'"),
        (
            lambda m: m.update({"model.norm.weight": "gone.safetensors"}),
            "gone.safetensors: missing",
        ),
        (lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]}), "is not in"),
        (lambda m: m.update({"model.norm.weight": 3}), "no readable weight_map"),
        (lambda m: m.pop("model.norm.weight"), "model.norm.weight is missing"),
    ],
)
def test_read_hf_wrong_index(sharded, change, message):
    index = json.loads((sharded / INDEX).read_text())
    change(index["weight_map"])
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError) as caught:
        read_hf(sharded)
    assert message in str(caught.value)


def test_read_hf_malformed_index(sharded):
    for text in ("{", "[]", "{}", '{"weight_map": []}'):
        (sharded / INDEX).write_text(text)
        with pytest.raises(InputError, match="no readable weight_map"):
            read_hf(sharded)
