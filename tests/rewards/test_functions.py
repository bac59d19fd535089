"""Reward functions: found by name, called with text and columns, and their scores checked: what is
no finite number is NaN, never 0, and None does not apply. Async ones share a loop; what they raise
names its place."""

import asyncio
import sys
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import vader

from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.functions import call, make_sentiment, resolve

MODULE = """
constant = 3
def length(prompts, completions, **columns):
    return [len(text) for text in completions]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of reward functions; returns its name."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def score(function, completions=("a", "b"), columns=None):
    return scored(function, completions, columns).score_B


def scored(function, completions=("a", "b"), columns=None):
    return call("own", function, ["p"] * len(completions), list(completions), columns or {})


def test_resolve_unknown_name_suggests():
    message = r"'sentimnet' is unknown: did you mean sentiment\?; choose sentiment or give package"
    with pytest.raises(InputError, match=message):
        resolve("sentimnet")


def test_resolve_module_that_cannot_be_imported(module):
    with pytest.raises(InputError, match=r"importing 'absent' raised Module.*PYTHONPATH") as error:
        resolve("absent:f")
    assert isinstance(error.value.__cause__, ModuleNotFoundError)
    with pytest.raises(InputError, match="raised ZeroDivisionError"):
        resolve(f"{module('broken_rewards', '1 / 0')}:f")


def test_resolve_finds_a_function_or_suggests_one(module):
    name = module("own_rewards", MODULE)
    assert resolve(f"{name}:length")(["p"], ["abc"]) == [3]
    with pytest.raises(InputError, match=r"no function 'lenght': did you mean length\?"):
        resolve(f"{name}:lenght")
    for other in ("constant", ""):
        with pytest.raises(InputError, match=f"no function '{other}'"):
            resolve(f"{name}:{other}")


def test_call_passes_copies_of_prompts_completions_and_columns():
    seen, completions = [], ["a", "b"]

    def function(prompts, completions, answer, **columns):
        seen.append((prompts, completions[:], answer, columns))
        completions.clear()
        return [0.7, 1]

    own = {"answer": [1, 2], "id": [3, 4]}
    scores = call("own", function, ("p", "q"), completions, own).score_B
    assert seen == [(["p", "q"], ["a", "b"], [1, 2], {"id": [3, 4]})]
    np.testing.assert_array_equal(scores, [0.7, 1.0])
    assert completions == ["a", "b"]


@pytest.mark.parametrize(
    "bad",
    ["0.5", float("nan"), float("inf"), -float("inf"), ["1"], {}, 1j, 10**400, Decimal("sNaN")],
)
def test_call_score_that_is_no_finite_number_is_missing_not_zero(bad):
    found = scored(lambda prompts, completions: [bad, 0.5])
    np.testing.assert_array_equal(found.score_B, [np.nan, 0.5])
    assert found.applies().all()


@pytest.mark.parametrize(
    "result",
    [[None, 0.5, "much"], [[None], [0.5], ["much"]], np.array([None, 0.5, "much"], object)],
)
def test_call_none_does_not_apply_and_is_no_failure(result):
    found = scored(lambda prompts, completions: result, ["a", "b", "c"])
    np.testing.assert_array_equal(found.score_B, [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(found.applies(), [False, True, True])


@pytest.mark.parametrize(
    "result",
    [
        [1, 0.5],
        (1, 0.5),
        np.array([1, 0.5], np.float32),
        jnp.array([1, 0.5]),
        [True, jnp.float32(0.5)],
        [Fraction(1), Decimal("0.5")],
        np.array([[1], [0.5]]),
        jnp.array([[1], [0.5]], jnp.bfloat16),
        torch.tensor([[1], [0.5]], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([1, 0.5]),
        [[1], (0.5,)],
        [np.array([1]), torch.tensor([0.5])],
    ],
)
def test_call_takes_lists_and_arrays_of_numbers(result):
    scores = score(lambda prompts, completions: result)
    np.testing.assert_array_equal(scores, [1.0, 0.5])
    assert scores.dtype == np.float64


@pytest.mark.parametrize(
    ("result", "got"),
    [
        ([1.0], "1 scores"),
        ([1.0, 2.0, 3.0], "3 scores"),
        (None, "NoneType"),
        (0.5, "float"),
        ("ab", "str"),
        ({"a": 1.0, "b": 2.0}, "dict"),
        ((x for x in (1.0, 2.0)), "generator"),
        (np.ones((1, 2)), r"an array of shape \[1, 2\]"),
        (np.ones((2, 2)), r"an array of shape \[2, 2\]"),
        (torch.ones((2, 1, 1)), r"an array of shape \[2, 1, 1\]"),
        (np.array(1.0), r"an array of shape \[\]"),
        ([1.0, [1.0, 2.0]], r"a score of shape \[2\] for row 1"),
        ([[[1.0]], [1.0]], r"a score of shape \[1, 1\] for row 0"),
        ([[], 1.0], r"a score of shape \[0\] for row 0"),
        ([np.ones(2), 1.0], r"a score of shape \[2\] for row 0"),
    ],
)
def test_call_wrong_result_names_the_function(result, got):
    with pytest.raises(InputError, match=f"function 'own' returned {got} for 2 completions"):
        score(lambda prompts, completions: result)


@pytest.mark.parametrize("error", [ValueError("two\nlines"), SystemExit(3)])
def test_call_function_that_raises_keeps_the_cause(error):
    def function(prompts, completions):
        raise error

    with pytest.raises(InputError, match=f"'own' raised {type(error).__name__}") as caught:
        score(function)
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


FAILING = """
import json
def outer(prompts, completions):
    return [inner(text) for text in completions]
def inner(text):
    return json.loads(text)["score"]
"""


def test_call_names_the_line_of_the_function_that_raised(module, tmp_path):
    """The innermost of its own file, not of a library that it calls."""
    function = resolve(f"{module('failing_rewards', FAILING)}:outer")
    with pytest.raises(InputError) as caught:
        score(function, ["{"])
    message = str(caught.value)
    assert message.startswith("reward function 'own' raised JSONDecodeError: Expecting")
    assert f" at {tmp_path}/failing_rewards.py:6; mend it, or, in a run, set isolate" in message


def test_call_async_functions_share_a_loop_that_stays():
    loops = []

    async def function(prompts, completions):
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return [float(len(text)) for text in completions]

    for _ in range(2):
        np.testing.assert_array_equal(score(function, ["a", "bb"]), [1.0, 2.0])
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


@pytest.mark.parametrize("error", [ValueError("two\nlines"), SystemExit(3)])
def test_call_async_function_that_raises(error):
    async def function(prompts, completions):
        raise error

    for _ in range(2):  # and the loop goes on
        with pytest.raises(InputError, match=f"raised .*{type(error).__name__}|{error}") as caught:
            score(function)
        assert f" at {__file__}:{function.__code__.co_firstlineno + 1}; " in str(caught.value)


def test_call_async_inside_an_event_loop():
    async def function(prompts, completions):
        return [1.0, 2.0]

    async def inside():
        return score(function)

    np.testing.assert_array_equal(asyncio.run(inside()), [1.0, 2.0])


def test_sentiment_is_compound_and_bounded():
    function = make_sentiment()
    texts = ["The meal was good.", "The meal was terrible!", "The meal was on a table.", ""]
    good, bad, neutral, empty = function([""] * 4, texts)
    assert good == vader.polarity_scores(texts[0])["compound"] > 0.4
    assert bad < -0.4
    assert neutral == empty == 0.0
    assert 0.99 < function([""], ["excellent wonderful " * 200])[0] <= 1.0
    # The prompt is not scored.
    assert function(["terrible"], ["good"], topic=["x"]) == function([""], ["good"])


def test_sentiment_creates_the_analyzer_once(monkeypatch):
    made = []

    class Counted(vader.SentimentIntensityAnalyzer):
        def __init__(self):
            made.append(self)
            super().__init__()

    monkeypatch.setattr(vader, "SentimentIntensityAnalyzer", Counted)
    function = make_sentiment()
    function(["", ""], ["good", "bad"])
    function([""], ["good"])
    assert len(made) == 1


def test_sentiment_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vader", None)
    with pytest.raises(InputError, match=r"pip install -e .*\[demo\]"):
        make_sentiment()
