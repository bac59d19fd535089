"""Which text of a chat is the assistant's; and that training sees no other."""

from itertools import groupby

import pytest
from chats import CHAT_TEMPLATE, assistant, user

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.batches import token_batch
from jaxrlhf.data.chat import ChatSettings, Writer
from jaxrlhf.data.formats import read_completions, read_prompts
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows, imitated
from jaxrlhf.data.turns import cut_turns, render
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
REWRITING = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}", "{{ '! ' if loop.last and m['role'] == 'assistant' }}{{ m['content'] }}"
)
"""Marks the last turn alone."""

TWO_TURNS = [user("a"), assistant("b"), user("c"), assistant("d")]
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
    return [
        [
            tokenizer.decode(token_T[list(places)])
            for learnt, places in groupby(range(200), lambda at, x=weight_T: x[at] != 0)
            if learnt
        ]
        for token_T, weight_T in zip(batch.token_BT, batch.weight_BT, strict=True)
    ]


@pytest.mark.parametrize(
    ("template", "answers", "message"),
    [
        (CHAT_TEMPLATE, [[assistant("b"), user("c"), assistant("d")]], "the answer has 3 turns"),
        ("{{ messages | length }}a", [[assistant("b")]], "the chat template renders"),
        (None, [], "a chat, and the tokenizer has no chat template"),
        ("{{ raise_exception('no role') }}", [], r"the chat template failed \(no role\)"),
    ],
)  # fmt: skip
def test_render_refuses(template, answers, message, make_tokenizer):
    with pytest.raises(InputError, match=f"x:1: {message}"):
        render(Writer(make_tokenizer(template), "x:1"), [user("a")], answers)


def test_render_plain_text_is_left_as_it_is(chat_tokenizer):
    assert render(Writer(chat_tokenizer, "x:1"), " a\n", (" b ", "c")) == (" a\n", (" b ", "c"))


def test_cut_turns_by_hand(chat_tokenizer):
    end, between = " <eos>\n", "user : c <eos>\nassistant : "
    prompt, pieces = cut_turns(Writer(chat_tokenizer, "x:1"), TWO_TURNS, 0)
    assert prompt == "user : a <eos>\nassistant : "
    assert pieces == ("b" + end, between, "d" + end)
    later, last = cut_turns(Writer(chat_tokenizer, "x:1"), TWO_TURNS, 2)
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
        cut_turns(Writer(chat_tokenizer, "x:1"), chat, 0)


def test_cut_turns_of_a_template_that_is_not_stable_learns_the_last_turn(make_tokenizer, jsonl):
    tokenizer = make_tokenizer(FORGETFUL)
    writer = Writer(tokenizer, "x:1", ChatSettings(allow_dropped=True))
    assert cut_turns(writer, TWO_TURNS, 0)[1] == ("d <eos>\n",)
    (kind,) = (kind for kind in writer.notes if kind.startswith("learn the last"))
    assert writer.notes[kind]["x:1"] == "x:1: 1 earlier of its turns are not"
    # What it drops is not by design: the answer itself, and no thought before it.
    with pytest.raises(
        InputError, match=r"x:1: the chat template leaves out messages\[1\].content"
    ):
        cut_turns(Writer(tokenizer, "x:1"), TWO_TURNS, 0)


def test_cut_turns_says_once_that_past_turns_are_not_learnt(make_tokenizer, jsonl):
    tokenizer = make_tokenizer(REWRITING)
    path = jsonl({"messages": TWO_TURNS}, {"messages": TWO_TURNS[:2]}, {"messages": TWO_TURNS})
    rows = read_completions(read_rows(path), tokenizer, train_on="assistant")
    assert [row.completion for row in rows.items] == ["! d <eos>\n", "! b <eos>\n", "! d <eos>\n"]
    assert [row.pieces for row in rows.items] == [()] * 3
    said = "2 rows learn the last turn alone, as the chat template rewrites past ones"
    assert rows.note() == f"{path}: {said}; first: {path}:1: 1 earlier of its turns are not"


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


ARGUED = CHAT_TEMPLATE + "{{ greeting if enable_thinking else 'bad ' }}"


def test_kwargs_reach_the_template_the_rows_before_the_settings(make_tokenizer, jsonl):
    tokenizer = make_tokenizer(ARGUED)
    settings = ChatSettings(kwargs={"enable_thinking": True, "greeting": "hello "})
    rows = ({"prompt": [user("a")]}, {"prompt": [user("a")], "chat_template_kwargs": {}})
    other = {"prompt": [user("a")], "chat_template_kwargs": {"enable_thinking": False}}
    read = read_prompts(read_rows(jsonl(*rows, other)), tokenizer, chat=settings)
    texts = [row.text.removeprefix("user : a <eos>\nassistant : ") for row in read.items]
    assert texts == ["hello ", "hello ", "bad "]
    assert read_prompts(read_rows(jsonl(rows[0])), tokenizer).items[0].text.endswith("bad ")


def test_kwargs_that_a_template_does_not_have_are_refused(make_tokenizer, jsonl):
    tokenizer, path = make_tokenizer(ARGUED), jsonl({"prompt": [user("a")]})
    settings = ChatSettings(kwargs={"enable_thinkng": True})
    with pytest.raises(InputError, match=f"{path}:1: data.template_kwargs.enable_thinkng: the ch"):
        read_prompts(read_rows(path), tokenizer, chat=settings)
    path = jsonl({"prompt": [user("a")], "chat_template_kwargs": {"greting": 1}})
    with pytest.raises(InputError, match=f"{path}:1: chat_template_kwargs.greting: the chat temp"):
        read_prompts(read_rows(path), tokenizer)
    path = jsonl({"prompt": [user("a")], "chat_template_kwargs": 1})
    with pytest.raises(InputError, match=f"{path}:1: chat_template_kwargs=1: is no object"):
        read_prompts(read_rows(path), tokenizer)


def test_marks_around_a_header_leave_it_out(jsonl):
    """What the sampler is given is not learnt, wherever the template's marks begin."""
    whole = (
        TAGGED.replace("{% generation %}", "")
        .replace(
            "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}",
            "{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n",
        )
        .replace("{% else %}", "{% else %}<|im_start|>{{ m['role'] }}\n")
    )
    made = []
    for template in (TAGGED, whole):
        tokenizer = load_tokenizer("smollm2")
        tokenizer.chat_template = template
        rows = read_completions(
            read_rows(jsonl({"messages": CHAT})), tokenizer, train_on="assistant"
        )
        made.append((rows.items[0].prompt, rows.items[0].pieces))
    assert made[0] == made[1]
    assert made[0][1][0] == "4<|im_end|>"


def test_marks_that_do_not_tell_the_turns_apart_are_refused(make_tokenizer, jsonl):
    tokenizer = make_tokenizer(CHAT_TEMPLATE + "{% generation %}{% endgeneration %}")
    path = jsonl({"messages": TWO_TURNS})
    with pytest.raises(InputError, match=f"{path}:1: the chat template marks 1 stretches with"):
        read_completions(read_rows(path), tokenizer, train_on="assistant")


def test_marks_before_which_the_prompt_changes_are_refused(make_tokenizer, jsonl):
    turn = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    marked = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}", turn + "{% else %}{{ m['content'] }}{% endif %}"
    )
    path = jsonl({"messages": TWO_TURNS})
    rows = read_completions(read_rows(path), make_tokenizer(marked), train_on="assistant")
    assert rows.items[0].pieces == ("b", " <eos>\nuser : c <eos>\nassistant : ", "d")
    other = marked.replace("%}assistant : {", "%}assistant : ! {")
    with pytest.raises(InputError, match=f"{path}:1: the chat template renders the prompt otherw"):
        read_completions(read_rows(path), make_tokenizer(other), train_on="assistant")


def test_marks_in_a_row_are_one(make_tokenizer, jsonl):
    marked = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    marked += "{% generation %} !{% endgeneration %}"
    turn = "{% if m['role'] == 'assistant' %}" + marked + "{% else %}{{ m['content'] }}{% endif %}"
    template = CHAT_TEMPLATE.replace("{{ m['content'] }}", turn)
    rows = read_rows(jsonl({"messages": TWO_TURNS}))
    (row,) = read_completions(rows, make_tokenizer(template), train_on="assistant").items
    assert row.pieces[::2] == ("b !", "d !")
