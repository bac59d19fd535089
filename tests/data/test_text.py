"""Tokens back to text: the response alone, its steps where their separator ends in whatever pieces
the tokenizer has it, and all of a row with marks around what is trained on."""

import numpy as np
import pytest
import runs
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from jaxrlhf.core.types import PreferenceBatch, TokenBatch
from jaxrlhf.data.text import (
    decode_rollout,
    mark_step_ends,
    repeat,
    show_batch,
    show_example,
    step_ends,
)
from jaxrlhf.models.tokenizer import load_tokenizer

WORDS = load_tokenizer("words:a b c d")
PAD, EOS, A, B, C, D = range(6)


def arrays(*rows):
    return np.array(rows, np.int32)


@pytest.fixture
def spaced():
    """Words that bring their own space, as byte-level vocabularies do; pad == eos == 0."""
    backend = Tokenizer(WordLevel({"<eos>": 0, " a": 1, " b": 2, " .": 3, "<s>": 4}, "<eos>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", bos_token="<s>"
    )


def test_decode_rollout_reads_the_response_alone(spaced):
    token_BT = np.array([[0, 1, 2, 3, 0, 0], [1, 1, 2, 2, 2, 2]])
    mask_BT = np.array([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], np.float32)
    texts = decode_rollout(spaced, token_BT, mask_BT, ["p", "q"])
    assert texts == [" b .", " b b b b"]


def test_decode_rollout_empty_responses_and_gaps_in_the_mask(spaced):
    token_BT = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [1, 4, 2, 0], [1, 2, 1, 2]])
    mask_BT = np.array([[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]])
    assert decode_rollout(spaced, token_BT, mask_BT, list("pqrs")) == ["", "", " b", " b b"]


def kept(text, ended=True):
    """A response as it is with its special tokens, and without."""
    tokenizer = runs.tags_tokenizer()
    token_BT = np.array([[11, *tokenizer.encode(text, add_special_tokens=False), 0, 0]])
    mask_BT = np.ones(token_BT.shape)
    mask_BT[:, [0, -1, -2]] = 0
    given = tokenizer, token_BT, mask_BT, ["p"]
    (plain,) = decode_rollout(*given)
    (special,) = decode_rollout(*given, ended_B=np.array([ended]))
    return special, plain


def test_decode_rollout_keeps_special_tokens_but_for_the_one_that_stopped_it():
    """A stop token that is a word, or closes what the response has opened, is part of the text."""
    said = "<think> Paris or Rome </think> <answer> Paris </answer>"
    assert kept(f"{said} <eos>") == (said, "Paris or Rome Paris")
    assert kept(said, ended=False)[0] == said
    assert kept(f"{said} <eos>", ended=False)[0] == f"{said} <eos>"
    assert kept("Paris <eos> <eos>")[0] == "Paris <eos>"
    assert kept("<eos>") == ("", "")
    assert kept("Paris or") == ("Paris or", "Paris or")
    assert kept("<answer> Paris </answer>")[0] == "<answer> Paris </answer>"
    assert kept("Paris </answer>")[0] == "Paris"


def test_decode_rollout_shapes_that_differ_and_repeat_of_prompts(spaced):
    token_BT = np.zeros((2, 3), int)
    with pytest.raises(ValueError, match="1 prompts differ"):
        decode_rollout(spaced, token_BT, token_BT, ["p"])
    with pytest.raises(ValueError, match="differ"):
        decode_rollout(spaced, token_BT, token_BT[:, :2], ["p", "q"])

    assert repeat(["a", "b"], 2) == ["a", "a", "b", "b"]


def pieces(*texts):
    """Token i is texts[i], and 0 the special one; what they say is simply joined."""
    backend = Tokenizer(WordLevel({text: i for i, text in enumerate(texts)}, texts[0]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=texts[0])


TOKENIZER = pieces("<eos>", "a", "b", "\n", "\n\n", ".\n", "a\nb")


@pytest.mark.parametrize(
    ("ids", "separator", "ends"),
    [
        ([1, 3, 2, 0], "\n", [1, 3]),  # the last step ends with its stop token
        ([1, 3, 2], "\n", [1, 2]),  # or where it was cut off
        ([1, 3, 2, 3, 0], "\n", [1, 3]),  # nothing after the last separator is no step
        ([1, 3, 3, 2, 0], "\n", [1, 4]),  # nor is nothing between two
        ([3, 1, 0], "\n", [2]),
        ([1, 5, 2, 0], "\n", [1, 3]),  # a separator inside a token
        ([1, 6, 2, 0], "\n", [1, 3]),
        ([1, 4, 2, 0], "\n", [1, 3]),
        ([1, 3, 3, 2, 0], "\n\n", [2, 4]),  # one of two tokens
        ([1, 3, 2, 0], "\n\n", [3]),
        ([1, 2, 1], "b", [1, 2]),
        ([0], "\n", [0]),  # an empty answer is one step
        ([3, 0], "\n", [1]),
    ],
)
def test_step_ends_hand_computed(ids, separator, ends):
    assert step_ends(ids, TOKENIZER, separator) == ends


def test_mark_step_ends_reads_responses_alone():
    token_BT = np.array([[1, 3, 1, 3, 2, 0, 0], [2, 3, 1, 2, 0, 3, 3], [1, 1, 1, 1, 1, 1, 1]])
    mask_BT = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0], [0] * 7])
    wanted = [[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0], [0] * 7]
    np.testing.assert_array_equal(mark_step_ends(token_BT, mask_BT, TOKENIZER, "\n"), wanted)


def test_show_example_marks_what_is_trained_on():
    text = show_example(WORDS, [A, B, C, EOS, D], [0, 0, 0.5, 0.5, 0])
    assert text == "a b⟦ c <eos>⟧ d"
    assert show_example(WORDS, [A, B], [0, 0]) == "a b"
    assert show_example(WORDS, [A, B], [1, 1]) == "⟦a b⟧"
    assert show_example(WORDS, [], []) == ""
    with pytest.raises(ValueError, match="2 tokens and 1 weights"):
        show_example(WORDS, [A, B], [1])


def test_show_example_of_a_chat_and_cut_through_a_character():
    tokenizer = load_tokenizer("smollm2")
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = [tokenizer.encode(text) for text in (head, "Hello, naïve world!<|im_end|>")]
    weights = [0] * len(ids[0]) + [1] * len(ids[1])
    text = show_example(tokenizer, ids[0] + ids[1], weights)
    assert text == head + "⟦Hello, naïve world!<|im_end|>⟧"
    ids = tokenizer.encode("🜁")
    assert len(ids) > 1
    text = show_example(tokenizer, ids, [0] + [1] * (len(ids) - 1))
    assert text.endswith("⟧")
    assert text.count("⟦") == 1


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
