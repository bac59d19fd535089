"""Read rows from .jsonl and .parquet files, and remember where each one came from.

The values of a row's columns, checked: text, chats, numbers, lists."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from jaxrlhf.core.errors import InputError

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One record of a file."""

    values: dict[str, Any]
    where: str
    """``path:line`` counted from 1; the row's number in Parquet."""


@dataclass(frozen=True)
class Rows(Generic[T]):
    """The usable rows of one file, at any stage from record to token ids."""

    items: tuple[T, ...]
    path: str
    skipped: tuple[str, ...] = ()
    """One line for each row left out under ``skip_bad_rows``: what was wrong, and where."""

    def __len__(self) -> int:
        return len(self.items)

    def note(self) -> str:
        """What was skipped, in one line; "" if nothing was."""
        if not self.skipped:
            return ""
        first = self.skipped[0]
        return f"data.skip_bad_rows: {self.path}: {len(self.skipped)} skipped; first: {first}"


def read_rows(path: str, skip_bad_rows: bool = False) -> Rows[Row]:
    """The rows of a file, each with its place.

    A JSONL file holds one JSON object a line, in UTF-8, with no key twice; a byte-order mark, CRLF
    line ends and blank lines are accepted. Text anywhere in a row must be free of NUL and of lone
    surrogates, which neither tokenizers nor log files can carry.

    Args:
      path: a .jsonl or .parquet file, or ``package:relative/path`` for one inside an installed
        package, such as ``jaxrlhf:demo/openings_train.jsonl``.
      skip_bad_rows: leave a bad row out and say so in ``Rows.skipped``.

    Raises:
      InputError: a file that is missing, unreadable, empty or of another kind; a bad row, with
        ``path:line``.
    """
    source = locate(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    suffix = Path(source.name).suffix.lower()
    if suffix not in readers:
        raise InputError(f"{path}: unknown extension {suffix!r}; give a .jsonl or .parquet file")
    try:
        with source.open("rb") as file:
            return _collect(readers[suffix](file, path), _parse, path, (), skip_bad_rows)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from error


def transform(rows: Rows[S], function: Callable[[S], T], skip_bad_rows: bool = False) -> Rows[T]:
    """``function`` of every row; a row it raises InputError for stops all, or is skipped."""
    return _collect(rows.items, function, rows.path, rows.skipped, skip_bad_rows)


def locate(path: str) -> Traversable:
    """The file that ``path`` or ``package:relative/path`` names.

    Raises:
      InputError: there is none.
    """
    file = Path(path).expanduser()
    match = re.fullmatch(r"([A-Za-z_][\w.]+):(.+)", path)
    if match and not file.exists():
        package, relative = match.groups()
        try:
            root = resources.files(package)
            # The files that this package ships lie in data/.
            found = root.joinpath("data" if package == "jaxrlhf" else "", relative)
        except ImportError as error:
            message = f"{path}: no package {package!r} is installed; install it or give a file"
            raise InputError(message) from error
    else:
        found = file
    if not found.is_file():
        raise InputError(f"{path}: no such file; check the path")
    return found


def shown(value: Any, limit: int = 60) -> str:
    """``value`` as an error message shows it: one line, cut at ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_jsonl(file: IO[bytes], path: str) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(file, 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield f"{path}:{number}", text


def _read_parquet(file: IO[bytes], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in pq.ParquetFile(file).iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", values


class _TwiceError(ValueError):
    def __init__(self, key: str):
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ: of two alike, the first would go unseen."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _TwiceError(key)
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(raw: tuple[str, bytes | dict[str, Any]]) -> Row:
    where, content = raw
    try:
        values = _DECODER.decode(content.decode()) if isinstance(content, bytes) else content
        _check_text(values, where)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        message = f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8"
        raise InputError(message) from error
    except json.JSONDecodeError as error:
        message = f"{where}: not JSON ({error.msg} at character {error.pos + 1}); mend or drop it"
        raise InputError(message) from error
    except _TwiceError as error:
        message = f"{where}: key {shown(error.key)} stands twice in one object; keep one"
        raise InputError(message) from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({one_line(error)}); mend or drop it") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply; mend or drop it") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: {shown(values)} is no object; a row is {{column: value, …}}")
    return Row(values, where)


def _check_text(value: Any, where: str) -> None:
    """Raise InputError if a string anywhere in ``value`` holds NUL or a lone surrogate."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, where)
            _check_text(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_text(item, where)
    elif isinstance(value, str):
        found = re.search(r"[\0\ud800-\udfff]", value)
        if found:
            kind = "a NUL" if found[0] == "\0" else f"a lone surrogate {found[0]!r}"
            message = f"{where}: {kind} at character {found.start() + 1} of {shown(value)}"
            raise InputError(f"{message}; remove it")


def _collect(
    items: Iterable[S],
    function: Callable[[S], T],
    path: str,
    skipped: tuple[str, ...],
    skip_bad_rows: bool,
) -> Rows[T]:
    kept: list[T] = []
    bad = list(skipped)
    for item in items:
        try:
            kept.append(function(item))
        except InputError as error:
            if not skip_bad_rows:
                raise
            bad.append(str(error))
    if not kept and bad:
        raise InputError(f"{path}: none of its {len(bad)} rows is usable; the first: {bad[0]}")
    if not kept:
        raise InputError(f"{path}: no rows; give a file with at least one")
    return Rows(tuple(kept), path, tuple(bad))


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
