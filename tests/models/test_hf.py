"""Hugging Face folders of language models and of reward models, read and written, compute what
transformers and torch do; and what damaged folders say."""

import json
import re
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
    AutoModelForSequenceClassification,
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
from jaxrlhf.steps.score import reward

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
ROOT = 32**0.5
FEATURES = {
    "tied": {},
    "llama3": {
        "tied": False, "rope_theta": 100.0,
        "rope_scaling": RopeScaling(4.0, 1.0, 4.0, original_context=16),
    },
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "tied": False, "head_dim": 16},
    "gemma": {"activation": "gelu", "norm_offset": True, "embed_multiplier": ROOT, "head_dim": 16},
}  # fmt: skip
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


AUTO = {False: AutoModelForCausalLM, True: AutoModelForSequenceClassification}
BIAS = 0.75
HEADS = pytest.mark.parametrize("head", [False, True], ids=["logits", "score"])


def rows_of(head):
    """Random tokens, 0, 5 and 30 of 40 padding: on the left for logits; 0, on the right, for a
    score, whose place transformers finds by the padding's id."""
    token_BT = np.random.default_rng(0).integers(int(head), 48, (3, 40))
    padding = np.array([[0], [5], [30]])
    mask_BT = np.arange(40) < 40 - padding if head else np.arange(40) >= padding
    return token_BT * mask_BT if head else token_BT, mask_BT.astype(np.int32)


def by_torch(model, head):
    """Scores [B, 1], or the logits of real tokens [·, V]."""
    token_BT, mask_BT = map(torch.tensor, rows_of(head))
    position_BT = {} if head else {"position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        logits = model(token_BT, attention_mask=mask_BT, **position_BT).logits.numpy()
    return logits if head else logits[mask_BT != 0]


def by_us(decoder, params, head):
    model, (token_BT, mask_BT) = Model(decoder=decoder), map(jnp.asarray, rows_of(head))
    if head:
        return np.asarray(reward(model, params, token_BT, mask_BT))[:, None]
    hidden_BTD, _ = model.apply(params, token_BT, mask_BT)
    return np.asarray(model.logits(params, hidden_BTD))[mask_BT != 0]


def assert_agree(ours, theirs, head):
    assert np.ptp(theirs) > (0.1 if head else 1)  # not a comparison of zeros
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.fixture
def write(tmp_path, tiny, random_params, tiny_tokenizer):
    """Writes a language model, or a reward model with a bias; returns its folder and parameters."""

    def make(decoder=tiny, head=False, name="out", **options):
        params = random_params(decoder)
        if head:
            kernel = np.random.default_rng(1).standard_normal(decoder.embed, np.float32)
            params["head"] = {"kernel": kernel, "bias": np.float32(BIAS)}
        arrays = jax.tree.map(jnp.asarray, params)
        write_hf(tmp_path / name, decoder, arrays, tiny_tokenizer, head=head, **options)
        return tmp_path / name, params

    return make


@HEADS
@pytest.mark.parametrize("family", FAMILIES)
def test_read_hf_computes_as_torch(tmp_path, family, head):
    torch.manual_seed(0)
    config = FAMILIES[family]
    if head:
        config = config.__class__(**config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
    model = AUTO[head].from_config(config).eval()
    for weight in model.parameters():  # norms and biases too, which start at 1 and 0
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path)
    decoder, params = read_hf(tmp_path, head)
    if head:
        assert params["head"]["bias"] == 0
        assert "unembed" not in params
    assert_agree(by_us(decoder, params, head), by_torch(model, head), head)


@HEADS
@pytest.mark.parametrize("features", FEATURES)
def test_write_hf_is_loaded_by_transformers(tiny, write, features, head):
    decoder = replace(tiny, **FEATURES[features])
    out, params = write(decoder, head)
    model, info = AUTO[head].from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert_agree(by_us(decoder, params, head), by_torch(model, head) + BIAS * head, head)


def test_write_hf_tokenizer_and_ids(write, tiny_tokenizer):
    out, _ = write()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("w3 w1<eos>").input_ids == tiny_tokenizer("w3 w1<eos>").input_ids == [5, 3, 1]
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.eos_token_id, generation.pad_token_id) == (1, 0)
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == 1
    assert config["pad_token_id"] is None  # torch's embedding would not train that row
    # the name of the class that transformers 4 knows too
    saved = json.loads((out / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("shard_bytes", "head"), [(10**9, False), (20_000, False), (10**9, True)], ids=str
)
def test_write_hf_reads_back_bit_equal(tiny, write, features, shard_bytes, head):
    decoder = replace(tiny, **FEATURES[features])
    out, params = write(decoder, head, shard_bytes=shard_bytes)
    assert (out / INDEX).exists() == (shard_bytes < 10**9)
    assert (out / WEIGHTS).exists() == (shard_bytes == 10**9)
    read_decoder, read_params = read_hf(out, head)
    if head:  # a reward model has no projection to the vocabulary
        decoder = replace(decoder, tied=True)
        params.pop("unembed", None)
    assert read_decoder == decoder
    jax.tree.map(np.testing.assert_array_equal, read_params, params)
    assert {x.dtype for x in jax.tree.leaves(read_params)} == {np.dtype(np.float32)}


def test_write_hf_shards_load_in_transformers(write):
    out, params = write(shard_bytes=20_000)
    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    down = params["layers"]["mlp"]["down"]["kernel"][1]
    np.testing.assert_array_equal(state["model.layers.1.mlp.down_proj.weight"].numpy(), down.T)


def test_write_hf_bfloat16(write):
    out, params = write(dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, read_hf(out)[1], rounded)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_write_hf_writes_all_or_nothing(tmp_path, tiny, random_params, tiny_tokenizer):
    class Broken:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, folder):
            raise OSError("disk full")

    params = random_params(tiny)
    with pytest.raises(OSError, match="disk full"):
        write_hf(tmp_path / "out", tiny, params, Broken())
    with pytest.raises(InputError, match="head is missing"):
        write_hf(tmp_path / "out", tiny, params, tiny_tokenizer, head=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_hf(tmp_path, tiny, params, tiny_tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# Reward models


def test_write_reward_model_padding_is_not_its_end(write, tiny_tokenizer):
    """transformers looks for the padding's id in front of which a score is read."""
    out, _ = write(head=True)
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 0
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    try:
        out, _ = write(head=True, name="other")
    finally:
        tiny_tokenizer.pad_token = tiny_tokenizer.decode([0])
    assert json.loads((out / "config.json").read_text())["pad_token_id"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "='LlamaForCausalLM'; give a …ForSeq"),
        ({"score_bias": "1"}, "score_bias='1'; it must be a number"),
        ({"score_bias": True}, "score_bias=True; it must be a number"),
        ({"hidden_size": 64, "head_dim": 8}, "implies"),
    ],
)
def test_read_reward_model_refuses(write, change, message):
    out, _ = write(head=True)
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=re.escape(message)):
        read_hf(out, head=True)


def test_read_reward_model_refuses_two_labels(tmp_path):
    config = LlamaConfig(**FAMILIES["llama tied"].to_dict() | {"num_labels": 2})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"score\.weight has shape \[2, 32\].* implies \[1, 32\]"):
        read_hf(tmp_path, head=True)


# Damaged folders


@pytest.fixture
def folder(request, write):
    """A model in one file, or in files of as many bytes as the test asks for."""
    return write(shard_bytes=getattr(request, "param", 10**9))[0]


sharded = pytest.mark.parametrize("folder", [20_000], indirect=True)


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
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", None, "model.norm.weight is missing (1 in all)"),
        ("score", np.zeros(3), "tensor score has no place"),
        (
            "model.norm.weight",
            np.zeros(31, np.float32),
            "model.norm.weight has shape [31], but config.json implies [32]",
        ),
        ("model.norm.weight", np.zeros(32, np.int8), "model.norm.weight has dtype I8"),
        ("lm_head.weight", np.zeros((48, 32), np.float32), "differs from the embedding"),
    ],
)
def test_read_hf_wrong_tensors(folder, name, tensor, message):
    edit(folder, lambda t: t.pop(name) if tensor is None else t.update({name: tensor}))
    with pytest.raises(InputError, match=re.escape(message)):
        read_hf(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_read_hf_truncated(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated or damaged"):
        read_hf(folder)


def test_read_hf_believes_no_size(folder):
    """A header of 2⁶⁰ bytes, and names of a billion layers, are never made room for."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 9_999}))
    with pytest.raises(InputError, match=r"num_hidden_layers=9999, and its files hold \d+ tensors"):
        read_hf(folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + content[8:])
    with pytest.raises(InputError, match=r"model\.safetensors: a header of 11529215046068"):
        read_hf(folder)


def test_read_hf_refuses_pickle(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        read_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: pickled weights"):
        read_hf(folder)


@sharded
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("../secret.safetensors", "'../secret"),
        ("/etc/passwd", "'/etc/passwd'"),
        ("..", "'..' is not a name"),
        ("", "'' is not a name"),
        ("gone.safetensors", "gone.safetensors: missing"),
        ("model.embed_tokens.weight", "is not in"),  # where that is
        (3, "no readable weight_map"),
        (None, "model.norm.weight is missing"),
    ],
)
def test_read_hf_wrong_index(folder, place, message):
    index = json.loads((folder / INDEX).read_text())
    place = index["weight_map"].get(place, place)
    places = index["weight_map"] | {"model.norm.weight": place}
    places = {name: file for name, file in places.items() if file is not None}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": places}))
    with pytest.raises(InputError, match=re.escape(message)):
        read_hf(folder)


@sharded
def test_read_hf_malformed_index(folder):
    for text in ("{", "[]", "{}", '{"weight_map": []}'):
        (folder / INDEX).write_text(text)
        with pytest.raises(InputError, match=r"no readable weight_map|not JSON|not a JSON"):
            read_hf(folder)
