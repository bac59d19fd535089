"""Reward functions as people write them, TRL's among them, are called with what they name: by name,
or by position where they name none of it; what they cannot do without is known before they are."""

import asyncio
import functools
import json
import re

import numpy as np
import pytest

from jaxrlhf.config import IsolateConfig, RewardConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.functions import Asked, call
from jaxrlhf.rewards.isolation import host_source
from jaxrlhf.rewards.signature import missing, signature_of

COLUMNS = {"answer": ["4", "5"], "task": ["math", "code"]}


def by_position(p, c, **columns):
    assert (p, sorted(columns)) == (["p", "q"], ["answer", "task"])
    return [float(len(text)) for text in c]


def in_rest(*texts, **columns):
    assert sorted(columns) == ["answer", "task"]
    return [float(len(text)) for text in texts[1]]


def no_columns(prompts, completions):
    return [float(len(text)) for text in completions]


def one_column(answer, completions):
    return [float(text.startswith(x)) for text, x in zip(completions, answer, strict=True)]


def only_names(*, completions, prompts, task=None, other=1.0):
    return [other + (kind == "math") for kind in task]


def all_by_name(**given):
    assert sorted(given) == ["answer", "completions", "prompts", "task"]
    return [float(len(text)) for text in given["completions"]]


def weighted(prompts, completions, weight):
    return [weight * len(text) for text in completions]


# TRL's examples, by their shapes.


def token_lengths(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def character_lengths(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def right(prompts, completions, answer, **kwargs):
    return [1.0 if x in text else 0.0 for text, x in zip(completions, answer, strict=True)]


def of_one_task(prompts, completions, task, **kwargs):
    return [1.0 if kind == "math" else None for kind in task]


async def awaited(prompts, completions, **kwargs):
    return await asyncio.gather(*(asyncio.sleep(0, float(len(x))) for x in completions))


def logged(completions, answer, log_extra=None, log_metric=None, **kwargs):
    if log_metric:
        log_metric("never", 1.0)
    return [float(len(text)) for text in completions]


class Judging:
    __name__ = "judging"

    def __call__(self, completions, answer, **kwargs):
        return [float(len(text)) for text in completions]


class Awaiting:
    async def __call__(self, prompts, completions):
        return [float(len(text)) for text in completions]


LENGTHS = [2.0, 3.0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (by_position, LENGTHS),
        (in_rest, LENGTHS),
        (no_columns, LENGTHS),
        (one_column, [1.0, 0.0]),
        (only_names, [2.0, 1.0]),
        (all_by_name, LENGTHS),
        (functools.partial(weighted, weight=2), [4.0, 6.0]),
        (lambda prompts, completions, **columns: [len(x) for x in completions], LENGTHS),
        (token_lengths, [1.0, 2.0]),
        (character_lengths, LENGTHS),
        (right, [1.0, 0.0]),
        (of_one_task, [1.0, np.nan]),
        (awaited, LENGTHS),
        (logged, LENGTHS),
        (Judging(), LENGTHS),
        (Awaiting(), LENGTHS),
    ],
)
def test_call_by_signature(function, expected):
    found = call("own", function, ["p", "q"], ["4.", "abc"], COLUMNS, [[7], [8, 9]])
    np.testing.assert_array_equal(found.score_B, expected)


@pytest.mark.parametrize(
    ("function", "needs"),
    [
        (by_position, ()),
        (weighted, ("weight",)),
        (right, ("answer",)),
        (one_column, ("answer",)),
        (token_lengths, ()),
        (Judging(), ("answer",)),
        (lambda p, c, solution: [], ("solution",)),
        (lambda completions, *, solution, level: [], ("solution", "level")),
    ],
)
def test_signature_of_tells_what_it_needs(function, needs):
    assert signature_of(function).needs == needs


def test_call_names_an_argument_that_there_is_not():
    message = (
        "reward function 'own' asks for 'solution', and there are prompts, completions, answer, "
        "task; rename the argument or the column, or give the argument a default"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        call("own", lambda completions, solution, **rest: [], ["p"], ["c"], COLUMNS)


def test_missing_token_ids_are_missed_only_where_they_are_asked_for():
    assert missing(signature_of(token_lengths), [], ids=False).startswith("asks for 'completion_i")
    assert missing(signature_of(token_lengths), []) == ""
    assert missing(signature_of(in_rest), [], ids=False) == ""


MODULE = """
import json
class Judge:
    def __init__(self, weight=2.0): self.weight = weight
    def __call__(self, completions, **columns): return [self.weight] * len(completions)
class Strict(Judge):
    def __init__(self, weight): pass
judge = Judge(3.0)
def ids(completion_ids, **columns): return [sum(row) for row in completion_ids]
def needing(completions, solution, **columns): return [1.0] * len(completions)
def said(prompts, completions, **columns):
    assert all(type(x) is not dict for x in completions)
    return [len(json.dumps([p, c])) for p, c in zip(prompts, completions)]
def last(prompts, completions, **columns):
    return [float(p[-1]["content"] == "a" and c[0] == {"role": "assistant", "content": "ok"})
            for p, c in zip(prompts, completions)]
def spoil(prompts, completions, **columns):
    for p, c in zip(prompts, completions):
        p.append(c), p[0].clear()
    return [1.0] * len(completions)
"""

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]


@pytest.fixture
def source(tmp_path, monkeypatch):
    (tmp_path / "signed.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(name, **settings):
        made.append(host_source(RewardConfig(function=f"signed:{name}", **settings)))
        return made[-1]

    yield make
    for each in made:
        getattr(each, "close", lambda: None)()


@pytest.mark.parametrize("settings", [{"in_process": True}, {}, {"isolate": IsolateConfig()}])
def test_users_function_gets_messages_of_chats_and_text_of_texts(source, settings):
    chats = Asked(["text"] * 2, ["ok", "no"], {}, [True] * 2, [CHAT, CHAT])
    np.testing.assert_array_equal(source("last", **settings)(chats).score_B, [1.0, 0.0])
    mixed = Asked(["p", "text"], ["ok", "ok"], {}, [True] * 2, [None, CHAT])
    said = ["p", "ok"], [CHAT, [{"role": "assistant", "content": "ok"}]]
    expected = [len(json.dumps(x)) for x in said]
    np.testing.assert_array_equal(source("said", **settings)(mixed).score_B, expected)


def test_what_a_function_does_to_messages_reaches_nobody_else(source):
    chat = [dict(message) for message in CHAT]
    source("spoil", in_process=True)(Asked(["t"], ["c"], {}, [True], [chat]))
    assert chat == CHAT


def test_own_functions_get_text_of_chats():
    asked = Asked(["text"], ["A good day."], {}, [True], [CHAT])
    assert host_source(RewardConfig("sentiment"))(asked).score_B[0] > 0.4


def test_class_is_made_once_and_objects_are_called(source):
    asked = Asked(["p"], ["c"], {}, [True])
    assert source("Judge")(asked).score_B == [2.0]
    assert source("judge", in_process=True)(asked).score_B == [3.0]
    with pytest.raises(InputError, match=r"'signed:Strict': making one raised TypeError: .*weight"):
        source("Strict")


def test_token_ids_and_needs_are_known_of_a_worker(source):
    ids = source("ids")
    assert ids.ids
    assert source("needing").needs == ("solution",)
    assert not source("said").ids
    asked = Asked(["p", "p"], ["c", "d"], {}, [True] * 2, ids=[[1, 2], [3]])
    np.testing.assert_array_equal(ids(asked).score_B, [3.0, 3.0])
