"""The values of a row's columns, checked: text, chats, numbers, lists."""

from typing import Any

from jaxrlhf.data.rows import Row, shown
from jaxrlhf.errors import InputError

Message = dict[str, Any]
Text = str | list[Message]
"""Plain text or a chat."""


def text_of(row: Row, key: str) -> Text:
    """The plain text or chat in a column.

    Raises:
      InputError: no such column, or something else in it.
    """
    return as_text(value_of(row, key), key, row.where)


def list_of(row: Row, key: str) -> list[Any]:
    """The list in a column, as it stands there.

    Raises:
      InputError: no such column, or something else in it.
    """
    value = value_of(row, key)
    if not isinstance(value, list):
        raise InputError(f"{row.where}: {key}={shown(value)} is {type(value).__name__}, not a list")
    return value


def value_of(row: Row, key: str) -> Any:
    """Whatever stands in a column, or an InputError that names those there are."""
    if key not in row.values:
        keys = ", ".join(map(str, row.values)) or "none"
        raise InputError(f"{row.where}: no {key!r} among its columns ({keys}); add or rename one")
    return row.values[key]


def as_text(value: Any, name: str, where: str) -> Text:
    """``value`` if it is plain text that is not blank, or a chat; ``name`` is for the error."""
    if isinstance(value, list):
        return _chat(value, name, where)
    return as_string(value, name, where)


def as_number(value: Any, name: str, where: str) -> float:
    """``value`` if it is a finite number, and no bool."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < 1e38:  # the comparison is False for NaN too
        raise InputError(f"{where}: {name}={shown(value)}: give a finite number, or drop the row")
    return float(value)


def columns_of(row: Row, *used: str) -> dict[str, Any]:
    """The columns besides ``used``, which reward functions get by name."""
    arguments = {"prompts", "completions"} - set(used)
    for name in arguments:
        if row.values.get(name) is not None:
            raise InputError(f"{row.where}: column {name!r} is the name of an argument; rename it")
    return {name: x for name, x in row.values.items() if name not in arguments.union(used)}


def _chat(value: list[Any], key: str, where: str) -> list[Message]:
    if not value:
        raise InputError(f"{where}: {key} is an empty list; give messages or drop the row")
    chat = []
    for index, message in enumerate(value):
        name = f"{key}[{index}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: {name}={shown(message)}: a message is {{role, content}}")
        for part in ("role", "content"):
            as_string(message.get(part), f"{name}.{part}", where)
        # Parquet writes a null for every field that some other message has.
        chat.append({name: part for name, part in message.items() if part is not None})
    return chat


def as_string(value: Any, name: str, where: str) -> str:
    """``value`` if it is text that is not blank."""
    if not isinstance(value, str):
        kind = "null or missing" if value is None else type(value).__name__
        message = f"{where}: {name}={shown(value)} is {kind}, not text; mend or drop the row"
        raise InputError(message)
    if not value.strip():
        raise InputError(f"{where}: {name}={shown(value)} is empty; fill it or drop the row")
    return value
