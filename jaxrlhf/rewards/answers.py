"""What a completion gives as its answer, by rules that verifiers share."""

import re
import string
import unicodedata
from collections import deque
from fractions import Fraction

_SAYS = re.compile(r"\banswer(?: ?(?:is|:|=))+[ \t]*(\S[^\n]*)|^####[ \t]*(\S[^\n]*)", re.I | re.M)
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,20}(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}.])[-+−])?(?<!\w)(?<!\d\.)((?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d))?)"
    rf"(?:\s?/\s?({_DIGITS}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([-+]?[\d.,]+)\}\s?\{([\d.,]+)\}")
_OUTER = string.whitespace + ".,;:!?\"'`*_$“”‘’"


def marked_answer(text: str) -> str | None:
    r"""What ``text`` marks as its answer; None where nothing is marked.

    By the first of these that occurs, and of several the last: ``\boxed{…}`` with balanced braces;
    ``<answer>…</answer>``; the rest of a line after "answer:" or "answer is", in any case, or after
    a "####" that begins it.
    """
    found = _boxed(text)
    if found is None:
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, max(end, 0))
        found = text[start + len("<answer>") : end] if start >= 0 else None
    if found is None:
        said = _last(_SAYS, text)
        found = said and (said[1] or said[2])
    return found.strip() if found is not None else None


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
    if found is None:
        return None
    try:
        value = Fraction(found[1].replace(",", ""))
        if found[2]:
            value /= Fraction(found[2].replace(",", ""))
    except (ValueError, ZeroDivisionError):  # thousands of digits; a division by 0
        return None
    return -value if found[0][0] in "-−" else value


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
