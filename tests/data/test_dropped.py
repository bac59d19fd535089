"""What a row says and its chat template does not write is refused, or accepted and said; the
columns that a template reads reach it, from either format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import CHAT_TEMPLATE, assistant, user

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.chat import ChatSettings
from jaxrlhf.data.formats import (
    read_completions,
    read_labelled,
    read_pairs,
    read_prompts,
    read_ranked,
    read_scored,
    read_steps,
)
from jaxrlhf.data.rows import read_rows

TOOLED = (
    "{% if tools %}tools : {{ tools | tojson }} <eos>\n{% endif %}"
    "{% for m in messages %}{{ m.role }} : "
    "{% if m.reasoning_content %}<think> {{ m.reasoning_content }} </think> {% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ m.content or '' }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
"""Reads tools, thoughts and calls; the other template, content alone."""
PARTS = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}", "{% for part in m['content'] %}{{ part.text }}{% endfor %}"
)
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OTHER = {
    "type": "function",
    "function": {"name": "time", "parameters": {"properties": {"zone": {"enum": ["a", "b"]}}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'a "b"\n'}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ALLOW = ChatSettings(allow_dropped=True)
ANSWERS = {"chosen": [assistant("b")], "rejected": [assistant("c")]}
SCORED = {"completion": [assistant("b")], "score": 1}
READERS = [
    (read_prompts, {}),
    (read_completions, {"completion": [assistant("b")]}),
    (read_completions, {"completion": [assistant("b"), user("c"), assistant("d")]}),
    (read_labelled, {"completion": [assistant("b")], "label": False}),
    (read_labelled, ANSWERS),
    (read_pairs, ANSWERS),
    (read_ranked, ANSWERS),
    (read_ranked, {"responses": [[assistant("b")], [assistant("c")]], "ranks": [1, 2]}),
    (read_scored, SCORED),
    (read_steps, {"steps": ["b"], "labels": [True]}),
]


def prompt_of(row):
    return getattr(row, "text", None) or row.prompt


@pytest.mark.parametrize("form", [list, json.dumps], ids=["list", "string"])
@pytest.mark.parametrize(("read", "values"), READERS)
def test_tools_reach_the_template(read, values, form, make_tokenizer, jsonl):
    tokenizer = make_tokenizer(TOOLED)
    row = {"prompt": [user("a")], "tools": form([SCHEMA]), **values}
    expected = tokenizer.apply_chat_template(
        [user("a")], tools=[SCHEMA], add_generation_prompt=True, tokenize=False
    )
    for item in read(read_rows(jsonl(row)), tokenizer).items:
        assert prompt_of(item) == expected
        assert item.columns["tools"] == row["tools"]


@pytest.mark.parametrize(("read", "values"), READERS)
def test_tools_that_a_template_does_not_write_are_refused(read, values, chat_tokenizer, jsonl):
    path = jsonl({"prompt": [user("a")], "tools": [SCHEMA], **values})
    with pytest.raises(InputError, match=f"{path}:1: the chat template leaves out the column too"):
        read(read_rows(path), chat_tokenizer)
    rows = read(read_rows(path), chat_tokenizer, chat=ALLOW)
    assert prompt_of(rows.items[0]) == "user : a <eos>\nassistant : "
    first = f"{path}:1: the chat template leaves out the column tools"
    kind = "1 rows of which the chat template leaves something out"
    assert rows.note() == f"{path}: {kind}; first: {first}"


@pytest.mark.parametrize("tools", [None, [], "[]"])
def test_no_tools_are_no_column(tools, chat_tokenizer, jsonl):
    path = jsonl({"prompt": [user("a")], "tools": tools})
    assert not read_prompts(read_rows(path), chat_tokenizer).note()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "should be a list of JSON schemas"),
        (["f"], "should be a list of JSON schemas"),
        (3, "should be a list of JSON schemas"),
    ],
)
def test_tools_that_are_none_are_refused(tools, message, make_tokenizer, jsonl):
    path = jsonl({"prompt": [user("a")], "tools": tools})
    with pytest.raises(InputError, match=f"{path}:1: tools=.*{message}"):
        read_prompts(read_rows(path), make_tokenizer(TOOLED))


def test_calls_without_content_are_rendered_as_the_tokenizer_renders_them(make_tokenizer, jsonl):
    tokenizer = make_tokenizer(TOOLED)
    tool = {"role": "tool", "content": "7"}
    bare = {name: x for name, x in CALLING.items() if name != "content"}
    for calling in (CALLING, bare, CALLING | {"content": ""}):
        chat = [user("a"), calling, tool, assistant("b")]
        (row,) = read_completions(
            read_rows(jsonl({"messages": chat})), tokenizer, train_on="assistant"
        ).items
        assert row.prompt + row.completion == tokenizer.apply_chat_template(chat, tokenize=False)
        assert row.pieces[0].startswith('[{"type": "function"')
        answer = jsonl({"prompt": [user("a")], "completion": [calling]})
        (row,) = read_completions(read_rows(answer), tokenizer).items
        assert row.prompt + row.completion == tokenizer.apply_chat_template(
            chat[:2], tokenize=False
        )


def test_an_empty_system_prompt_and_parts_of_text_are_rendered(make_tokenizer, jsonl):
    chat = [{"role": "system", "content": ""}, user("a")]
    (row,) = read_prompts(read_rows(jsonl({"prompt": chat})), make_tokenizer(CHAT_TEMPLATE)).items
    assert row.text == "system :  <eos>\nuser : a <eos>\nassistant : "
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    path = jsonl({"prompt": [user(parts)]})
    (row,) = read_prompts(read_rows(path), make_tokenizer(PARTS)).items
    assert row.text == "user : a b <eos>\nassistant : "
    # These would write what Python makes of the list, or fail: they get one text.
    for content in ("m['content']", "m['content'].strip()"):
        template = CHAT_TEMPLATE.replace("m['content']", content)
        (row,) = read_prompts(read_rows(path), make_tokenizer(template)).items
        assert row.text == "user : a b <eos>\nassistant : "


def test_arguments_that_a_template_joins_to_text_are_to_be_a_string(make_tokenizer, jsonl):
    joins = TOOLED.replace("m.tool_calls | tojson", "m.tool_calls[0].function.arguments + '!'")
    path = jsonl({"prompt": [user("a"), CALLING, user("b")]})
    with pytest.raises(InputError, match=r"rows.jsonl:1: .* failed .* give them as a JSON string"):
        read_prompts(read_rows(path), make_tokenizer(joins))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "url": "x"}], r"\[0\] is of type 'image'; only parts"),
        ([{"type": "text", "text": " "}], "='' is empty"),
        ([{"type": "text"}], r"\[0\].text=None is null or missing"),
        ([], "='' is empty"),
        ("", "='' is empty"),
        (None, "=None is null or missing"),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_content_that_is_none_is_refused(content, role, message, make_tokenizer, jsonl):
    path = jsonl({"prompt": [{"role": role, "content": content}, user("a")]})
    with pytest.raises(InputError, match=rf"{path}:1: prompt\[0\].content{message}"):
        read_prompts(read_rows(path), make_tokenizer(PARTS))


LOST = [
    (assistant("b") | {"reasoning_content": "hmm, d"}, "reasoning_content='hmm, d'"),
    (assistant("b") | {"thinking": "hmm, d"}, "thinking='hmm, d'"),
    (assistant("b") | {"tool_calls": [CALL]}, r"tool_calls\[0\].name='weather'"),
    (
        assistant("weather") | {"tool_calls": [CALL]},
        r"tool_calls\[0\].arguments='a \"b\"\\n'",
    ),
    (assistant("b") | {"function_call": {"name": "f_g"}}, "function_call.name='f_g'"),
]


@pytest.mark.parametrize(("answer", "what"), LOST)
def test_what_an_answer_loses_is_refused_or_said(answer, what, chat_tokenizer, jsonl):
    """A template that writes content alone."""
    others = {
        "rejected": [assistant("c")],
        "responses": [[answer], [assistant("c")]],
        "ranks": [1, 2],
        "label": True,
        "score": 1,
    }
    compared = {"prompt": [user("a")], "chosen": [answer], **others}
    completion = {"prompt": [user("a")], "completion": [answer], "label": True, "score": 1}
    several = {"messages": [user("a"), answer, user("c"), assistant("d")]}
    for read, row, options in (
        (read_pairs, compared, {}),
        (read_ranked, compared, {}),
        (read_labelled, compared, {}),
        (read_labelled, completion, {}),
        (read_scored, completion, {}),
        (read_completions, completion, {}),
        (read_completions, several, {"train_on": "assistant"}),
    ):
        path = jsonl(row)
        left = f"{path}:1: the chat template leaves out messages\\[1\\].{what}"
        with pytest.raises(InputError, match=f"{left}; take it out .*data.allow_dropped"):
            read(read_rows(path), chat_tokenizer, **options)
        assert (
            "1 rows of which" in read(read_rows(path), chat_tokenizer, chat=ALLOW, **options).note()
        )


def test_what_an_answer_keeps_passes(make_tokenizer, jsonl):
    answer = CALLING | {"reasoning_content": "so\n d", "content": "b"}
    path = jsonl({"prompt": [user("a")], "completion": [answer]})
    rows = read_completions(read_rows(path), make_tokenizer(TOOLED))
    assert "<think> so\n d </think>" in rows.items[0].completion
    assert not rows.note()


def test_what_a_prompt_loses_is_refused_but_for_past_thoughts(make_tokenizer, jsonl):
    silent = CHAT_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages[1:] %}")
    path = jsonl({"prompt": [{"role": "system", "content": "hello"}, user("a")]})
    with pytest.raises(InputError, match=r":1: the chat template leaves out messages\[0\].content"):
        read_prompts(read_rows(path), make_tokenizer(silent))
    past = assistant("<think>hmm</think>b") | {"reasoning_content": "hmm"}
    forgets = CHAT_TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
    path = jsonl({"prompt": [user("a"), past, user("c")]})
    (row,) = read_prompts(read_rows(path), make_tokenizer(forgets)).items
    assert "assistant : b <eos>" in row.text


@pytest.mark.parametrize("train_on", ["completion", "assistant"])
def test_parquet_and_jsonl_render_alike(train_on, make_tokenizer, jsonl, tmp_path):
    """Its structs hold a null for each field that another row has, at every depth."""
    tokenizer = make_tokenizer(TOOLED)
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "a", "n": 1}}}
    rows = [
        {
            "messages": [user("a"), {**CALLING, "tool_calls": [call]}, user("c"), assistant("d")],
            "tools": [schema],
            "truth": truth,
        }
        for call, schema, truth in (
            (CALL, SCHEMA, {"value": {"x": 1}, "list": [None, 1]}),
            (other, OTHER, {"unit": {"y": "m"}}),
        )
    ]
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    made = [
        read_completions(read_rows(source), tokenizer, train_on=train_on).items
        for source in (jsonl(*rows), path)
    ]
    for one, other in zip(*made, strict=True):
        assert (one.prompt, one.completion, one.pieces) == (
            other.prompt,
            other.completion,
            other.pieces,
        )
        assert one.columns == other.columns
    assert made[1][0].columns["truth"] == {"value": {"x": 1}, "list": [None, 1]}


WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}" + CHAT_TEMPLATE.partition("%}")[2]


@pytest.mark.parametrize("said", ["be kind", "yes", "say yes"])
def test_a_message_that_stands_in_another_is_missed_too(said, make_tokenizer, jsonl):
    """The system's words are not in the text because the user's, which hold them, are."""
    chat = [{"role": "system", "content": said}, user("so say yes now")]
    path = jsonl({"prompt": chat})
    with pytest.raises(InputError, match=r"rows.jsonl:1: .* leaves out messages\[0\].content="):
        read_prompts(read_rows(path), make_tokenizer(WITHOUT_SYSTEM))
    twice = jsonl({"prompt": [user("yes"), assistant("say yes"), user("yes")]})
    assert len(read_prompts(read_rows(twice), make_tokenizer(CHAT_TEMPLATE))) == 1
