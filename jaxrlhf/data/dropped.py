"""What a chat holds and its text does not: a template leaves out whatever it does not read.

Compared without white space, which templates trim. What a template may write otherwise than it
stands in the row is looked for in each of those ways: with JSON's escapes, or as Python has it.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.reading import NotJsonError, parse_json
from jaxrlhf.core.shown import shown
from jaxrlhf.data.chat import Writer
from jaxrlhf.data.rows import Message, calls_of, content_text

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold what was thought before it."""
REMEDY = (
    "take it out of the row, give a data.chat_template that writes it, or accept that it is "
    "left out: data.allow_dropped"
)


def check_past(writer: Writer, messages: Iterable[tuple[int, Message]], text: str) -> None:
    """Raise InputError if ``text`` leaves out what one of the messages says, or a call in it.

    Thoughts of past turns are not looked for: templates leave them out by design.

    Args:
      messages: each with its place in the chat.
    """
    squeezed, said = _squeeze(text), []
    for index, message in messages:
        content = content_text(message)
        if message["role"] == "assistant":
            content = content.rpartition("</think>")[2]
        said.append((index, content))
        for name, value in chain([("content", content)], _calls(message)):
            if not _holds(squeezed, value):
                _drop(writer, f"messages[{index}].{name}={shown(value)}")
    # What stands in another message too is there as often as there are messages that say it.
    whole = [text for _, content in said if (text := _squeeze(content)) and text in squeezed]
    for index, content in said:
        part = _squeeze(content)
        if part in whole and squeezed.count(part) < sum(part in other for other in whole):
            _drop(writer, f"messages[{index}].content={shown(content)}")


def check_learnt(
    writer: Writer, message: Message, text: str, index: int, header: Callable[[], str]
) -> None:
    """Raise InputError if ``text``, all that is learnt of a message, leaves out a part of it.

    Args:
      header: gives what stands before ``text`` in the turn, in which a thought may begin.
    """
    thoughts = [(name, message[name]) for name in THOUGHTS if isinstance(message.get(name), str)]
    said = [*thoughts[:1], ("content", content_text(message)), *_calls(message)]
    squeezed = _squeeze(text)
    missed = [(name, value) for name, value in said if not _holds(squeezed, value)]
    for name, value in missed:
        if not _holds(_squeeze(header()) + squeezed, value):
            _drop(writer, f"messages[{index}].{name}={shown(value)}")


def check_tools(writer: Writer, prompt: list[Message], text: str) -> None:
    """Raise InputError if the row has tools, and the prompt's ``text`` is the same without."""
    if writer.tools and (
        not writer.reads("tools") or writer.text(prompt, open_turn=True, tools=False) == text
    ):
        _drop(writer, "the column tools")


def _holds(squeezed: str, value: Any) -> bool:
    return any(_squeeze(form) in squeezed for form in _forms(value))


def _drop(writer: Writer, what: str) -> None:
    line = f"{writer.where}: the chat template leaves out {what}"
    if not writer.settings.allow_dropped:
        raise InputError(f"{line}; {REMEDY}")
    writer.note("of which the chat template leaves something out", line)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _forms(value: Any) -> Iterator[str]:
    """How a template may write a string, a number, or true and false."""
    yield str(value)
    text = json.dumps(value, ensure_ascii=False)
    yield text
    if isinstance(value, str):
        yield text[1:-1]
        yield json.dumps(value)[1:-1]
        yield json.dumps(text[1:-1], ensure_ascii=False)[1:-1]
        yield repr(value)[1:-1]


def _calls(message: Message) -> Iterator[tuple[str, Any]]:
    """The names, and the values of the arguments, of the calls of tools in a message."""
    for name, call in calls_of(message):
        if "name" in call:
            yield f"{name}.name", call["name"]
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments.encode())
            except NotJsonError:  # text of another kind, which a template writes as it stands
                yield f"{name}.arguments", arguments
                continue
        for value in _leaves(arguments):
            yield f"{name}.arguments", value


def _leaves(value: Any) -> Iterator[Any]:
    """The strings, numbers and truth values in nested lists and objects."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif value is not None:
        yield value
