"""Stop strings: the automaton finds them however they are split over tokens."""

import numpy as np
import pytest
import tiny_models

from jaxrlhf.models.stop_strings import stop_table
from jaxrlhf.models.tokenizer import load_tokenizer, token_bytes

STRINGS = ("\n\n", "good", "ood.", "ки", "🔚", "</answer>")
TOKENIZERS = {name: make() for name, make in tiny_models.KINDS.items()}
TOKENIZERS["special"] = tiny_models.byte_level(("<answer>", "</answer>"))
TOKENIZERS["words"] = load_tokenizer("words:good ood. a bye")
TOKENIZERS["chars"] = load_tokenizer("chars:good. ki\n")


def first_end(table, ids):
    """How many tokens are read until a string is complete; None if none is."""
    state = 0
    for at, token in enumerate(ids):
        state = int(table.next_SC[state, table.class_V[token]])
        if state == len(table.next_SC) - 1:
            return at + 1
    return None


def by_bytes(tokenizer, ids, strings):
    """The same, by searching all that was read after each token."""
    pieces = token_bytes(tokenizer)
    for at in range(len(ids)):
        text = b"".join(pieces[token] for token in ids[: at + 1])
        if any(string.encode() in text for string in strings):
            return at + 1
    return None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_table_finds_what_a_search_finds(name):
    tokenizer = TOKENIZERS[name]
    size = len(tokenizer)
    table = stop_table(tokenizer, STRINGS, size + 3)
    likely = [token for token, text in token_bytes(tokenizer).items() if set(text) & set(b"god.\n")]
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        pool = likely if rng.random() < 0.8 else range(size)
        ids = rng.choice(pool, 12).tolist()
        wanted = by_bytes(tokenizer, ids, STRINGS)
        assert first_end(table, ids) == wanted
        found += wanted is not None
    assert found > 10


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "wordpiece"])
@pytest.mark.parametrize("string", STRINGS)
def test_stop_table_ends_with_the_token_that_completes_a_string(name, string):
    tokenizer = TOKENIZERS[name]
    try:
        ids = tokenizer.encode(f"go {string} on", add_special_tokens=False)
    except Exception:
        pytest.skip("no token for it")
    if string not in tokenizer.decode(ids):
        pytest.skip("not written by these tokens")
    end = first_end(stop_table(tokenizer, [string], len(tokenizer)), ids)
    assert string in tokenizer.decode(ids[:end])
    assert string not in tokenizer.decode(ids[: end - 1])


def test_stop_table_is_small():
    """Almost all tokens do the same, so their kinds are few."""
    tokenizer = load_tokenizer("smollm2")
    table = stop_table(tokenizer, ["</answer>", "\n\nQ:"], 49152)
    assert table.next_SC.shape[0] == 9 + 4 + 2
    assert table.next_SC.shape[1] < 60
    ids = tokenizer.encode("so it is 4</answer> and", add_special_tokens=False)
    assert tokenizer.decode(ids[: first_end(table, ids)]).startswith("so it is 4</answer>")
    assert stop_table(tokenizer, [], 49152) is None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_bytes_write_what_decode_writes(name):
    tokenizer = TOKENIZERS[name]
    rng = np.random.default_rng(1)
    table = token_bytes(tokenizer)
    plain = [token for token in table if token not in tokenizer.added_tokens_decoder]
    compared = 0
    while compared < 50:
        ids = rng.choice(plain, 4).tolist()
        text = b"".join(table[token] for token in ids).decode(errors="replace")
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:  # halves of characters are shown in more than one way
            # A decoder may treat the first token as a word's or text's beginning.
            assert text.removeprefix(" ") == decoded.removeprefix(" ").removeprefix("##")
            compared += 1
