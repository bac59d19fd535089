"""What a completion gives as its answer, and the score of it against a truth; a truth that is none,
or a comparison that is not decided, gives no score, never 0."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards import verifiers
from jaxrlhf.rewards.verifiers import (
    choice_letter,
    final_answer,
    last_number,
    make,
    marked_answer,
    marked_number,
    normalise,
    number_of,
    verify,
)


@pytest.mark.parametrize(
    ("read", "text", "found"),
    [
        (marked_answer, r"so \boxed{4} or \boxed{5}.", "5"),
        (marked_answer, r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (marked_answer, r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"),
        (marked_answer, r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (marked_answer, r"\boxed{4} and then \boxed{5", "4"),
        (marked_answer, "<answer>4</answer> no, <answer> 5 </answer> done", "5"),
        (marked_answer, "<answer>4 <answer>5</answer> <answer>6", "5"),
        (marked_answer, "The answer is 4.\nAnswer: 5 apples\nGood.", "5 apples"),
        (marked_answer, "**Final answer:** 7", "** 7"),
        (marked_answer, "the answer is: x = 3", "x = 3"),
        (marked_answer, "2 + 2\n#### 4", "4"),
        (marked_answer, r"Answer: 1 \boxed{2} <answer>3</answer>", "2"),
        (marked_answer, "Answer: 1 <answer>3</answer>", "3"),
        (marked_answer, "no mark at all, 5", None),
        (marked_answer, "answering 5", None),
        (marked_answer, "</answer>5", None),
        (marked_answer, "", None),
        (final_answer, " Paris \n", "Paris"),
        (final_answer, "It is big. Answer: Paris", "Paris"),
        (normalise, "  The  Eiffel\nTower. ", "the eiffel tower"),
        (normalise, "**Paris**", "paris"),
        (normalise, "ＰＡＲＩＳ", "paris"),
        (normalise, "Straße", "strasse"),
        (normalise, "it's 3.5", "it's 3.5"),
        (normalise, " . ", ""),
        (last_number, "5 apples, then 7", 7),
        (last_number, "costs $1,234.50 in all", Fraction("1234.5")),
        (last_number, "1,2,3", 3),
        (last_number, "12,345,678", 12345678),
        (last_number, "1,2345", 2345),
        (last_number, ".5", Fraction(1, 2)),
        (last_number, "-.5", Fraction(-1, 2)),
        (last_number, "x = -3", -3),
        (last_number, "x=−3", -3),
        (last_number, "5-3", 3),
        (last_number, "(5)-3", 3),
        (last_number, "3 - 4", 4),
        (last_number, "about 1e-3", Fraction(1, 1000)),
        (last_number, "3/4 of it", Fraction(3, 4)),
        (last_number, r"\frac{3}{4}", Fraction(3, 4)),
        (last_number, r"\dfrac{-3}{4}", Fraction(-3, 4)),
        (last_number, "50%", 50),
        (last_number, "It is 5.", 5),
        (last_number, "x2 and 4kg", 4),
        (last_number, "none", None),
        (last_number, "1/0", None),
        (last_number, "9" * 5000, None),
        (last_number, "", None),
        (choice_letter, "B", "B"),
        (choice_letter, " (b). ", "B"),
        (choice_letter, "Answer: (c) the moon", "C"),
        (choice_letter, "Answer: B.", "B"),
        (choice_letter, "the answer is b", "B"),
        (choice_letter, r"\boxed{\text{D}}", "D"),
        (choice_letter, "First (A) looks right, but (C) is.", "C"),
        (choice_letter, "A cat sat on B", None),
        (choice_letter, "Answer: the moon", None),
        (choice_letter, "", None),
    ],
)
def test_reading_of_a_completion(read, text, found):
    assert read(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("6*7=42\n#### 42 dollars for 3 apples", 42),
        ("The answer is 42 (since 13 + 29 = 42, in 2 steps)", 42),
        ("The answer is 42 (since 6*7=42, and 6+7=13).", 42),
        ("The answer is 3 + 4 = 7", 7),
        ("answer: x = 5", 5),
        ("\\boxed{42}", 42),
        ("\\boxed{3 + 4 = 7}", 7),
        ("\\boxed{x = 5}", 5),
        ("\\boxed{42 \\text{ of } 100}", 42),
        ("\\boxed{\\$1,200}", 1200),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("<answer>42 dollars for 3 apples</answer>", 42),
        ("<answer>We have 3 apples and 4 oranges, so 7</answer>", 7),
        ("<answer>The answer is 42 dollars for 3 apples</answer>", 42),
        ("The answer is: **42** apples out of 100", 42),
        ("**Answer:** 42 of 100", 42),
        ("**The answer is 42** (6 groups of 7)", 42),
        ("The answer is $1,200 for 2", 1200),
        ("The answer is 42.", 42),
        ("The answer is -3", -3),
        ("The answer is −3 degrees, not 5", -3),
        ("The answer is 3/4 of 8", Fraction(3, 4)),
        ("The answer is 50% of 80", 50),
        ("The answer is 50% of 80 = 40", 40),
        ("answer: 5-3", 3),
        ("answer: 5 - 3 = 2", 2),
        ("answer: (3 + 4) * 2 = 14 apples, 2 left", 14),
        ("Answer: 3 apples + 4 apples = 7 apples", 7),
        ("Answer: 3 \\times 4 = 12", 12),
        ("Answer: 5 = 3 + 2", 5),
        ("Answer: 13 + 29, which is 42", 42),
        ("Answer: 42 for x = 3", 42),
        ("Answer: 42 when n = 3", 42),
        ("Answer: 42, since 40 + 2 = 42 and 1 = 1", 42),
        ("Answer: $42$ (in 2 steps)", 42),
        ("Answer: \\(42\\) (in 2 steps)", 42),
        ("Answer: \\(3 + 4 = 7\\)", 7),
        ("answer: 1,2,3", 3),
        ("answer: about 42 dollars for 3 apples", 42),
        ("answer: f(2) = 7", 7),
        ("answer: 2^3 = 8", 8),
        ("answer: 3 plus 4 equals 7", 7),
        ("72\n#### 72", 72),
        ("Answer: 7 out of 10", 7),
        ("Answer: 8/10", Fraction(4, 5)),
        ("#### 13 + 29 = 42 in 3 days", 42),
        ("so we have 3 and 4", 4),
        ("The answer is unclear", None),
        ("answer is -5 + 2 = -3", -3),
        ("answer: x1 = 5", 5),
        ("Answer: 20 - 5 - 3 = 12 (of 20)", 12),
        ("Answer: 10 x 3 = 30 boxes of 5", 30),
        ("#### She has 42 of 100", 42),
        ("Answer: 6 * 7 = 42 = 42", 42),
        ("Answer: 3 + 4 = x, so 7", 7),
        ("Answer: **3 + 4 = 7** (2 terms)", 7),
        ("answer: 2 + -3 = -1", -1),
        ("answer: .5 of 3", Fraction(1, 2)),
        ("answer: 5% = 0.05", Fraction(1, 20)),
        ("The answer is 2 x 3 = 6", 6),
        ("The answer is x = 3 + 2 = 5", 5),
        ("Answer: 12 - it was 15 before", 12),
        ("answer: 1/0", None),
        ("Answer: 3. I checked 4 times", 3),
        ("answer:5 apples", 5),
        ("Answer: total cost: $42 for 3", 42),
    ],
)
def test_number_of_a_completion(text, found):
    assert number_of(text) == found
    if marked_answer(text) is None:
        assert marked_number(text) is None


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "answer: " + "1=" * 50_000,
        "answer: " + "1 + 1 = " * 20_000,
        "answer: 1 +" + " 1" * 50_000,
        "#### 1 " + "a" * 100_000,
        "#### " + "(" * 100_000 + "1",
        "\\boxed{" * 20_000,
        "<answer>" * 20_000,
        "answer" + " " * 100_000,
        "1," * 50_000,
        "123," * 25_000,
        "1" * 100_000,
        "answer is is is" * 10_000,
        "\\frac{" * 20_000,
    ],
    ids=lambda text: text[:14],
)
def test_long_completions_take_no_time(text):
    for function in (marked_answer, last_number, number_of, choice_letter, normalise):
        function(text)


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
        ("number", "6*7=42\n#### 42 dollars for 3 apples", "42", 1.0),
        ("number", "The answer is 42 (since 6*7=42, and 6+7=13).", "42", 1.0),
        ("number", "The answer is 42 (since 6*7=42, and 6+7=13).", "13", 0.0),
        ("number", "42", "40 + 2 = 42\n#### 42 dollars for 3 apples", 1.0),
        ("number", "72", "72\n#### 72", 1.0),
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


def test_make_other_column_or_a_fixed_pattern():
    assert verify(make("exact", "truth"), ["a", "a"], {"truth": ["a", "b"]}) == [1.0, 0.0]
    verifier = make("regex", pattern=r"(?s)<think>.*</think>")
    assert verify(verifier, ["<think>\n</think> 5", "5"], {}) == [1.0, 0.0]
    with pytest.raises(InputError, match=r"pattern='\(': no pattern"):
        make("regex", pattern="(")


@pytest.mark.timeout(30)
def test_regex_that_takes_too_long_has_no_score(monkeypatch):
    monkeypatch.setattr(verifiers, "PATTERN_SECONDS", 0.05)
    assert math.isnan(score("regex", "a" * 40 + "b", r"(a|aa)+(?<!b)$"))


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


def entry_of(task):
    """A row of one of reasoning-gym's tasks, and its right answer."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
    row = {"task": task, "question": entry["question"], "metadata": entry["metadata"]}
    return row, entry["answer"]


def test_reasoning_gym(monkeypatch):
    """A checker is made once: some read a book for it."""
    row, right = entry_of("chain_sum")
    reasoning_gym = pytest.importorskip("reasoning_gym")
    made, make_checker = [], reasoning_gym.get_score_answer_fn
    monkeypatch.setattr(
        reasoning_gym, "get_score_answer_fn", lambda task: made.append(task) or make_checker(task)
    )
    verifier = make("reasoning_gym", "truth")
    said = [f"<answer>{right}</answer>", f"{right}", f"Answer: {int(right) + 1}"]
    columns = {name: [x] * 3 for name, x in {**row, "truth": right, "answer": "no"}.items()}
    scores = verify(verifier, said, columns)
    assert scores[:2] == [1.0, 1.0]
    assert scores[2] < 0.1
    assert made == ["chain_sum"]
    with pytest.raises(ValueError, match="has no 'task'"):
        verifier.truth({"truth": right})
    with pytest.raises(ValueError, match="none of reasoning-gym's"):
        verifier.truth({**row, "task": "x"})


def test_reasoning_gym_without_a_truth():
    """Refused before a run, unless the checker does not read it."""
    verifier = make("reasoning_gym", "truth")
    for task in ("chain_sum", "base_conversion"):
        row, _ = entry_of(task)
        with pytest.raises(ValueError, match="the row has no 'truth'"):
            verifier.truth({**row, "answer": "5"})
    row, right = entry_of("countdown")
    assert verifier.score(right, verifier.truth(row)) == 1.0


def test_reasoning_gym_checker_that_fails_gives_no_score():
    row, right = entry_of("boxnet")
    assert right is None
    verifier = make("reasoning_gym")
    assert verifier.score("no JSON", verifier.truth(row)) == 0.0
    assert math.isnan(verifier.score("42", verifier.truth(row)))
