"""What others have written, as it may be shown: cut short, control characters made visible."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_BLANK = re.compile("[\t-\r\x1c-\x1f\x85\u2028\u2029]")
_DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[\0-\x1f\x7f-\x9f\u2028\u2029{_DIRECTION}\ud800-\udfff]")
_BUT_LINES = re.compile(f"(?![\t\n]){_CONTROL.pattern}")


def visible(text: Any, lines: bool = False) -> str:
    """``text`` without a character that could command a terminal, or hide or turn other text.

    Control characters, marks of the direction of writing and lone surrogates stand there as Python
    escapes them: ``\\x1b``, ``\\u202e``. Of one line: what breaks lines, and tabs, become blanks.

    Args:
      lines: keep line feeds and tabs; what else breaks lines is escaped.
    """
    if lines:
        return _BUT_LINES.sub(_escaped, str(text))
    return _CONTROL.sub(_escaped, _BLANK.sub(" ", str(text)))


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def shown(value: Any, limit: int = 60) -> str:
    """``repr(value)`` as a message shows it, cut at ``limit`` characters.

    No more of a list or an object is written out than is shown.
    """
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit:
            return f"{text[: limit - 1]}…"
    return text


def _pieces(value: Any, limit: int) -> Iterator[str]:
    if isinstance(value, dict):
        yield "{"
        for index, (key, item) in enumerate(value.items()):
            yield ", " if index else ""
            yield from _pieces(key, limit)
            yield ": "
            yield from _pieces(item, limit)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from _pieces(item, limit)
        yield "]"
    elif isinstance(value, str | bytes):
        # What is left out is beyond the cut in any case.
        yield repr(value[: limit + 1])
    elif isinstance(value, int) and value.bit_length() > 1024:
        # Python refuses to write out what has thousands of digits.
        yield f"a number of {value.bit_length()} bits"
    else:
        yield repr(value)


def asked(sample: Mapping[str, Any]) -> Any:
    """What a sample, a line of samples.jsonl, asks: of a chat what the user said last (``user``),
    and not its whole ``prompt``, which may begin with pages of instructions."""
    return sample.get("user") or sample.get("prompt", "")


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's message, cut, or its type where it has none."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
