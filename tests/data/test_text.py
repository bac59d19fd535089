"""Tokens of a rollout back to text: the response alone, whatever the mask leaves out."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from jaxrlhf.data.text import decode_rollout, repeat

EOS, A, B, C, STOP = range(5)


@pytest.fixture
def tokenizer():
    """Words that bring their own space, as byte-level vocabularies do; pad == eos == 0."""
    backend = Tokenizer(WordLevel({"<eos>": 0, " a": 1, " b": 2, " .": 3, "<s>": 4}, "<eos>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", bos_token="<s>"
    )


def test_decode_rollout_reads_the_response_alone(tokenizer):
    token_BT = np.array([[EOS, A, B, C, EOS, EOS], [A, A, B, B, B, B]])
    mask_BT = np.array([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], np.float32)
    texts = decode_rollout(tokenizer, token_BT, mask_BT, ["p", "q"])
    assert texts == [" b .", " b b b b"]


def test_decode_rollout_follows_gaps_in_the_mask(tokenizer):
    token_BT = np.array([[A, B, C, A, B]])
    assert decode_rollout(tokenizer, token_BT, np.array([[0, 1, 0, 0, 1]]), ["p"]) == [" b b"]


def test_decode_rollout_empty_responses(tokenizer):
    token_BT = np.array([[A, EOS, EOS], [A, EOS, EOS], [A, STOP, B]])
    mask_BT = np.array([[0, 1, 0], [0, 0, 0], [0, 1, 1]])
    assert decode_rollout(tokenizer, token_BT, mask_BT, list("pqr")) == ["", "", " b"]


def test_decode_rollout_shapes_that_differ(tokenizer):
    token_BT = np.zeros((2, 3), int)
    with pytest.raises(ValueError, match="1 prompts differ"):
        decode_rollout(tokenizer, token_BT, token_BT, ["p"])
    with pytest.raises(ValueError, match="differ"):
        decode_rollout(tokenizer, token_BT, token_BT[:, :2], ["p", "q"])


def test_repeat_is_prompt_major():
    assert repeat(["a", "b"], 2) == ["a", "a", "b", "b"]
