"""Rankings, scores and steps as rows: what is read, and what is refused."""

import re

import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import Ranked, Stepwise, read_ranked, read_scored, read_steps
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


RANKED = {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1.5, 2]}
STEPS = {"prompt": "a", "steps": ["b c", " d "], "labels": [True, 0.25]}


def one(read, tokenizer, path, **options):
    (row,) = read(read_rows(path), tokenizer, **options).items
    return row


def test_read_ranked_plain(tokenizer, jsonl):
    path = jsonl({**RANKED, "ended": [True, False, True], "id": 3})
    wanted = Ranked("a", ("b", "c", "d"), (2, 1, 2), (True, False, True), {"id": 3}, f"{path}:1")
    assert one(read_ranked, tokenizer, path) == wanted


def test_read_ranked_keeps_the_order_of_large_integers(tokenizer, jsonl):
    """Of nanoseconds, say, which float32 (and here float64) cannot tell apart."""
    now = 1_700_000_000_000_000_000
    row = {**RANKED, "ranks": [now + 1, now, now + 1]}
    assert one(read_ranked, tokenizer, jsonl(row)).ranks == (2, 1, 2)
    row = {**RANKED, "ranks": [-0.5, 2**24 + 1, 2**24]}
    assert one(read_ranked, tokenizer, jsonl(row)).ranks == (1, 3, 2)


def test_read_ranked_chats(chat_tokenizer, jsonl):
    row = {"prompt": [user("a")], "responses": [[assistant("b")], [assistant("c")]]}
    row = one(read_ranked, chat_tokenizer, jsonl({**row, "ranks": [1, 1]}))
    assert row.prompt == "user : a <eos>\nassistant : "
    assert row.responses == ("b <eos>\n", "c <eos>\n")


def test_read_ranked_pair_is_a_ranking_of_two(tokenizer, jsonl):
    path = jsonl({"prompt": "a", "chosen": "b", "rejected": "c", "chosen_ended": False, "gap": 2})
    row = one(read_ranked, tokenizer, path)
    assert (row.responses, row.ranks, row.ended) == (("b", "c"), (1, 2), (False, True))
    assert row.columns["gap"] == 2


def test_read_ranked_parquet_null_is_absent(tokenizer, parquet):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_ended": False}
    path = parquet({**pair, "rejected_ended": None}, RANKED, {**pair, "responses": None})
    found = read_ranked(read_rows(path), tokenizer).items
    assert [row.ended for row in found] == [(False, True), (True,) * 3, (False, True)]


def test_read_steps_parquet_null_is_absent(tokenizer, parquet):
    trl = {"prompt": "a", "completions": ["b c", " d "], "labels": [1.0, 0.25]}
    path = parquet({**STEPS, "labels": [1.0, 0.25]}, {**trl, "steps": None})
    first, second = read_steps(read_rows(path), tokenizer).items
    assert first.answer == second.answer


BAD = [
    (read_ranked, {**RANKED, "responses": "b"}, "responses='b' is str, not a list"),
    (read_ranked, {"prompt": "a"}, "no 'responses' among its columns"),
    (read_ranked, {**RANKED, "responses": ["b"]}, "responses: 1 of them; a ranking has at least"),
    (read_ranked, {**RANKED, "responses": ["b", "", "c"]}, r"responses[1]='' is empty"),
    (read_ranked, {**RANKED, "responses": ["b", 3, "c"]}, r"responses[1]=3 is int, not text"),
    (read_ranked, {**RANKED, "responses": ["b", "c", "b"]}, "responses[0] == responses[2], 'b'"),
    (read_ranked, {**RANKED, "ranks": [1, 2]}, "2 ranks for 3 responses; give one for each"),
    (read_ranked, {**RANKED, "ranks": [1, 2, "3"]}, "ranks[2]='3': give a finite number"),
    (read_ranked, {**RANKED, "ranks": [1, True, 2]}, "ranks[1]=True: give a finite number"),
    (read_ranked, {**RANKED, "ranks": [1, float("nan"), 2]}, "ranks[1]=nan: give a finite"),
    (read_ranked, {**RANKED, "ranks": None}, "ranks=None is NoneType, not a list"),
    (read_ranked, {**RANKED, "ended": [True, False]}, "ended=[True, False]: true or false for"),
    (read_ranked, {**RANKED, "responses": ["b", [assistant("c")], "d"]}, "plain text beside a"),
    (read_scored, {"prompt": "a", "completion": "b"}, "score is null or missing; give a score"),
    (read_scored, {"prompt": "a", "completion": "b", "label": True}, "score is null or missing"),
    (read_scored, {"prompt": "a", "completion": "b", "score": True}, "score=True: give a finite"),
    (read_scored, {"prompt": "a", "completion": "b", "score": float("inf")}, "score=inf: give"),
    (read_steps, {**STEPS, "steps": None}, "steps=None is NoneType, not a list"),
    (read_steps, {**STEPS, "steps": []}, "steps is an empty list"),
    (read_steps, {**STEPS, "steps": ["b", " "]}, "steps[1]=' ' is empty"),
    (read_steps, {**STEPS, "steps": ["b", "c\nd"]}, r"steps[1] holds the separator '\n'; make it"),
    (read_steps, {**STEPS, "labels": [True]}, "1 labels for 2 steps; give one for each"),
    (read_steps, {**STEPS, "labels": [True, 1.5]}, "labels=[1.0, 1.5]: true, false or in [0, 1]"),
    (read_steps, {**STEPS, "labels": [True, None]}, "labels[1]=None: give a finite number"),
]


@pytest.mark.parametrize(("read", "values", "message"), BAD)
def test_read_bad_row_names_the_place(read, values, message, tokenizer, jsonl):
    path = jsonl(values)
    with pytest.raises(InputError, match=re.escape(f"{path}:1: {message}")):
        read(read_rows(path), tokenizer)
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "score": 1}
    path = jsonl(values, {**good, "steps": ["b"], "labels": [True]})
    found = read(read_rows(path), tokenizer, True)
    assert len(found.items) == len(found.skipped) == 1


def test_read_scored_number_or_label(tokenizer, jsonl):
    row = {"prompt": "a", "completion": "b"}
    path = jsonl({**row, "score": -3}, {**row, "score": 0.5})
    found = read_scored(read_rows(path), tokenizer).items
    assert [x.columns["score"] for x in found] == [-3, 0.5]
    with pytest.raises(InputError, match=r"rows.jsonl:1: score=-3: a probability is in \[0, 1\]"):
        read_scored(read_rows(path), tokenizer, binary=True)
    path = jsonl({**row, "label": False}, {**row, "score": 0.5}, {**row, "label": True})
    found = read_scored(read_rows(path), tokenizer, binary=True).items
    assert [x.columns["score"] for x in found] == [0, 0.5, 1]


def test_read_steps_joins_them(tokenizer, jsonl):
    path = jsonl({**STEPS, "id": 1})
    wanted = Stepwise("a", "b c\n d ", "\n", (1, 0.25), {"id": 1}, f"{path}:1")
    assert one(read_steps, tokenizer, path) == wanted
    trl = {"prompt": "a", "completions": ["b c", " d "], "labels": [True, 0.25], "id": 1}
    assert one(read_steps, tokenizer, jsonl(trl)) == wanted


def test_read_steps_of_a_chat(chat_tokenizer, jsonl):
    row = one(read_steps, chat_tokenizer, jsonl({**STEPS, "prompt": [user("a")]}))
    assert row.prompt == "user : a <eos>\nassistant : "
    assert row.answer == "b c\n d  <eos>\n"


def test_encode_rows_rankings_and_steps(tokenizer, jsonl):
    rows = read_ranked(read_rows(jsonl({**RANKED, "ended": [True, False, True]})), tokenizer)
    (row,) = encode_rows(rows, tokenizer, 20, 3).items
    a, b, c, d = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    assert (row.prompt, row.answers) == ([a], ([b, 0], [c], [d, 0]))
    with pytest.raises(InputError, match=r"rows.jsonl:1: 3 tokens, and data.max_tokens is 2"):
        encode_rows(rows, tokenizer, 20, 2)
    rows = read_steps(
        read_rows(jsonl({**STEPS, "steps": ["b c ", " d "]})), tokenizer, separator="e"
    )
    assert encode_rows(rows, tokenizer, 20, 9).items[0].ends == (2, 4)
    glued = read_steps(read_rows(jsonl({**STEPS, "steps": ["b c", "d"]})), tokenizer, separator="e")
    with pytest.raises(InputError, match="2 labels, and in its tokens the separator 'e' ends 1"):
        encode_rows(glued, tokenizer, 20, 9)
