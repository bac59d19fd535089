"""Rows of each shape that TRL documents are read as they are, or refused with what to do."""

import pytest
from chats import assistant, user

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import (
    READERS,
    read_completions,
    read_labelled,
    read_pairs,
    read_prompts,
    read_steps,
)
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows

ASKED, GOOD, BAD = [user("a b")], [assistant("good")], [assistant("bad")]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

READ = {
    "text": (read_completions, {"text": "a b good"}, ["a", " b good"]),
    "messages": (read_completions, {"messages": ASKED + GOOD}, None),
    "prompt": (read_prompts, {"prompt": "a b"}, ["a b"]),
    "prompt_chat": (read_prompts, {"prompt": ASKED}, None),
    "completion": (read_completions, {"prompt": "a", "completion": " b"}, ["a", " b"]),
    "completion_chat": (read_completions, {"prompt": ASKED, "completion": GOOD}, None),
    "pair": (
        read_pairs,
        {"prompt": "a", "chosen": " good", "rejected": " bad"},
        ["a", " good", " bad"],
    ),
    "pair_chat": (read_pairs, {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, None),
    "pair_implicit": (
        read_pairs,
        {"chosen": "a b is good", "rejected": "a b is bad"},
        ["a b is", " good", " bad"],
    ),
    "pair_implicit_chat": (
        read_pairs,
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        None,
    ),
    "unpaired": (
        read_labelled,
        {"prompt": "a", "completion": " b", "label": True},
        ["a", " b"],
    ),
    "unpaired_chat": (
        read_labelled,
        {"prompt": ASKED, "completion": GOOD, "label": False},
        None,
    ),
    "stepwise": (
        read_steps,
        {"prompt": "a", "completions": ["b", "c d"], "labels": [True, False]},
        ["a", "b\nc d"],
    ),
}


def texts_of(row):
    names = ("text", "prompt", "completion", "chosen", "rejected", "answer")
    return [getattr(row, name) for name in names if hasattr(row, name)]


@pytest.mark.parametrize("shape", READ)
def test_shape_is_read(shape, chat_tokenizer, jsonl):
    read, row, expected = READ[shape]
    path = jsonl(row)
    rows = read(read_rows(path), chat_tokenizer)
    texts = texts_of(rows.items[0])
    if expected is None:  # as the template writes it
        assert texts[0].endswith("user : a b <eos>\nassistant : ")
        assert all(text.endswith("<eos>\n") for text in texts[1:])
    else:
        assert texts == expected
    if shape != "stepwise":  # white space is no token here
        (encoded,) = encode_rows(rows, chat_tokenizer, 100, 100).items
        assert encoded.prompt
        assert all(encoded.answers)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is great", "The sky is green", "The sky is"),  # not within a word
        ("Q: why?\n\nA: so", "Q: why?\n\nA: no", "Q: why?\n\nA:"),
        ("a b", "a b c", "a"),  # what would be an empty answer has its last word
    ],
)
def test_prompt_of_a_pair_is_the_words_that_it_shares(chosen, rejected, prompt, tokenizer, jsonl):
    rows = read_rows(jsonl({"chosen": chosen, "rejected": rejected}))
    (pair,) = read_pairs(rows, tokenizer).items
    assert pair.prompt == prompt
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)


def test_text_is_learnt_whole_after_a_beginning_of_sequence(make_tokenizer, jsonl):
    tokenizer = make_tokenizer(adds_bos=True, bos_token="<bos>")
    rows = read_completions(read_rows(jsonl({"text": "a b"})), tokenizer)
    (encoded,) = encode_rows(rows, tokenizer, 100, 100).items
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert (encoded.prompt, encoded.answers) == ([bos], ([a, b, eos],))


def test_call_of_a_tool_is_read_by_a_template_that_writes_it(make_tokenizer, jsonl):
    template = (
        "{{ tools }} {% for m in messages %}{{ m.role }} : {{ m.content or m.tool_calls }} <eos>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
    )
    chat = [user("a"), {"role": "assistant", "tool_calls": [CALL]}]
    rows = read_completions(
        read_rows(jsonl({"messages": chat, "tools": TOOLS})), make_tokenizer(template)
    )
    assert "'arguments': {'a': 'b'}" in rows.items[0].completion


PROMPT = "no 'prompt' among its columns"


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "completions",
            {"conversations": [{"from": "human", "value": "a"}]},
            r"turn its conversations into messages: \{from: human, value: x\} is \{role: user",
        ),
        ("completions", {"question": "a", "answer": "b"}, f"{PROMPT}.*; rename question to prompt"),
        ("completions", {"prompt": "a", "response": "b"}, "; rename response to completion"),
        (
            "pairs",
            {"prompt": "a", "completion": " b", "label": True},
            "answers that are labelled one by one are for kto, bco, or pointwise_reward_model",
        ),
        ("pairs", {"messages": ASKED + GOOD}, "messages alone are for sft"),
        ("pairs", {"chosen": "a", "rejected": "b"}, "share no first word; add a prompt"),
        ("completions", {"text": "a"}, "one token, which follows none; drop it"),
        (
            "completions",
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": GOOD},
            "only parts .* can be read: drop the row",
        ),
    ],
)
def test_other_shape_is_refused_with_the_conversion(kind, row, message, chat_tokenizer, jsonl):
    with pytest.raises(InputError, match=message):
        READERS[kind](read_rows(jsonl(row)), chat_tokenizer)


def test_messages_for_prompts_are_refused_with_the_conversion(chat_tokenizer, jsonl):
    message = "give prompt: the messages up to the turn that is to be answered"
    with pytest.raises(InputError, match=message):
        read_prompts(read_rows(jsonl({"messages": ASKED + GOOD})), chat_tokenizer)
