"""Tiny tokenizers: words are tokens, and padding shares its id with end-of-sequence."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import CHAT_TEMPLATE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<eos>", "<bos>", "<unk>", "<stop>"]
WORDS = [*SPECIAL, "user", "assistant", "system", ":", *"abcde", "good", "bad", "hello"]


@pytest.fixture
def make_tokenizer():
    def make(chat_template=None, adds_bos=False, **special):
        vocab = {word: index for index, word in enumerate(WORDS)}
        backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        if adds_bos:
            backend.post_processor = TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", 1)]
            )
        names = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>", **special}
        names = {key: value for key, value in names.items() if value is not None}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=chat_template, **names
        )

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    """No chat template, pad == eos == 0."""
    return make_tokenizer()


@pytest.fixture
def chat_tokenizer(make_tokenizer):
    """A turn is ``role : content <eos>\\n``; pad == eos == 0."""
    return make_tokenizer(CHAT_TEMPLATE)


@pytest.fixture
def jsonl(tmp_path):
    """Write rows (objects, or raw bytes) to a file, one a line; returns its path."""

    def write(*rows):
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write


@pytest.fixture
def parquet(tmp_path):
    """Write rows to a file, null where a row lacks a column of another; returns its path."""

    def write(*rows):
        path = str(tmp_path / "rows.parquet")
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.table({x: [row.get(x) for row in rows] for x in names}), path)
        return path

    return write
