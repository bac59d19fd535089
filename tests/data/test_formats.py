import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.chat import render
from jaxrlhf.data.formats import (
    Completion,
    Pair,
    Prompt,
    read_completions,
    read_pairs,
    read_prompts,
    stack_columns,
)
from jaxrlhf.data.rows import read_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def one(read, tokenizer, path):
    (row,) = read(read_rows(path), tokenizer).items
    return row


def test_read_prompts_plain_keeps_other_columns(tokenizer, jsonl):
    path = jsonl({"prompt": "hello ", "answer": 4, "completion": None})
    columns = {"answer": 4, "completion": None}
    assert one(read_prompts, tokenizer, path) == Prompt("hello ", columns, f"{path}:1")


def test_read_prompts_chat_ends_with_the_assistants_header(chat_tokenizer, jsonl):
    path = jsonl({"prompt": [{"role": "system", "content": "b"}, user("a")]})
    text = one(read_prompts, chat_tokenizer, path).text
    assert text == "system : b <eos>\nuser : a <eos>\nassistant : "


def test_read_completions_plain(tokenizer, jsonl):
    path = jsonl({"prompt": "a", "completion": " b", "source": "x"})
    expected = Completion("a", " b", {"source": "x"}, f"{path}:1")
    assert one(read_completions, tokenizer, path) == expected


def test_read_completions_messages_learn_the_last_turn(chat_tokenizer, jsonl):
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    columns = jsonl({"messages": chat, "id": 7})
    row = one(read_completions, chat_tokenizer, columns)
    assert row.prompt == "user : a <eos>\nassistant : b <eos>\nuser : c <eos>\nassistant : "
    assert row.completion == "d <eos>\n"
    assert row.columns == {"id": 7}


def test_read_completions_messages_equal_prompt_and_completion(chat_tokenizer, jsonl):
    first = one(read_completions, chat_tokenizer, jsonl({"messages": [user("a"), assistant("b")]}))
    path = jsonl({"prompt": [user("a")], "completion": [assistant("b")]})
    assert one(read_completions, chat_tokenizer, path) == first


def test_read_pairs_plain_with_margin(tokenizer, jsonl):
    path = jsonl({"prompt": "a", "chosen": " b", "rejected": " c", "margin": 2, "who": "x"})
    expected = Pair("a", " b", " c", 2.0, {"who": "x"}, f"{path}:1")
    assert one(read_pairs, tokenizer, path) == expected


def test_read_pairs_without_margin_is_zero(tokenizer, jsonl):
    path = jsonl({"prompt": "a", "chosen": " b", "rejected": " c"})
    assert one(read_pairs, tokenizer, path).margin == 0.0


def test_read_pairs_parquet_null_is_absent(chat_tokenizer, parquet):
    pair = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    one_turn = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    path = parquet({**pair, "prompt": None}, {**one_turn, "margin": 0.5})
    found = read_pairs(read_rows(path), chat_tokenizer).items
    assert [row.margin for row in found] == [0.0, 0.5]
    assert found[0].prompt == found[1].prompt
    assert (found[0].chosen, found[0].rejected) == (found[1].chosen, found[1].rejected)


def test_read_completions_parquet_null_is_absent(chat_tokenizer, parquet):
    path = parquet(
        {"messages": [user("a"), assistant("b")], "prompt": None, "completion": None},
        {"messages": None, "prompt": [user("a")], "completion": [assistant("b")]},
    )
    first, second = read_completions(read_rows(path), chat_tokenizer).items
    assert (first.prompt, first.completion) == (second.prompt, second.completion)


def test_read_prompts_parquet_null_in_an_arguments_name(tokenizer, parquet):
    path = parquet({"prompt": "a", "completions": None, "answer": None})
    assert one(read_prompts, tokenizer, path).columns == {"answer": None}


def test_read_pairs_implicit_prompt_equals_explicit(chat_tokenizer, jsonl):
    prompt = [user("a"), assistant("b"), user("c")]
    explicit = {"prompt": prompt, "chosen": [assistant("d")], "rejected": [assistant("e")]}
    implicit = {"chosen": [*prompt, assistant("d")], "rejected": [*prompt, assistant("e")]}
    row = one(read_pairs, chat_tokenizer, jsonl(implicit))
    assert row == one(read_pairs, chat_tokenizer, jsonl(explicit))
    assert (row.chosen, row.rejected) == ("d <eos>\n", "e <eos>\n")


def test_read_prompts_parquet_chat_drops_null_fields(chat_tokenizer, tmp_path, monkeypatch):
    """A template that asks whether a message has a name must not see the nulls of the file."""
    names = lambda chat, **options: " ".join(str("name" in message) for message in chat)  # noqa: E731
    monkeypatch.setattr(chat_tokenizer, "apply_chat_template", names)
    path = str(tmp_path / "x.parquet")
    prompt = [{"role": "user", "content": "a", "name": None}, {**user("b"), "name": "n"}]
    pq.write_table(pa.table({"prompt": [prompt]}), path)
    assert one(read_prompts, chat_tokenizer, path).text == "False True"


BAD = [
    (read_prompts, {"text": "a"}, r"no 'prompt' among its columns \(text\)"),
    (read_prompts, {}, r"no 'prompt' among its columns \(none\)"),
    (read_prompts, {"prompt": None}, "prompt=None is null or missing, not text"),
    (read_prompts, {"prompt": 3}, "prompt=3 is int, not text"),
    (read_prompts, {"prompt": {"role": "user"}}, "is dict, not text"),
    (read_prompts, {"prompt": ""}, "prompt='' is empty"),
    (read_prompts, {"prompt": " \n"}, "is empty"),
    (read_prompts, {"prompt": []}, "prompt is an empty list"),
    (read_prompts, {"prompt": ["a"]}, r"prompt\[0\]='a': a message is"),
    (read_prompts, {"prompt": [{"role": "user"}]}, r"prompt\[0\]\.content=None is null or missing"),
    (read_prompts, {"prompt": [user([{"type": "image"}])]}, r"prompt\[0\]\.content=.* is list"),
    (read_prompts, {"prompt": [{"content": "a"}]}, r"prompt\[0\]\.role=None"),
    (read_prompts, {"prompt": [user(" ")]}, r"prompt\[0\]\.content=' ' is empty"),
    (read_prompts, {"prompt": [user("a"), assistant("b")]}, "ends with an assistant's turn"),
    (read_prompts, {"prompt": "a", "completions": "b"}, "column 'completions' is the name of an"),
    (read_completions, {"prompt": "a"}, "no 'completion' among"),
    (read_completions, {"prompt": "a", "completion": ""}, "completion='' is empty"),
    (read_completions, {"prompt": "a", "completion": [assistant("b")]}, "plain text beside a chat"),
    (read_completions, {"prompt": [user("a")], "completion": "b"}, "plain text beside a chat"),
    (read_completions, {"prompt": [user("a")], "completion": [user("b")]}, "begins with role"),
    (read_completions, {"messages": [assistant("a")]}, "give a question and an answer"),
    (read_completions, {"messages": "a"}, "give a question and an answer"),
    (read_completions, {"messages": [assistant("a"), user("b")]}, "ends with an assistant's turn"),
    (read_completions, {"messages": [user("a"), user("b")]}, "begins with role 'user'"),
    (read_pairs, {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen == rejected, 'b'"),
    (read_pairs, {"prompt": "a", "chosen": "b", "rejected": None}, "rejected=None"),
    (read_pairs, {"prompt": "a", "chosen": "b"}, "no 'rejected' among"),
    (read_pairs, {"chosen": "b", "rejected": "c"}, "no 'prompt' among"),
    (
        read_pairs,
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
        "share no first message",
    ),
    (
        read_pairs,
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]},
        "is the start of the other",
    ),
    *(
        (read_pairs, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin}, "margin=")
        for margin in ("1", True, float("nan"), float("-inf"), 10**400, 1e300)
    ),
]


@pytest.mark.parametrize(("read", "values", "message"), BAD)
def test_read_bad_row_names_its_place(chat_tokenizer, jsonl, read, values, message):
    path = jsonl(values)
    with pytest.raises(InputError, match=message) as caught:
        read(read_rows(path), chat_tokenizer)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert "\n" not in str(caught.value)


def test_read_pairs_skips_and_counts(tokenizer, jsonl):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = jsonl({**good, "chosen": "c"}, b"{", good, {"prompt": "a"})
    rows = read_pairs(read_rows(path, True), tokenizer, skip_bad_rows=True)
    assert [row.where for row in rows.items] == [f"{path}:3"]
    assert [line.split(": ")[0] for line in rows.skipped] == [f"{path}:2", f"{path}:1", f"{path}:4"]


def test_read_pairs_template_that_hides_the_difference(make_tokenizer, jsonl):
    template = "{{ messages[0]['content'] }} :{% if messages | length > 1 %} x{% endif %}"
    path = jsonl({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]})
    with pytest.raises(InputError, match="render to one text, ' x'"):
        read_pairs(read_rows(path), make_tokenizer(template))


def test_render_template_that_is_not_prefix_stable(make_tokenizer):
    unstable = make_tokenizer("{{ messages | length }}{% for m in messages %}x{% endfor %}")
    with pytest.raises(InputError, match="x:1: the chat template renders the prompt otherwise"):
        render(unstable, [user("a")], ([assistant("b")],), "x:1")


def test_render_template_missing_or_failing(tokenizer, make_tokenizer):
    with pytest.raises(InputError, match="x:1: a chat, and the tokenizer has no chat template"):
        render(tokenizer, [user("a")], (), "x:1")
    failing = make_tokenizer("{{ raise_exception('no such role') }}")
    with pytest.raises(InputError, match=r"x:1: the chat template failed \(no such role\)"):
        render(failing, [user("a")], (), "x:1")


def test_render_plain_text_is_left_as_it_is(chat_tokenizer):
    assert render(chat_tokenizer, " a\n", (" b ", "c"), "x:1") == (" a\n", (" b ", "c"))


def test_stack_columns_fills_gaps_with_none():
    prompts = [Prompt("a", {"n": 1}, "x:1"), Prompt("b", {"m": 2, "n": 3}, "x:2")]
    assert stack_columns(prompts) == {"n": [1, 3], "m": [None, 2]}
    assert stack_columns([]) == {}
