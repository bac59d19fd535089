"""Verifiers: is the answer right? 1.0 if it is, 0.0 if not, by rules that need no model.

    exact          the answer is the truth, or one of a list of them, after ``normalise``
    number         ``number_of`` answer and truth are equal, as exact fractions
    choice         the chosen letter is the truth, a letter or the index (0 is A) of one
    regex          the truth, a pattern, is found in the completion
    math           math-verify finds answer and truth equal: LaTeX, sets, intervals, equations
    reasoning_gym  the score, from 0 to 1, that a task of reasoning-gym gives the answer

``final_answer`` says what counts as the answer of a completion. The truth stands in the data's
column ``answer``, or another that the config names; a task of reasoning-gym whose checker reads
none needs none. Otherwise there is no score without a truth: NaN here, and a run refuses such a
row, by its place, before it starts.
"""

import ast
import functools
import itertools
import math
import operator
import re
import string
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import regex

from jaxrlhf.core.errors import InputError, to_install

MATH_SECONDS = 5
"""Seconds that math-verify may take to read a text, and to compare two expressions; the row then
has no reward. It has no limit outside the main thread."""

PATTERN_SECONDS = 1.0
"""Seconds that a pattern may take on a completion; the row then has no reward."""

EXTRA = f"needs math-verify and reasoning-gym: {to_install('verifiers')}"

Columns = Mapping[str, Any]
"""The columns of one row."""


@dataclass(frozen=True)
class Verifier:
    """A rule for right and wrong, in two parts, so that bad rows are found before a run."""

    truth: Callable[[Columns], Any]
    """A row's truth, ready to compare with. Raises ValueError where it has none."""
    score: Callable[[str, Any], float]
    """(completion, truth) → score."""
    answer: Callable[[str], Hashable | None]
    """What a completion answers, for a vote among several; None where it has no answer."""


def make(name: str, answer: str = "answer", pattern: str = "") -> Verifier:
    """The verifier called ``name``.

    Args:
      answer: the column that holds the truth.
      pattern: of regex; the truth of every row if given.

    Raises:
      InputError: an optional package is missing, or the pattern is not one.
    """
    if name == "reasoning_gym":
        return _reasoning_gym(answer)
    said = _said
    if name in COMPARED:
        truth, said, agrees = COMPARED[name]
        score = functools.partial(_compare, said, agrees)
    else:
        truth, score = _math() if name == "math" else (_pattern, _regex)
    if not pattern:
        return Verifier(lambda columns: truth(_value(columns, answer)), score, said)
    try:
        fixed = _pattern(pattern)
    except ValueError as error:
        raise InputError(f"pattern={pattern!r:.80}: {error}") from error
    return Verifier(lambda _: fixed, score, said)


def _value(columns: Columns, name: str) -> Any:
    value = columns.get(name)
    if value is None:
        raise ValueError(f"the row has no {name!r}")
    return value


def verify(verifier: Verifier, completions: Sequence[str], columns: Mapping[str, Any]) -> list:
    """The scores of B completions; NaN where a row has no truth. ``columns``: B values each."""

    def score(index: int, completion: str) -> float:
        try:
            truth = verifier.truth({name: values[index] for name, values in columns.items()})
        except ValueError:
            return math.nan
        return verifier.score(completion, truth)

    return [score(index, completion) for index, completion in enumerate(completions)]


# "Answer: 5", "the answer is: 5" and "#### 5" (GSM8K); what follows, to the end of the line.
_SAYS = re.compile(r"\banswer(?: ?(?:is|:|=))+[ \t]*(\S[^\n]*)|^####[ \t]*(\S[^\n]*)", re.I | re.M)
# Commas only between groups of three; else they stand between numbers, as in "1,2,3".
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,20}(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus after a word, a bracket or a point subtracts; digits inside a word ("x2") are no number.
# Counts are bounded, here and above: completions of any length are read in linear time.
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}.])[-+−])?(?<!\w)(?<!\d\.)((?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d))?)"
    rf"(?:\s?/\s?({_DIGITS}))?"
)
# What may follow a number: see ``_side``. A comma here stands between numbers, as in "1,2,3".
_TOKEN = re.compile(
    rf"(?P<space>\s+)|(?P<equals>=|≈|\\approx\b|equals\b)"
    rf"|(?P<sign>\*\*?|[-+−×÷·^/]|\\(?:times|cdot|div)\b|,(?=\d))"
    rf"|(?P<number>{_DIGITS})|(?P<verb>(?:[xX]|of|times|plus|minus|over)\b)|(?P<word>[^\W\d_]+)"
    r"|(?P<open>\\?[(\[{])|(?P<close>\\?[)\]}%$]|[€£°!])|(?P<other>.)"
)
_SIDE = 200
"""Characters after a number in which an equation is looked for."""
# Between "=" and the number on its other side: no more than a word, as in "= about 5".
_NEXT = re.compile(r"[^\w\n,;]*(?:[^\W\d_]+[^\w\n,;]*)?")
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([-+]?[\d.,]+)\}\s?\{([\d.,]+)\}")
_OUTER = string.whitespace + ".,;:!?\"'`*_$“”‘’"


def marked_answer(text: str) -> str | None:
    r"""What ``text`` marks as its answer; None where nothing is marked.

    By the first of these that occurs, and of several the last: ``\boxed{…}`` with balanced braces;
    ``<answer>…</answer>``; the rest of a line after "answer:" or "answer is", in any case, or after
    a "####" that begins it.
    """
    found = _tagged(text)
    if found is None:
        said = _last(_SAYS, text)
        found = said and (said[1] or said[2])
    return found.strip() if found is not None else None


def _tagged(text: str) -> str | None:
    found = _boxed(text)
    if found is None:
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, max(end, 0))
        found = text[start + len("<answer>") : end] if start >= 0 else None
    return found


def final_answer(text: str) -> str:
    """``marked_answer``, or the whole text where nothing is marked."""
    marked = marked_answer(text)
    return text.strip() if marked is None else marked


def normalise(text: str) -> str:
    """Text for comparing: NFKC, case folded, white space single, outer punctuation removed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(_OUTER)


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly; None where there is none.

    ``-1,234.5``, ``.5``, ``1e-3``, ``3/4`` and ``\\frac{3}{4}`` are numbers; what stands
    around them ($, %, units) is not read. A minus is a sign only where nothing it could subtract
    from stands before it: the last number of "5-3" is 3.
    """
    found = _last(_NUMBER, _FRACTION.sub(r" \1/\2", text))
    return None if found is None else _value_of(found)


def _value_of(found: re.Match) -> Fraction | None:
    try:
        value = Fraction(found[1].replace(",", ""))
        if found[2]:
            value /= Fraction(found[2].replace(",", ""))
    except (ValueError, ZeroDivisionError):  # thousands of digits; a division by 0
        return None
    return -value if found[0][0] in "-−" else value


def number_of(text: str) -> Fraction | None:
    """The number that ``text`` gives as its answer: the last one, where no answer is marked."""
    return last_number(text) if marked_answer(text) is None else marked_number(text)


def marked_number(text: str) -> Fraction | None:
    """The number in what ``text`` marks as its answer; None where nothing is marked, or none there.

    The first number, where the answer begins with it: "42 dollars for 3 apples" and "42 (as 6·7 =
    42, in 2 steps)" are 42. Before it may stand symbols ($, **), one word ("about"), and words up
    to "=" or ":" ("x = 5"); after "####" (GSM8K) whatever does. Where it begins an equation, the
    first number of the last side: "3 + 4 = 7" is 7. Of a sum that equals nothing ("13 + 29, which
    is 42"), and of a sentence with numbers in it ("we have 3 and 4, so 7"), the last number.

    What reads as a number is as in ``last_number``. "The answer is" within ``<answer>`` counts.
    """
    tagged = _tagged(text)
    said = _last(_SAYS, text if tagged is None else tagged)
    marked = tagged if said is None else said[1] or said[2]
    if marked is None:
        return None
    marked = _FRACTION.sub(r" \1/\2", marked)
    first = _NUMBER.search(marked)
    if first is None or not ((said and said[2]) or _begins(marked[: first.start()])):
        return last_number(marked)
    return _result(marked, first)


def _begins(before: str) -> bool:
    """Whether a text that goes on like this begins with its number."""
    words = len(re.findall(r"[^\W\d_]+", before[-_SIDE:]))
    named = before.rstrip(_OUTER.replace(":", "") + "({[\\").endswith(("=", ":"))
    return words <= (3 if named else 1)


def _result(text: str, number: re.Match) -> Fraction | None:
    """The number, or that on the last side of the equation that it begins."""
    best, found = None, number
    while True:
        summed, end = _side(text[found.end() : found.end() + _SIDE])
        best = best if summed else found
        other = _NUMBER.search(text, found.end() + end) if end else None
        if other is None or not _NEXT.fullmatch(text, found.end() + end, other.start()):
            return last_number(text) if best is None else _value_of(best)
        found = other


def _side(rest: str) -> tuple[bool, int]:
    """What follows a number: whether something is added to it, or the like, and where the "=" of an
    equation ends, 0 if it is none.

    A side is numbers with signs ("+", "times", "of") between them; each may have a unit ("apples").
    """
    summed, wanted, words = False, "", 0  # wanted: the kind of sign that wants a number
    for token in _TOKEN.finditer(rest):
        kind = token.lastgroup
        before, after = rest[: token.start()], rest[token.end() :]
        # "**42** apples": asterisks next to what they set in bold are no sign.
        bold = token[0][0] == "*" and not before[-1:].isspace() and not after[:1].strip()
        if kind in ("space", "close") or bold or (kind == "open" and wanted):
            continue
        if kind == "equals":
            return summed, 0 if wanted else token.end()
        letter = kind in ("word", "verb") and len(token[0]) == 1
        if wanted and (kind == "number" or letter):
            summed, wanted, words = summed or wanted == "sign", "", 0
        elif kind in ("sign", "verb") and not wanted:
            wanted = kind
        elif kind == "word" and not wanted and not words:
            words = 1
        elif not (wanted and token[0] in "+-−"):
            break
    return summed, 0


def choice_letter(text: str) -> str | None:
    """The letter A to Z that ``text`` chooses, as a capital; None where it chooses none.

    In what is marked as the answer: the first letter that stands alone, "(b)", "B." or "b". In
    other text: the letter that is all of it, or else the last one in brackets, "(B)".
    """
    marked = marked_answer(text)
    if marked is not None:
        found = re.search(r"(?<![^\W_])[A-Za-z](?![^\W_])", marked)
        return found[0].upper() if found else None
    whole = text.strip(_OUTER + "()[]")
    if len(whole) == 1 and whole in string.ascii_letters:
        return whole.upper()
    bracketed = re.findall(r"\(([A-Za-z])\)", text)
    return bracketed[-1].upper() if bracketed else None


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    return next(iter(deque(pattern.finditer(text), 1)), None)


def _boxed(text: str) -> str | None:
    r"""The content of the ``\boxed{…}`` that closes last."""
    # Open braces, each with the start of its content where it is a box's, so that
    # "\boxed{\frac{1}{2}}" is found whole; a regular expression cannot count them.
    opened: list[int | None] = []
    found, at = None, 0
    while at < len(text):
        if text.startswith("\\boxed{", at):
            at += len("\\boxed{")
            opened.append(at)
            continue
        if text[at] == "{":
            opened.append(None)
        elif text[at] == "}" and opened:
            start = opened.pop()
            found = found if start is None else text[start:at]
        at += 2 if text[at] == "\\" else 1  # an escaped brace is no brace
    return found


def _said(completion: str) -> str | None:
    return normalise(final_answer(completion)) or None


def _texts(value: Any) -> frozenset[str]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(_is_scalar(text) for text in texts):
        raise ValueError("the truth is neither text nor a number, nor a list of them")
    normal = frozenset(normalise(str(text)) for text in texts)
    if "" in normal:
        raise ValueError("the truth is empty")
    return normal


def _truth_number(value: Any) -> Fraction:
    # Worked solutions are truths too: "3 + 997\n#### 1000".
    number = number_of(str(value)) if _is_scalar(value) else None
    if number is None:
        raise ValueError("the truth holds no number")
    return number


def _letter_of(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 26:
        return chr(ord("A") + value)
    letter = choice_letter(value) if isinstance(value, str) else None
    if letter is None:
        raise ValueError("the truth is neither a letter nor an index from 0 to 25")
    return letter


def _is_scalar(value: Any) -> bool:
    # In Python, True is the number 1; in data it is no answer.
    return isinstance(value, str | int | float) and not isinstance(value, bool)


COMPARED: dict[str, tuple[Callable, Callable[[str], Hashable | None], Callable]] = {
    "exact": (_texts, _said, operator.contains),
    "number": (_truth_number, number_of, operator.eq),
    "choice": (_letter_of, choice_letter, operator.eq),
}
"""(the column's value → the truth, completion → its answer, (truth, answer) → whether it is right)
of those that compare an answer."""


def _compare(said: Callable, agrees: Callable, completion: str, truth: Any) -> float:
    return float(agrees(truth, said(completion)))


def _pattern(value: Any) -> Any:
    if not isinstance(value, str) or not value:
        raise ValueError("no text that could be a pattern")
    try:
        return regex.compile(value)
    except regex.error as error:
        raise ValueError(f"no pattern ({error})") from error


def _regex(completion: str, truth: Any) -> float:
    # ``regex`` and not ``re``: it can be stopped where a pattern backtracks without end.
    try:
        return float(truth.search(completion, timeout=PATTERN_SECONDS) is not None)
    except TimeoutError:
        return math.nan


def _math() -> tuple[Callable[[Any], Any], Callable[[str, Any], float]]:
    try:
        import math_verify  # noqa: PLC0415 (optional extra)
        from math_verify.errors import TimeoutException  # noqa: PLC0415
    except ImportError as error:
        raise InputError(f"verifier: math {EXTRA}") from error

    def truth(value: Any) -> Any:
        text, seconds = str(value) if _is_scalar(value) else "", _alarm_seconds()
        parsed = math_verify.parse(text, parsing_timeout=seconds)
        # Data often holds LaTeX without the dollars that mark it.
        parsed = parsed or math_verify.parse(f"${text}$", parsing_timeout=seconds)
        if not parsed:
            raise ValueError("the truth is nothing that math-verify can read")
        return parsed

    def score(completion: str, truth: Any) -> float:
        seconds, unknown = _alarm_seconds(), False
        try:
            read = math_verify.parse(completion, parsing_timeout=seconds, raise_on_error=True)
        except (Exception, TimeoutException):
            return math.nan
        # Each may be read in several ways: one match is enough, and only if all could be compared
        # is there none.
        for pair in itertools.product(truth, read):
            try:
                if math_verify.verify(*pair, timeout_seconds=seconds, raise_on_error=True):
                    return 1.0
            except (Exception, TimeoutException):
                unknown = True
        return math.nan if unknown else 0.0

    return truth, score


def _alarm_seconds() -> int:
    """Math-verify's limit is an alarm, which only the main thread can set; 0 is none."""
    return MATH_SECONDS if threading.current_thread() is threading.main_thread() else 0


def _reasoning_gym(answer: str) -> Verifier:
    try:
        import reasoning_gym  # noqa: PLC0415 (optional extra)
    except ImportError as error:
        raise InputError(f"verifier: reasoning_gym {EXTRA}") from error
    checker_of = functools.cache(reasoning_gym.get_score_answer_fn)  # some read a book each time

    @functools.cache
    def needs_answer(task: str) -> bool:
        """Whether its checker judges otherwise, or fails, where the answer is hidden from it."""
        try:
            tasks = reasoning_gym.create_dataset(task, size=1, seed=0)
            entry = tasks[0]
            if entry["answer"] is None:
                return False
            hidden = {**entry, "answer": None}
            # A right, a wrong and an empty answer: each must be judged as before.
            said = (entry["answer"], "0", "")
            return any(tasks.score_answer(x, hidden) != tasks.score_answer(x, entry) for x in said)
        except Exception:
            return True

    def truth(columns: Columns) -> Any:
        task = _value(columns, "task")
        if task not in reasoning_gym.factory.DATASETS:
            raise ValueError(f"task={task!r:.80} is none of reasoning-gym's")
        question, metadata = _value(columns, "question"), _value(columns, "metadata")
        if isinstance(metadata, str):  # where JSON would have changed it (data.tasks)
            metadata = _literal(metadata)
        right = columns.get(answer)
        if right is None and needs_answer(task):
            raise ValueError(f"the row has no {answer!r}, which the checker of {task} reads")
        entry = {"question": question, "answer": right, "metadata": metadata}
        return checker_of(task), entry

    def score(completion: str, truth: Any) -> float:
        checker, entry = truth
        try:
            return float(checker(final_answer(completion), entry))
        except Exception:  # some fail on text that they cannot read
            return math.nan

    return Verifier(truth, score, lambda completion: final_answer(completion) or None)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("metadata is text, and no Python literal") from error
