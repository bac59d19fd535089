"""Tokenizers from texts, folders and GGUF files: what they read, what they refuse, how they pad,
and ids that the embedding lacks."""

import copy
import json
import re
from dataclasses import replace

import pytest
from tiny_models import sentencepiece
from tokenizers import normalizers

from jaxrlhf.core.errors import InputError
from jaxrlhf.models.tokenizer import check_vocab, gguf_tokenizer, load_tokenizer


def test_load_tokenizer_words_and_chars():
    words, chars = load_tokenizer("words: b a  b\nc"), load_tokenizer("chars:ab a\n+")
    assert words.get_vocab() == {"<pad>": 0, "<eos>": 1, "b": 2, "a": 3, "c": 4}
    assert words("a b<eos>").input_ids == [3, 2, 1]
    assert words.decode([3, 2, 4]) == "a b c"
    assert words.decode([3, 1, 0], skip_special_tokens=True) == "a"
    assert words(["a", "a b c"], padding=True).input_ids == [[0, 0, 3], [3, 2, 4]]
    ids = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, " ": 4, "\n": 5, "+": 6}
    assert chars.get_vocab() == ids
    assert chars("b  a\n+a<eos>").input_ids == [3, 4, 4, 2, 5, 6, 2, 1]
    assert chars.decode([3, 4, 4, 2, 5, 6]) == "b  a\n+"
    assert chars.decode([3, 2, 1, 0], skip_special_tokens=True) == "ba"
    assert chars(["a", "ab"], padding=True).input_ids == [[0, 2], [2, 3]]
    for empty, message in (("words: ", "words:: no words"), ("chars:", "chars:: no characters")):
        with pytest.raises(InputError, match=message):
            load_tokenizer(empty)


def test_load_tokenizer_folder(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.padding_side == "left"


def test_load_tokenizer_pad_falls_back_to_eos(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pad_token": None, "padding_side": "right"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert tokenizer.padding_side == "left"
    path.write_text(json.dumps(config | {"pad_token": None, "eos_token": None}))
    with pytest.raises(InputError, match="neither pad_token nor eos_token"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_runs_no_code_of_the_folder(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    trap = {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": [None, "trap.Trap"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | trap))
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Trap: pass\n")
    assert load_tokenizer(tmp_path)("w0").input_ids == [2]
    assert not (tmp_path / "ran").exists()


def test_load_tokenizer_missing_or_damaged(tmp_path, tiny_tokenizer):
    for path in (tmp_path, tmp_path / "nowhere", "some/hub-name"):
        with pytest.raises(InputError, match=r"no tokenizer\.json"):
            load_tokenizer(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path / "x.gguf")
    tiny_tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    for damaged in ("", text[:200], "{}"):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(InputError, match="tokenizer cannot be read"):
            load_tokenizer(tmp_path)


def test_load_tokenizer_refuses_rules_that_fill_memory(tmp_path, tiny_tokenizer):
    """Each rule doubles a text: 40 of them make 2⁴⁰ characters of one."""
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    rules = {"type": "Sequence", "normalizers": [double] * 9}
    path.write_text(json.dumps(content | {"normalizer": rules}))
    assert load_tokenizer(tmp_path).backend_tokenizer.normalizer.normalize_str("a") == "a" * 2**9
    rules["normalizers"] = [double] * 40
    path.write_text(json.dumps(content | {"normalizer": rules}))
    with pytest.raises(InputError, match=r"read \(its rules make 1e\+12 characters of one"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_refuses_an_id_of_billions(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["w3"] = 2**31 - 1
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="a token has the id 2147483647"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"chat_template": 5}, {"model_max_length": "far"}, {"eos_token": 5}]
)
def test_load_tokenizer_refuses_settings_of_other_types(changes, tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path)


# GGUF

BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


@pytest.fixture
def byte_level(tmp_path, tiny, write_gguf):
    """A file with a byte-level BPE: 256 bytes, two merges, a control and a user-defined token."""

    def make(**changes):
        fields = {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": [*BYTES, "ab", "12", "<end>", "[tool]"],
            "token_type": [1] * 258 + [3, 4],
            "merges": ["a b", "1 2"],
            "eos_token_id": 258,
            **changes,
        }
        fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
        return write_gguf(tmp_path / "x.gguf", tiny, fields)

    return make


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ", "ab", "12", "3", "<end>", "x", "[tool]"]),
        ("smollm", ["ab", "Ġ", "ab", "1", "2", "3", "<end>", "x", "[tool]"]),
        ("llama-bpe", ["ab", "Ġ", "ab", "12", "3", "<end>", "x", "[tool]"]),
        ("qwen2", ["ab", "Ġ", "ab", "1", "2", "3", "<end>", "x", "[tool]"]),
    ],
)
def test_gguf_tokenizer_pieces(byte_level, pre, pieces):
    tokenizer = gguf_tokenizer(byte_level(pre=pre))
    ids = tokenizer("ab ab123<end>x[tool]").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids) == "ab ab123<end>x[tool]"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab123x[tool]"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, None)
    assert tokenizer.model_max_length == 64


def test_gguf_tokenizer_llama3_splits_like_llama_3(byte_level):
    path = byte_level(pre="llama-bpe")
    split = gguf_tokenizer(path).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = [word for word, _ in split("It's 12345 (ok)\n\n  x")]
    assert words == ["It", "'s", "Ġ", "123", "45", "Ġ(", "ok", ")ĊĊ", "Ġ", "Ġx"]


@pytest.mark.parametrize(("pre", "count"), [("gpt-2", 3), ("llama-bpe", 1)])
def test_gguf_tokenizer_llama3_takes_whole_words_first(byte_level, pre, count):
    tokens = [*BYTES, "ab", "12", "xyz", "[tool]"]  # no merges lead to "xyz"
    changes = {"pre": pre, "tokens": tokens, "token_type": [1] * 260, "eos_token_id": 259}
    tokenizer = gguf_tokenizer(byte_level(**changes))
    assert len(tokenizer("xyz").input_ids) == count


def test_gguf_tokenizer_adds_ends(byte_level):
    path = byte_level(bos_token_id=259, add_bos_token=True, add_eos_token=True)
    tokenizer = gguf_tokenizer(path)
    assert tokenizer("ab").input_ids == [259, 256, 258]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [256]


TEXTS = ("hug as us", " good  gas", "[her] é 電\nas", "a</s>gas", "")


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_gguf_tokenizer_of_sentencepiece(kind, tmp_path, tiny, write_gguf):
    """The ids of the tokenizer whose scores the file has; Gemma puts no space before a text."""
    ours = sentencepiece()
    backend = ours.backend_tokenizer
    tokens = [ours.convert_ids_to_tokens(i) for i in range(len(ours))]
    merged = ["".join(x) for x in json.loads(backend.to_str())["model"]["merges"]]
    scores = [-float(merged.index(x)) if x in merged else -1e6 for x in tokens]
    if kind == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        scores = [0.0] * len(tokens)
    fields = {
        "model": "llama", "tokens": tokens, "scores": scores, "eos_token_id": 2,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)], "bos_token_id": 1,
        "unknown_token_id": 0,
    }  # fmt: skip
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    path = write_gguf(tmp_path / "x.gguf", tiny, {"general.architecture": kind, **fields})
    found = gguf_tokenizer(path)
    for text in TEXTS:
        ids = found(text).input_ids
        assert ids == ours(text).input_ids
        assert found.decode(ids) == (f"<s>{text}" if kind == "gemma" else ours.decode(ids))
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert'"),
        ({"model": "llama", "scores": [0.0] * 9}, "tokenizer.ggml.scores has 9 entries for 260"),
        ({"model": "llama", "scores": [1] * 260}, "tokenizer.ggml.scores has 1; all must be num"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre='deepseek-llm'"),
        ({"token_type": [1] * 9}, "token_type has 9 entries for 260 tokens"),
        ({"merges": ["a q q"]}, "tokenizer.ggml.merges"),
        ({"merges": ["a c"]}, "tokenizer.ggml.merges"),
        ({"tokens": 3}, "tokenizer.ggml.tokens=3"),
        ({"eos_token_id": 260}, "tokenizer.ggml.eos_token_id=260"),
        ({"tokens": [0] * 260}, "tokenizer.ggml.tokens has 0; all must be texts"),
        ({"merges": [1]}, "tokenizer.ggml.merges has 1"),
        ({"pre": [1]}, "tokenizer.ggml.pre=[1]"),
    ],
)
def test_gguf_tokenizer_refuses(byte_level, changes, message):
    path = byte_level(**changes)
    with pytest.raises(InputError, match=re.escape(message)):
        gguf_tokenizer(path)


# Ids that the embedding lacks


def test_check_vocab(tiny, tiny_tokenizer):
    check_vocab(tiny_tokenizer, replace(tiny, vocab=42))
    with pytest.raises(InputError, match=r"42 ids.*41 rows"):
        check_vocab(tiny_tokenizer, replace(tiny, vocab=41))
    reads_images = copy.deepcopy(tiny_tokenizer)
    reads_images.add_tokens("<image>", special_tokens=True)  # refused where a text has it
    check_vocab(reads_images, replace(tiny, vocab=42))


def test_check_vocab_counts_the_highest_id(tmp_path, tiny, tiny_tokenizer):
    """A vocabulary with holes has ids above its length."""
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"w39": 41', '"w39": 60'))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 42
    with pytest.raises(InputError, match="61 ids"):
        check_vocab(tokenizer, replace(tiny, vocab=60))
