"""Where tokenizers come from, padding, and ids that the embedding lacks."""

import json
from dataclasses import replace

import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.models.tokenizer import check_vocab, load_tokenizer


def test_load_tokenizer_words():
    tokenizer = load_tokenizer("words: b a  b\nc")
    assert tokenizer.get_vocab() == {"<pad>": 0, "<eos>": 1, "b": 2, "a": 3, "c": 4}
    assert tokenizer("a b<eos>").input_ids == [3, 2, 1]
    assert tokenizer.decode([3, 2, 4]) == "a b c"
    assert tokenizer.decode([3, 1, 0], skip_special_tokens=True) == "a"
    assert tokenizer(["a", "a b c"], padding=True).input_ids == [[0, 0, 3], [3, 2, 4]]
    with pytest.raises(InputError, match="no words"):
        load_tokenizer("words: ")


def test_load_tokenizer_chars():
    tokenizer = load_tokenizer("chars:ab a\n+")
    assert tokenizer.get_vocab() == {
        "<pad>": 0,
        "<eos>": 1,
        "a": 2,
        "b": 3,
        " ": 4,
        "\n": 5,
        "+": 6,
    }
    assert tokenizer("b  a\n+a<eos>").input_ids == [3, 4, 4, 2, 5, 6, 2, 1]
    assert tokenizer.decode([3, 4, 4, 2, 5, 6]) == "b  a\n+"
    assert tokenizer.decode([3, 2, 1, 0], skip_special_tokens=True) == "ba"
    assert tokenizer(["a", "ab"], padding=True).input_ids == [[0, 2], [2, 3]]
    with pytest.raises(InputError, match="no characters"):
        load_tokenizer("chars:")


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


def test_check_vocab(tiny, tiny_tokenizer):
    check_vocab(tiny_tokenizer, replace(tiny, vocab=42))
    with pytest.raises(InputError, match=r"42 ids.*41 rows"):
        check_vocab(tiny_tokenizer, replace(tiny, vocab=41))


def test_check_vocab_stop_that_is_never_drawn(tiny, tiny_tokenizer):
    decoder = replace(tiny, vocab=50)
    check_vocab(tiny_tokenizer, decoder, (1, 49))
    with pytest.raises(InputError, match="stop: 50 is none of the model's 50 token ids"):
        check_vocab(tiny_tokenizer, decoder, (1, 50))


def test_check_vocab_counts_the_highest_id(tmp_path, tiny, tiny_tokenizer):
    """A vocabulary with holes has ids above its length."""
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"w39": 41', '"w39": 60'))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 42
    with pytest.raises(InputError, match="61 ids"):
        check_vocab(tokenizer, replace(tiny, vocab=60))
