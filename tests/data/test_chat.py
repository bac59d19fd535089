"""Which text of a chat is the assistant's; and that training sees no other."""

import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.batches import token_batch
from jaxrlhf.data.chat import cut_turns, render
from jaxrlhf.data.formats import read_completions
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows, imitated
from jaxrlhf.models.tokenizer import load_tokenizer

TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %} <eos>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
"""Drops what the assistant said before, as templates of thinking models drop thoughts."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = [
    {"role": "system", "content": "Be brief."},
    user("What is 2 + 2?"),
    assistant("4"),
    user("And twice that?\n"),
    assistant("8, I think: 2 × 4."),
]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2")


def trained_texts(tokenizer, path, train_on):
    """The stretches of text that have weight, of each row of a file."""
    rows = read_completions(read_rows(path), tokenizer, train_on=train_on)
    encoded = encode_rows(rows, tokenizer, 10**6, 200).items
    batch = token_batch(encoded, 200, 0)
    found = []
    for token_T, weight_T in zip(batch.token_BT, batch.weight_BT, strict=True):
        stretches, last = [], -2
        for at in weight_T.nonzero()[0]:
            if at != last + 1:
                stretches.append([])
            stretches[-1].append(int(token_T[at]))
            last = at
        found.append([tokenizer.decode(ids) for ids in stretches])
    return found


def test_render_takes_one_turn_an_answer(chat_tokenizer):
    with pytest.raises(InputError, match="x:1: the answer has 3 turns, and only one can be comp"):
        render(chat_tokenizer, [user("a")], ([assistant("b"), user("c"), assistant("d")],), "x:1")


def test_cut_turns_by_hand(chat_tokenizer):
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    end, between = " <eos>\n", "user : c <eos>\nassistant : "
    prompt, pieces = cut_turns(chat_tokenizer, chat, 0, "x:1")
    assert prompt == "user : a <eos>\nassistant : "
    assert pieces == ("b" + end, between, "d" + end)
    later, last = cut_turns(chat_tokenizer, chat, 2, "x:1")
    assert later == prompt + "b" + end + between
    assert last == ("d" + end,)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([assistant("a"), user("b"), assistant("c")], "begins with an assistant's turn"),
        ([user("a"), assistant("b"), assistant("c")], "goes on from one to an assistant's turn"),
        ([user("a"), assistant("b"), user("c")], "ends with role 'user'; it must be 'assistant'"),
    ],
)
def test_cut_turns_refuses(chat, message, chat_tokenizer):
    with pytest.raises(InputError, match=f"x:1: the chat {message}"):
        cut_turns(chat_tokenizer, chat, 0, "x:1")


def test_cut_turns_refuses_a_template_that_is_not_stable(make_tokenizer):
    tokenizer = make_tokenizer(FORGETFUL)
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    message = r"x:1: the chat template renders messages\[:2\] otherwise once others follow.*; use"
    with pytest.raises(InputError, match=message):
        cut_turns(tokenizer, chat, 0, "x:1")
    assert cut_turns(tokenizer, chat, 2, "x:1")[1] == ("d <eos>\n",)


def test_read_completions_trains_on_the_assistants_text_alone(smollm2, jsonl):
    """SmolLM2's own template: exactly the answers and their ends of turn, and no header."""
    path = jsonl(
        {"messages": CHAT},
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
        {"prompt": "Two and two is", "completion": " four."},
    )
    answers = ["4<|im_end|>", "8, I think: 2 × 4.<|im_end|>"]
    assert trained_texts(smollm2, path, "assistant") == [answers, answers, [" four.<|im_end|>"]]
    last = [answers[1:], answers, [" four.<|im_end|>"]]
    assert trained_texts(smollm2, path, "completion") == last


def test_read_completions_agrees_with_the_templates_generation_tags(jsonl):
    tokenizer = load_tokenizer("smollm2")
    tokenizer.chat_template = TAGGED
    rows = read_completions(read_rows(jsonl({"messages": CHAT})), tokenizer, train_on="assistant")
    (row,) = encode_rows(rows, tokenizer, 10**6, 200).items
    tagged = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = row.prompt + row.answers[0]
    assert ids == tagged["input_ids"][: len(ids)]
    assert tokenizer.decode(tagged["input_ids"][len(ids) :]) == "\n"
    mask = tagged["assistant_masks"]
    assert imitated(row).astype(int).tolist() == mask[: len(ids)]
    assert sum(mask[len(ids) :]) == 0
