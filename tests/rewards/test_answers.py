from fractions import Fraction

import pytest

from jaxrlhf.rewards.verifiers import (
    choice_letter,
    final_answer,
    last_number,
    marked_answer,
    normalise,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4} or \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{4} and then \boxed{5", "4"),
        ("<answer>4</answer> no, <answer> 5 </answer> done", "5"),
        ("<answer>4 <answer>5</answer> <answer>6", "5"),
        ("The answer is 4.\nAnswer: 5 apples\nGood.", "5 apples"),
        ("**Final answer:** 7", "** 7"),
        ("the answer is: x = 3", "x = 3"),
        ("2 + 2\n#### 4", "4"),
        (r"Answer: 1 \boxed{2} <answer>3</answer>", "2"),
        ("Answer: 1 <answer>3</answer>", "3"),
        ("no mark at all, 5", None),
        ("answering 5", None),
        ("</answer>5", None),
        ("", None),
    ],
)
def test_marked_answer(text, answer):
    assert marked_answer(text) == answer


def test_final_answer_without_a_mark_is_all_of_it():
    assert final_answer(" Paris \n") == "Paris"
    assert final_answer("It is big. Answer: Paris") == "Paris"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Eiffel\nTower. ", "the eiffel tower"),
        ("**Paris**", "paris"),
        ("ＰＡＲＩＳ", "paris"),
        ("Straße", "strasse"),
        ("it's 3.5", "it's 3.5"),
        (" . ", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 apples, then 7", 7),
        ("costs $1,234.50 in all", Fraction("1234.5")),
        ("1,2,3", 3),
        ("12,345,678", 12345678),
        ("1,2345", 2345),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("x = -3", -3),
        ("x=−3", -3),
        ("5-3", 3),
        ("(5)-3", 3),
        ("3 - 4", 4),
        ("about 1e-3", Fraction(1, 1000)),
        ("3/4 of it", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac{-3}{4}", Fraction(-3, 4)),
        ("50%", 50),
        ("It is 5.", 5),
        ("x2 and 4kg", 4),
        ("none", None),
        ("1/0", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (b). ", "B"),
        ("Answer: (c) the moon", "C"),
        ("Answer: B.", "B"),
        ("the answer is b", "B"),
        (r"\boxed{\text{D}}", "D"),
        ("First (A) looks right, but (C) is.", "C"),
        ("A cat sat on B", None),
        ("Answer: the moon", None),
        ("", None),
    ],
)
def test_choice_letter(text, letter):
    assert choice_letter(text) == letter


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "<answer>" * 20_000,
        "answer" + " " * 100_000,
        "1," * 50_000,
        "123," * 25_000,
        "1" * 100_000,
        "answer is is is" * 10_000,
        "\\frac{" * 20_000,
    ],
    ids=lambda text: text[:8],
)
def test_long_completions_take_no_time(text):
    for function in (marked_answer, last_number, choice_letter, normalise):
        function(text)
