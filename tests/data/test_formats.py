"""What each kind of row is read as, from JSONL and Parquet, plain and as a chat; and that whatever
is wrong with a row is said with its place, or skipped and counted."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import CHAT_TEMPLATE, assistant, user

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import (
    Completion,
    Pair,
    Prompt,
    Ranked,
    Stepwise,
    read_completions,
    read_labelled,
    read_pairs,
    read_prompts,
    read_ranked,
    read_scored,
    read_steps,
    stack_columns,
)
from jaxrlhf.data.rows import read_rows

COMPLETION = {"prompt": "a", "completion": "b"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
RANKED = {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1.5, 2]}
STEPS = {"prompt": "a", "steps": ["b c", " d "], "labels": [True, 0.25]}
TRL_STEPS = {"prompt": "a", "completions": ["b c", " d "], "labels": [True, 0.25]}
HEADER = "user : a <eos>\nassistant : "
"""What the chat tokenizer makes of a prompt "a"."""


def read_all(read, tokenizer, path, **options):
    return read(read_rows(path), tokenizer, **options).items


def one(read, tokenizer, path, **options):
    (row,) = read_all(read, tokenizer, path, **options)
    return row


def test_read_prompts_plain_keeps_other_columns(tokenizer, jsonl):
    path = jsonl({"prompt": "hello ", "answer": 4, "completion": None})
    columns = {"answer": 4, "completion": None}
    assert one(read_prompts, tokenizer, path) == Prompt("hello ", columns, f"{path}:1")


def test_read_prompts_chat_ends_with_the_assistants_header(chat_tokenizer, jsonl):
    path = jsonl({"prompt": [{"role": "system", "content": "b"}, user("a")]})
    assert one(read_prompts, chat_tokenizer, path).text == f"system : b <eos>\n{HEADER}"


def test_read_prompts_parquet_chat_drops_null_fields(chat_tokenizer, tmp_path, monkeypatch):
    """A template that asks whether a message has a name must not see the nulls of the file."""
    template = "{% for m in messages %}{{ m.content }}{{ 'name' in m }} {% endfor %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    path = str(tmp_path / "x.parquet")
    prompt = [{**user("a"), "name": None}, {**user("b"), "name": "n"}]
    pq.write_table(pa.table({"prompt": [prompt]}), path)
    assert one(read_prompts, chat_tokenizer, path).text == "aFalse bTrue "


def test_read_completions_plain(tokenizer, jsonl):
    path = jsonl({"prompt": "a", "completion": " b", "source": "x"})
    expected = Completion("a", " b", {"source": "x"}, f"{path}:1")
    assert one(read_completions, tokenizer, path) == expected


def test_read_completions_messages_learn_the_last_turn(chat_tokenizer, jsonl):
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    path = jsonl({"messages": chat, "id": 7})
    prompt = f"{HEADER}b <eos>\nuser : c <eos>\nassistant : "
    expected = Completion(prompt, "d <eos>\n", {"id": 7}, f"{path}:1", chat=True)
    assert one(read_completions, chat_tokenizer, path) == expected


def test_read_labelled_alone_and_out_of_pairs(tokenizer, jsonl):
    alone = {"prompt": "e", "completion": "d", "label": True, "chosen": None, "rejected": None}
    found = read_all(read_labelled, tokenizer, jsonl({**PAIR, "rejected_ended": False}, alone))
    assert [(row.prompt, row.completion) for row in found] == [("a", "b"), ("a", "c"), ("e", "d")]
    assert [row.columns["label"] for row in found] == [True, False, True]
    assert [row.columns.get("ended") for row in found] == [True, False, None]


def test_read_labelled_skips_pairs_whole(tokenizer, jsonl):
    path = jsonl({**PAIR, "rejected": "b"}, {**COMPLETION, "label": False})
    found = read_labelled(read_rows(path), tokenizer, skip_bad_rows=True)
    assert len(found.items) == len(found.skipped) == 1


def test_read_pairs_plain_with_and_without_margin(tokenizer, jsonl):
    path = jsonl({**PAIR, "margin": 2, "who": "x"}, PAIR)
    first = Pair("a", "b", "c", 2.0, {"who": "x"}, f"{path}:1")
    assert read_all(read_pairs, tokenizer, path) == (first, Pair("a", "b", "c", 0, {}, f"{path}:2"))


def test_read_pairs_implicit_prompt_equals_explicit(chat_tokenizer, jsonl):
    prompt = [user("a"), assistant("b"), user("c")]
    explicit = {"prompt": prompt, "chosen": [assistant("d")], "rejected": [assistant("e")]}
    implicit = {"chosen": [*prompt, assistant("d")], "rejected": [*prompt, assistant("e")]}
    row = one(read_pairs, chat_tokenizer, jsonl(implicit))
    assert row == one(read_pairs, chat_tokenizer, jsonl(explicit))
    assert (row.chosen, row.rejected) == ("d <eos>\n", "e <eos>\n")


def test_read_pairs_template_that_hides_the_difference(make_tokenizer, jsonl):
    answers = {name: [assistant("b") | {"name": name}] for name in ("chosen", "rejected")}
    path = jsonl({"prompt": [user("a")], **answers})
    with pytest.raises(InputError, match="render to one text, 'b <eos>"):
        one(read_pairs, make_tokenizer(CHAT_TEMPLATE), path)


def test_read_pairs_skips_and_counts(tokenizer, jsonl):
    path = jsonl({**PAIR, "chosen": "c"}, b"{", PAIR, {"prompt": "a"})
    rows = read_pairs(read_rows(path, True), tokenizer, skip_bad_rows=True)
    assert [row.where for row in rows.items] == [f"{path}:3"]
    assert [line.split(": ")[0] for line in rows.skipped] == [f"{path}:2", f"{path}:1", f"{path}:4"]


def test_read_ranked_plain(tokenizer, jsonl):
    path = jsonl({**RANKED, "ended": [True, False, True], "id": 3})
    wanted = Ranked("a", ("b", "c", "d"), (2, 1, 2), (True, False, True), {"id": 3}, f"{path}:1")
    assert one(read_ranked, tokenizer, path) == wanted


def test_read_ranked_keeps_the_order_of_large_integers(tokenizer, jsonl):
    """Of nanoseconds, say, which float32 (and here float64) cannot tell apart."""
    now = 1_700_000_000_000_000_000
    ranks = [now + 1, now, now + 1], [-0.5, 2**24 + 1, 2**24]
    path = jsonl(*({**RANKED, "ranks": x} for x in ranks))
    assert [row.ranks for row in read_all(read_ranked, tokenizer, path)] == [(2, 1, 2), (1, 3, 2)]


def test_read_ranked_chats(chat_tokenizer, jsonl):
    row = {"prompt": [user("a")], "responses": [[assistant("b")], [assistant("c")]]}
    row = one(read_ranked, chat_tokenizer, jsonl({**row, "ranks": [1, 1]}))
    assert (row.prompt, row.responses) == (HEADER, ("b <eos>\n", "c <eos>\n"))


def test_read_ranked_pair_is_a_ranking_of_two(tokenizer, jsonl):
    row = one(read_ranked, tokenizer, jsonl({**PAIR, "chosen_ended": False, "gap": 2}))
    assert (row.responses, row.ranks, row.ended) == (("b", "c"), (1, 2), (False, True))
    assert row.columns["gap"] == 2


def test_read_scored_number_or_label(tokenizer, jsonl):
    path = jsonl({**COMPLETION, "score": -3}, {**COMPLETION, "score": 0.5})
    found = read_all(read_scored, tokenizer, path)
    assert [x.columns["score"] for x in found] == [-3, 0.5]
    with pytest.raises(InputError, match=r"rows.jsonl:1: score=-3: a probability is in \[0, 1\]"):
        read_all(read_scored, tokenizer, path, binary=True)
    given = {"label": False}, {"score": 0.5}, {"label": True}
    path = jsonl(*({**COMPLETION, **x} for x in given))
    found = read_all(read_scored, tokenizer, path, binary=True)
    assert [x.columns["score"] for x in found] == [0, 0.5, 1]


def test_read_steps_joins_them(tokenizer, chat_tokenizer, jsonl):
    path = jsonl({**STEPS, "id": 1})
    wanted = Stepwise("a", "b c\n d ", "\n", (1, 0.25), {"id": 1}, f"{path}:1")
    assert one(read_steps, tokenizer, path) == wanted
    assert one(read_steps, tokenizer, jsonl({**TRL_STEPS, "id": 1})) == wanted
    row = one(read_steps, chat_tokenizer, jsonl({**STEPS, "prompt": [user("a")]}))
    assert (row.prompt, row.answer) == (HEADER, "b c\n d  <eos>\n")


def test_read_prompts_parquet_null_in_an_arguments_name(tokenizer, parquet):
    path = parquet({"prompt": "a", "completions": None, "answer": None})
    assert one(read_prompts, tokenizer, path).columns == {"answer": None}


EXPLICIT = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
WHOLE = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
MESSAGES = {"messages": [user("a"), assistant("b")]}
TWO = {"prompt": [user("a")], "completion": [assistant("b")]}
CUT = {**PAIR, "chosen_ended": False}
SURE = {"labels": [1.0, 0.25]}


def told(row):
    """All that was read of a row but its place."""
    columns = {name: x for name, x in row.columns.items() if x is not None}
    return {**vars(row), "where": "", "columns": columns}


@pytest.mark.parametrize(
    ("read", "rows", "alike"),
    [
        (read_pairs, (WHOLE, {**EXPLICIT, "margin": 0.5}), "prompt chosen rejected"),
        (read_completions, (MESSAGES, TWO), "prompt completion"),
        (read_ranked, (CUT, RANKED, {**CUT, "rejected_ended": True}), "responses ended"),
        (read_steps, ({**STEPS, **SURE}, {**TRL_STEPS, **SURE}), "answer labels"),
    ],
)
def test_read_parquet_null_is_absent(read, rows, alike, chat_tokenizer, parquet, jsonl):
    """As in JSONL, which has no cells for it; and what is said in two ways is read alike."""
    found = read_all(read, chat_tokenizer, parquet(*rows))
    plain = read_all(read, chat_tokenizer, jsonl(*rows))
    assert list(map(told, found)) == list(map(told, plain))
    for name in alike.split():
        assert getattr(found[0], name) == getattr(found[-1], name)


BAD = [
    (read_prompts, {"text": "a"}, "no 'prompt' among its columns (text)"),
    (read_prompts, {}, "no 'prompt' among its columns (none)"),
    (read_prompts, {"prompt": None}, "prompt=None is null or missing, not text"),
    (read_prompts, {"prompt": 3}, "prompt=3 is int, not text"),
    (read_prompts, {"prompt": {"role": "user"}}, "prompt={'role': 'user'} is dict, not text"),
    (read_prompts, {"prompt": ""}, "prompt='' is empty"),
    (read_prompts, {"prompt": " \n"}, r"prompt=' \n' is empty"),
    (read_prompts, {"prompt": []}, "prompt is an empty list"),
    (read_prompts, {"prompt": ["a"]}, "prompt[0]='a': a message is"),
    (read_prompts, {"prompt": [{"role": "user"}]}, "prompt[0].content=None is null or missing"),
    (read_prompts, {"prompt": [user([1])]}, "prompt[0].content=[1] is list, not text"),
    (read_prompts, {"prompt": [{"content": "a"}]}, "prompt[0].role=None"),
    (read_prompts, {"prompt": [user(" ")]}, "prompt[0].content=' ' is empty"),
    (read_prompts, {"prompt": [user("a"), assistant("b")]}, "the prompt ends with an assistant's"),
    (read_prompts, {"prompt": "a", "completions": "b"}, "column 'completions' is the name of an"),
    (read_completions, {"prompt": "a"}, "no 'completion' among"),
    (read_completions, {"prompt": "a", "completion": ""}, "completion='' is empty"),
    (read_completions, {"prompt": "a", "completion": [assistant("b")]}, "plain text beside a chat"),
    (read_completions, {"prompt": [user("a")], "completion": "b"}, "plain text beside a chat"),
    (read_completions, {"prompt": [user("a")], "completion": [user("b")]}, "the answer begins wit"),
    (read_completions, {"messages": [assistant("a")]}, "messages=[{'role': 'assistant', 'content'"),
    (read_completions, {"messages": "a"}, "messages='a': give a question and an answer"),
    (read_completions, {"messages": [assistant("a"), user("b")]}, "the prompt ends with an assis"),
    (read_completions, {"messages": [user("a"), user("b")]}, "the answer begins with role 'user'"),
    (read_labelled, COMPLETION, "label=None: give true or false"),
    (read_labelled, {**COMPLETION, "label": 1}, "label=1: give true or false"),
    (read_labelled, {**COMPLETION, "label": "yes"}, "label='yes': give true or false"),
    (read_pairs, {**PAIR, "rejected": "b"}, "chosen == rejected, 'b'"),
    (read_pairs, {**PAIR, "rejected": None}, "rejected=None"),
    (read_pairs, {"prompt": "a", "chosen": "b"}, "no 'rejected' among"),
    (read_pairs, {"chosen": "b", "rejected": "c"}, "chosen and rejected share no first word"),
    (read_pairs, {**WHOLE, "rejected": [user("c"), assistant("b")]}, "chosen and rejected share "),
    (read_pairs, {**WHOLE, "rejected": [user("a")]}, "one of chosen and rejected is the start of"),
    *(
        (read_pairs, {**PAIR, "margin": margin}, "margin=")
        for margin in ("1", True, float("nan"), float("-inf"), 1e300)
    ),
    (read_ranked, {**RANKED, "responses": "b"}, "responses='b' is str, not a list"),
    (read_ranked, {"prompt": "a"}, "no 'responses' among its columns"),
    (read_ranked, {**RANKED, "responses": ["b"]}, "responses: 1 of them; a ranking has at least"),
    (read_ranked, {**RANKED, "responses": ["b", "", "c"]}, "responses[1]='' is empty"),
    (read_ranked, {**RANKED, "responses": ["b", 3, "c"]}, "responses[1]=3 is int, not text"),
    (read_ranked, {**RANKED, "responses": ["b", "c", "b"]}, "responses[0] == responses[2], 'b'"),
    (read_ranked, {**RANKED, "ranks": [1, 2]}, "2 ranks for 3 responses; give one for each"),
    (read_ranked, {**RANKED, "ranks": [1, 2, "3"]}, "ranks[2]='3': give a finite number"),
    (read_ranked, {**RANKED, "ranks": [1, True, 2]}, "ranks[1]=True: give a finite number"),
    (read_ranked, {**RANKED, "ranks": [1, float("nan"), 2]}, "ranks[1]=nan: give a finite"),
    (read_ranked, {**RANKED, "ranks": None}, "ranks=None is NoneType, not a list"),
    (read_ranked, {**RANKED, "ended": [True, False]}, "ended=[True, False]: true or false for"),
    (read_ranked, {**RANKED, "responses": ["b", [assistant("c")], "d"]}, "plain text beside a"),
    (read_scored, COMPLETION, "score is null or missing; give a score"),
    (read_scored, {**COMPLETION, "label": True}, "score is null or missing"),
    (read_scored, {**COMPLETION, "score": True}, "score=True: give a finite"),
    (read_scored, {**COMPLETION, "score": float("inf")}, "score=inf: give"),
    (read_steps, {**STEPS, "steps": None}, "steps=None is NoneType, not a list"),
    (read_steps, {**STEPS, "steps": []}, "steps is an empty list"),
    (read_steps, {**STEPS, "steps": ["b", " "]}, "steps[1]=' ' is empty"),
    (read_steps, {**STEPS, "steps": ["b", "c\nd"]}, r"steps[1] holds the separator '\n'; make it"),
    (read_steps, {**STEPS, "labels": [True]}, "1 labels for 2 steps; give one for each"),
    (read_steps, {**STEPS, "labels": [True, 1.5]}, "labels=[1.0, 1.5]: true, false or in [0, 1]"),
    (read_steps, {**STEPS, "labels": [True, None]}, "labels[1]=None: give a finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "values", "message"), BAD)
def test_read_bad_row_names_its_place_or_is_skipped(read, values, message, chat_tokenizer, jsonl):
    path = jsonl(values, {**PAIR, **COMPLETION, "score": 1, "steps": ["b"], "labels": [True]})
    with pytest.raises(InputError) as caught:
        read_all(read, chat_tokenizer, path)
    assert str(caught.value).startswith(f"{path}:1: {message}")
    assert "\n" not in str(caught.value)
    found = read(read_rows(path), chat_tokenizer, skip_bad_rows=True)
    assert len(found.items) == 1 + (read is read_labelled)
    assert found.skipped == (str(caught.value),)


def test_stack_columns_fills_gaps_with_none():
    prompts = [Prompt("a", {"n": 1}, "x:1"), Prompt("b", {"m": 2, "n": 3}, "x:2")]
    assert stack_columns(prompts) == {"n": [1, 3], "m": [None, 2]}
    assert stack_columns([]) == {}


def test_rows_say_whether_a_chat_template_wrote_them(chat_tokenizer, jsonl):
    """Of such a row, the beginning-of-sequence token is the template's affair."""
    plain = {"prompt": "a", "chosen": " b", "rejected": " c", "completion": " b", "label": True}
    plain |= {"responses": [" b", " c"], "ranks": [1, 2], "steps": ["b"], "labels": [True]}
    chat = plain | {"prompt": [user("a")], "completion": [assistant("b")]}
    chat |= {"chosen": [assistant("b")], "rejected": [assistant("c")]}
    chat |= {"responses": [[assistant("b")], [assistant("c")]]}
    for row, is_chat in ((plain, False), (chat, True)):
        rows = read_rows(jsonl(row))
        for read in (read_prompts, read_completions, read_pairs, read_ranked, read_steps):
            assert read(rows, chat_tokenizer).items[0].chat is is_chat, read
        for one in ({"prompt", "completion", "label"}, {"prompt", "chosen", "rejected"}):
            labelled = read_rows(jsonl({name: row[name] for name in one}))
            assert {x.chat for x in read_labelled(labelled, chat_tokenizer).items} == {is_chat}
    several = read_rows(jsonl({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}))
    assert read_completions(several, chat_tokenizer, train_on="assistant").items[0].chat
