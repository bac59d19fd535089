"""The chat templates of many families, and those shipped for training: what is trained is exactly
what the template says, or is refused in one line that says what to do.

The table of docs/chat.md is what these tests find.
"""

import json
import re
from pathlib import Path

import pytest
from chats import assistant, byte_tokenizer, user

from jaxrlhf.config import DataConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.chat import ChatSettings, chat_settings, dated
from jaxrlhf.data.formats import read_completions, read_prompts
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows, imitated

FOLDER = Path(__file__).parent / "chat_templates"
PAGE = Path(__file__).parents[2] / "docs" / "chat.md"
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SHIPPED = {
    "qwen3": ["qwen3"],
    "qwq": ["qwq"],
    "deepseek_r1": ["deepseek_r1_distill_qwen", "deepseek_r1_distill_llama"],
    "gpt_oss": ["gpt_oss"],
}
"""Families that each training template stands in for."""
ENDS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<|return|>"]
ENDS += ["<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<|end_of_turn|>"]
DAY = "2026-01-31"

SYSTEM = {"role": "system", "content": "Speak plainly."}
THOUGHT = {"reasoning_content": "It may be dusk."}
NAMED = {"name": "weather", "description": "The weather of a city."}
PLACE = {"type": "string", "description": "Where."}
TOOLS = [
    {
        "type": "function",
        "function": NAMED | {"parameters": {"type": "object", "properties": {"city": PLACE}}},
    }
]


def calling(arguments):
    call = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "call00001", "type": "function"} | {"function": call}],
    }


def called(arguments):
    answer = {"role": "tool", "content": "17 degrees", "tool_call_id": "call00001"}
    return [user("How warm is Rome?"), calling(arguments), answer, assistant("It is mild.")]


ARGUMENTS = {"city": "Rome"}
TWO_TURNS = [user("Why?"), assistant("Because of it."), user("And then?"), assistant("No more.")]
KINDS = {
    "one answer": [user("What is that?"), assistant("A lamp.")],
    "several turns": TWO_TURNS,
    "system prompt": [SYSTEM, user("What is that?"), assistant("A lamp.")],
    "tools": called(ARGUMENTS),
    "thoughts": [user("What is that?"), assistant("A lamp.") | THOUGHT],
}


def template_of(name):
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def tokenizer_of(name):
    text = template_of(name)
    eos = next((end for end in ENDS if end in text and "eos_token" not in text), "</s>")
    return byte_tokenizer(text, eos=eos)


def read(tokenizer, chat, settings, tmp_path, tools=None, train_on="completion"):
    """The rows of one chat, and their tokens."""
    row = {"messages": chat, "tools": tools}
    if train_on == "completion":
        row = {"prompt": chat[:-1], "completion": chat[-1:], "tools": tools}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    rows = read_completions(read_rows(str(path)), tokenizer, chat=settings, train_on=train_on)
    return rows, encode_rows(rows, tokenizer, len(tokenizer), 10**6).items[0]


def outcome(tokenizer, kind, settings, tmp_path):
    """What became of a chat: exact, its last turn alone, or why it was refused.

    What was read is compared with what the template writes.
    """
    several = kind in ("several turns", "tools")
    train_on = "assistant" if several else "completion"
    chat, tools = KINDS[kind], TOOLS if kind == "tools" else None
    try:
        rows, row = read(tokenizer, chat, settings, tmp_path, tools, train_on)
    except InputError as error:
        # Some templates take arguments as text alone.
        if kind == "tools" and "failed (can only concatenate str" in str(error):
            chat = called(json.dumps(ARGUMENTS))
            try:
                rows, row = read(tokenizer, chat, settings, tmp_path, tools, train_on)
            except InputError as other:
                return refusal(other)
        else:
            return refusal(error)
    first = 1 + (kind == "system prompt")
    if rows.note():
        assert "learn the last turn alone" in rows.note()
        first = len(chat) - 1
    template = dated(settings.template or tokenizer.chat_template, DAY)
    options = {"tools": tools, "chat_template": template}
    ids = tokenizer.apply_chat_template(
        chat[:first], add_generation_prompt=True, return_dict=False, **options
    )
    assert row.prompt == ids
    options |= {"preserve_thinking": several}
    whole = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    eos = tokenizer.eos_token
    text = tokenizer.decode(row.prompt + row.answers[0])
    assert whole.startswith(text) or whole.startswith(text.removesuffix(eos))
    learnt = tokenizer.decode([*compress(row)])
    for message in chat[first:]:
        parts = [message.get("content", ""), message.get("reasoning_content", "")]
        wanted = message["role"] == "assistant"
        assert all((part in learnt) == wanted for part in parts if part)
    # Each turn has its end, of whatever kind; GLM-4 writes none.
    for piece in rows.items[0].pieces[::2]:
        assert re.search(r">\s*$", piece) or "[gMASK]" in template
    return "last turn" if rows.note() else "exact"


def compress(row):
    ids = row.prompt + row.answers[0]
    return [token for token, learn in zip(ids, imitated(row), strict=True) if learn]


def refusal(error):
    """An error in a few words; it must be one line which says what to do."""
    message = str(error)
    assert re.search(r"rows.jsonl:1: [^\n]+; [^\n]+$", message)
    if found := re.search(r"jaxrlhf:templates/\w+\.jinja", message):
        return f"→ {found[0].removeprefix('jaxrlhf:')}"
    if found := re.search(r"leaves out (?:the column )?(?:messages\[\d+\]\.)?([a-z_]+)", message):
        return f"refused: drops {found[1]}"
    if found := re.search(r"chat template failed \((.*)\)", message):
        return f"refused: {found[1]}"
    assert "renders the prompt otherwise" in message
    return "refused: prompt changes"


def settings_of(template=""):
    return chat_settings(DataConfig(chat_template=template, date=DAY))


def outcomes(tmp_path):
    """By what stands in the table's first column, the outcomes of each kind."""
    found = {}
    for name in FAMILIES:
        tokenizer = tokenizer_of(name)
        found[name] = [outcome(tokenizer, kind, settings_of(), tmp_path) for kind in KINDS]
    for shipped, families in SHIPPED.items():
        settings = settings_of(f"jaxrlhf:templates/{shipped}.jinja")
        for name in families:
            tokenizer = tokenizer_of(name)
            made = [outcome(tokenizer, kind, settings, tmp_path) for kind in KINDS]
            found[f"{name} with templates/{shipped}.jinja"] = made
    return found


def table(found):
    lines = [["template", *KINDS], ["---"] * (1 + len(KINDS))]
    lines += [[name, *cells] for name, cells in found.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_page_says_what_happens_to_each_template(tmp_path):
    found = outcomes(tmp_path)
    assert len(FAMILIES) >= 30
    made = table(found)
    page = PAGE.read_text(encoding="utf-8")
    assert made in page, f"docs/chat.md: its table should be\n{made}"


@pytest.mark.parametrize(
    ("shipped", "family"), [(name, family) for name, all_ in SHIPPED.items() for family in all_]
)
def test_a_shipped_template_renders_the_familys_prompts(shipped, family):
    """System prompts, several turns, past thoughts, tools, calls and what they answer."""
    settings = settings_of(f"jaxrlhf:templates/{shipped}.jinja")
    string = family.startswith("deepseek")
    call, answer = called(json.dumps(ARGUMENTS) if string else ARGUMENTS)[1:3]
    asked = user("How warm is Rome?")
    past = TWO_TURNS[:3]
    thought = [user("Why?"), assistant("<think>\nHm.\n</think>\n\nBecause."), user("And then?")]
    field = [user("Why?"), assistant("Because.") | THOUGHT, user("And then?")]
    for chat in (
        [asked],
        [SYSTEM, asked],
        past,
        [SYSTEM, *past],
        *([] if family == "gpt_oss" else [thought]),
        field,
        [asked, call, answer],
        [SYSTEM, asked, call, answer, assistant("It is mild."), user("And Oslo?")],
        [asked, call, answer, call, answer],
    ):
        texts = [
            byte_tokenizer(dated(text, DAY)).apply_chat_template(
                chat, tools=tools, tokenize=False, add_generation_prompt=True
            )
            for text in (template_of(family), settings.template)
            for tools in (None, TOOLS)
        ]
        assert texts[:2] == texts[2:]


@pytest.mark.parametrize("shipped", SHIPPED)
def test_a_shipped_template_keeps_what_every_turn_says(shipped, tmp_path):
    """Thoughts, calls and answers; and the marks of {% generation %} say so as its prefixes do."""
    family = SHIPPED[shipped][0]
    settings = settings_of(f"jaxrlhf:templates/{shipped}.jinja")
    turn = assistant("Because.") | {"reasoning_content": "First thought."}
    last = assistant("No more.") | {"reasoning_content": "Second thought."}
    chat = [SYSTEM, user("Why?"), turn, user("And then?"), last]
    tokenizer = tokenizer_of(family)
    _, row = read(tokenizer, chat, settings, tmp_path, train_on="assistant")
    learnt = tokenizer.decode(compress(row))
    for part in ("First thought.", "Because.", "Second thought.", "No more."):
        assert part in learnt
    for part in ("Speak", "Why", "And then", "Assistant｜>", "assistant\n"):
        assert part not in learnt
    assert learnt.count(tokenizer.eos_token) == 2
    unmarked = re.sub(r"\{%- (end)?generation -%\}", "", settings.template)
    bare = ChatSettings(unmarked, date=DAY)
    _, other = read(tokenizer, chat, bare, tmp_path, train_on="assistant")
    assert (other.prompt, other.answers) == (row.prompt, row.answers)
    assert imitated(other).tolist() == imitated(row).tolist()
    # A single answer, after a history that has lost its thoughts.
    _, single = read(tokenizer, chat, settings, tmp_path)
    assert "First thought." not in tokenizer.decode(single.prompt)
    assert "Second thought." in tokenizer.decode(single.answers[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_of_text_are_read_as_the_text_that_they_are(name, tmp_path):
    """As OpenAI's clients write a message; most templates take one text alone."""
    tokenizer = tokenizer_of(name)
    texts = []
    for content in (
        "hi there",
        [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}],
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": [{"role": "user", "content": content}]}))
        (row,) = read_prompts(read_rows(str(path)), tokenizer, chat=ChatSettings(date=DAY)).items
        texts.append(row.text)
    assert "".join(texts[1].split()) == "".join(texts[0].split())
