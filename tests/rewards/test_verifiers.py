import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards import verifiers
from jaxrlhf.rewards.functions import call
from jaxrlhf.rewards.verifiers import function_of, make, verify


def score(name, completion, answer, **options):
    return verify(make(name, **options), [completion], {"answer": [answer]})[0]


@pytest.mark.parametrize(
    ("name", "completion", "answer", "right"),
    [
        ("exact", "It is\nAnswer: paris.", "Paris", 1.0),
        ("exact", "Paris", "Paris", 1.0),
        ("exact", "Paris it is", "Paris", 0.0),
        ("exact", "NYC", ["New York", "nyc"], 1.0),
        ("exact", "42", 42, 1.0),
        ("number", "so 3 + 4 = 7", "7", 1.0),
        ("number", "so 3 + 4 = 7", 7.0, 1.0),
        ("number", r"\boxed{0.5}, not 3", "1/2", 1.0),
        ("number", "1,000", "3 + 997\n#### 1000", 1.0),
        ("number", "0.3333", "1/3", 0.0),
        ("number", "seven", "7", 0.0),
        ("choice", "Answer: (B)", "B", 1.0),
        ("choice", "Answer: (B)", "(b)", 1.0),
        ("choice", "Answer: (B)", 1, 1.0),
        ("choice", "Answer: (B)", 0, 0.0),
        ("choice", "no idea", "B", 0.0),
        ("regex", "the end is near", r"\bnear$", 1.0),
        ("regex", "near the end", r"\bnear$", 0.0),
    ],
)
def test_verify(name, completion, answer, right):
    assert score(name, completion, answer) == right


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("exact", None, "has no 'answer'"),
        ("exact", ".", "is empty"),
        ("exact", {"a": 1}, "neither text nor a number"),
        ("exact", [], "neither text nor a number"),
        ("number", "seven", "holds no number"),
        ("number", True, "holds no number"),
        ("number", float("nan"), "holds no number"),
        ("choice", "the moon", "neither a letter nor an index"),
        ("choice", 26, "neither a letter nor an index"),
        ("choice", True, "neither a letter nor an index"),
        ("regex", "(", "no pattern"),
        ("regex", "", "could be a pattern"),
        ("regex", 5, "could be a pattern"),
    ],
)
def test_truth_that_is_none_has_no_score(name, answer, message):
    assert math.isnan(score(name, "5", answer))
    with pytest.raises(ValueError, match=message):
        make(name).truth({"answer": answer})


def test_make_other_column():
    assert verify(make("exact", "truth"), ["a", "a"], {"truth": ["a", "b"]}) == [1.0, 0.0]


def test_make_fixed_pattern_needs_no_column():
    verifier = make("regex", pattern=r"(?s)<think>.*</think>")
    assert verify(verifier, ["<think>\n</think> 5", "5"], {}) == [1.0, 0.0]
    with pytest.raises(InputError, match=r"pattern='\(': no pattern"):
        make("regex", pattern="(")


@pytest.mark.timeout(30)
def test_regex_that_takes_too_long_has_no_score(monkeypatch):
    monkeypatch.setattr(verifiers, "PATTERN_SECONDS", 0.05)
    assert math.isnan(score("regex", "a" * 40 + "b", r"(a|aa)+(?<!b)$"))


def test_function_of_is_a_reward_function():
    function = function_of(make("number"))
    scores = call("number", function, ["p"] * 3, ["1", "2", "3"], {"answer": [1, 1, None]})
    np.testing.assert_array_equal(scores, [1.0, 0.0, np.nan])


def test_math():
    pytest.importorskip("math_verify")
    assert score("math", r"so $x = \boxed{\frac{2}{4}}$", "0.5") == 1.0
    assert score("math", r"\boxed{\{2, 1\}}", r"$\{1, 2\}$") == 1.0
    assert score("math", r"\boxed{3}", "0.5") == 0.0
    assert score("math", "I do not know", "0.5") == 0.0
    with pytest.raises(ValueError, match="math-verify"):
        make("math").truth({"answer": ""})


def test_math_that_is_not_decided_has_no_score(monkeypatch):
    """Neither by an error (1/0 is no number) nor in time; a match beside an error is one."""
    math_verify = pytest.importorskip("math_verify")
    assert math.isnan(score("math", r"\boxed{3}", "$1/0$"))
    assert score("math", r"\boxed{1/0}", "3") == 0.0
    verifier = make("math")

    def truth(answer):
        return verifier.truth({"answer": answer})

    assert verifier.score("3", truth("$1/0$") + truth("3")) == 1.0
    monkeypatch.setattr(verifiers, "MATH_SECONDS", 1)
    monkeypatch.setattr(math_verify.grader, "sympy_expr_eq", lambda *_: time.sleep(20))
    assert math.isnan(score("math", r"\boxed{3}", "4"))
    monkeypatch.setattr(math_verify.parser, "extract_target_from_pred", lambda *_, **__: 1 / 0)
    assert math.isnan(verifier.score("3", []))


def test_math_outside_the_main_thread():
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as threads:
        got = list(threads.map(lambda said: score("math", said, r"\frac{1}{2}"), ["0.5", "3"]))
    assert got == [1.0, 0.0]


def test_reasoning_gym():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    columns = {name: [entry[name]] * 3 for name in ("question", "answer", "metadata")}
    columns["task"] = ["chain_sum"] * 3
    right, verifier = entry["answer"], make("reasoning_gym")
    said = [f"<answer>{right}</answer>", f"{right}", f"Answer: {int(right) + 1}"]
    scores = verify(verifier, said, columns)
    assert scores[:2] == [1.0, 1.0]
    assert scores[2] < 0.1
    with pytest.raises(ValueError, match="has no 'task'"):
        verifier.truth({"answer": right})
    with pytest.raises(ValueError, match="none of reasoning-gym's"):
        verifier.truth({name: "x" for name in ("question", "answer", "metadata", "task")})


def test_reasoning_gym_makes_a_checker_once(monkeypatch):
    """Some read a book for it."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    made, make_checker = [], reasoning_gym.get_score_answer_fn
    monkeypatch.setattr(
        reasoning_gym, "get_score_answer_fn", lambda task: made.append(task) or make_checker(task)
    )
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    columns = {name: [entry[name]] * 3 for name in ("question", "answer", "metadata")}
    verify(make("reasoning_gym"), ["1", "2", "3"], {**columns, "task": ["chain_sum"] * 3})
    assert made == ["chain_sum"]


@pytest.mark.parametrize(
    ("name", "same", "other", "without"),
    [
        ("exact", ["so\nAnswer: Paris.", "paris"], "Rome", "."),
        ("number", ["1/2", "so 3 - 2.5 = 0.5", r"\boxed{0.50}"], "2", "none"),
        ("choice", ["(B)", "answer: b"], "(C)", "I do not know"),
        ("reasoning_gym", ["<answer> 4 2 </answer>", "4 2"], "42", " "),
    ],
)
def test_answer_of_verifiers(name, same, other, without):
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    answer = make(name).answer
    assert len({answer(text) for text in same}) == 1
    assert answer(other) not in (answer(same[0]), None)
    assert answer(without) is None


def columns_of(task):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
    return {"task": task, "question": entry["question"], "metadata": entry["metadata"]}, entry


def test_reasoning_gym_reads_the_column_that_is_named():
    columns, entry = columns_of("chain_sum")
    verifier = make("reasoning_gym", "truth")
    truth = verifier.truth({**columns, "truth": entry["answer"], "answer": "no"})
    assert verifier.score(entry["answer"], truth) == 1.0


def test_reasoning_gym_without_a_truth():
    """Refused before a run, unless the checker does not read it."""
    verifier = make("reasoning_gym", "truth")
    for task in ("chain_sum", "base_conversion"):
        columns, _ = columns_of(task)
        with pytest.raises(ValueError, match="the row has no 'truth'"):
            verifier.truth({**columns, "answer": "5"})
    columns, entry = columns_of("countdown")
    assert verifier.score(entry["answer"], verifier.truth(columns)) == 1.0


def test_reasoning_gym_checker_that_fails_gives_no_score():
    columns, entry = columns_of("boxnet")
    assert entry["answer"] is None
    verifier = make("reasoning_gym")
    assert verifier.score("no JSON", verifier.truth(columns)) == 0.0
    assert math.isnan(verifier.score("42", verifier.truth(columns)))
