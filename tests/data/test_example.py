"""What people are shown of a row: all of its text, and marks around what is trained on."""

import numpy as np
import pytest

from jaxrlhf.core.types import PreferenceBatch, TokenBatch
from jaxrlhf.data.text import show_batch, show_example
from jaxrlhf.models.tokenizer import load_tokenizer

WORDS = load_tokenizer("words:a b c d")
PAD, EOS, A, B, C, D = range(6)


def test_show_example_marks_what_is_trained_on():
    text = show_example(WORDS, [A, B, C, EOS, D], [0, 0, 0.5, 0.5, 0])
    assert text == "a b⟦ c <eos>⟧ d"
    assert show_example(WORDS, [A, B], [0, 0]) == "a b"
    assert show_example(WORDS, [A, B], [1, 1]) == "⟦a b⟧"
    assert show_example(WORDS, [], []) == ""


def test_show_example_of_a_chat():
    tokenizer = load_tokenizer("smollm2")
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = [tokenizer.encode(text) for text in (head, "Hello, naïve world!<|im_end|>")]
    weights = [0] * len(ids[0]) + [1] * len(ids[1])
    text = show_example(tokenizer, ids[0] + ids[1], weights)
    assert text == head + "⟦Hello, naïve world!<|im_end|>⟧"


def test_show_example_cut_through_a_character():
    tokenizer = load_tokenizer("smollm2")
    ids = tokenizer.encode("🜁")
    assert len(ids) > 1
    text = show_example(tokenizer, ids, [0] + [1] * (len(ids) - 1))
    assert text.endswith("⟧")
    assert text.count("⟦") == 1


def test_show_example_lengths_differ():
    with pytest.raises(ValueError, match="2 tokens and 1 weights"):
        show_example(WORDS, [A, B], [1])


def arrays(*rows):
    return np.array(rows, np.int32)


def test_show_batch_rows_and_segments():
    token, mask = arrays([A, B, EOS, C, D, PAD]), arrays([1, 1, 1, 1, 1, 0])
    weight = np.array([[0, 0.5, 0.25, 0, 0.25, 0]], np.float32)
    assert show_batch(WORDS, TokenBatch(token, mask, weight)) == "a⟦ b <eos>⟧ c⟦ d⟧"
    packed = TokenBatch(token, mask, weight, arrays([1, 1, 1, 2, 2, 0]))
    assert show_batch(WORDS, packed) == "a⟦ b <eos>⟧"


def test_show_batch_candidates():
    token = arrays([A, B, EOS], [A, C, PAD])[None]
    real, learnt = arrays([1, 1, 1], [1, 1, 0])[None], arrays([0, 1, 1], [0, 1, 0])[None]
    one = np.ones(1, np.float32)
    batch = PreferenceBatch(token, real, 0 * one, one, learnt)
    assert show_batch(WORDS, batch) == "[1] a⟦ b <eos>⟧\n[2] a⟦ c⟧"
    assert show_batch(WORDS, batch.replace(label_B=0 * one)) == "[false] a⟦ b <eos>⟧"
