"""Rows of a .jsonl or .parquet file, each with its place; and what is in their columns, checked.

Whatever is wrong with a row is an InputError that begins with ``path:line``. ``transform`` takes
rows from stage to stage, and stops at the first bad one or leaves it out.
"""

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import pyarrow.parquet as pq

from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError, refused, to_install
from jaxrlhf.core.files import is_url, writing
from jaxrlhf.core.reading import NotJsonError, check_text, parse_json
from jaxrlhf.core.shown import one_line, shown

S = TypeVar("S")
T = TypeVar("T")
Message = dict[str, Any]
Text = str | list[Message]
"""Plain text or a chat."""


AT_ONCE = 64
"""Rows of Parquet that are made at once."""

MOST_EXPANDED, EXPANSION = 2**28, 100
"""Bytes that the rows of a Parquet file may become, beside so many times its size."""


@dataclass(frozen=True)
class Row:
    """One record of a file."""

    values: dict[str, Any]
    where: str
    """``path:line`` counted from 1; the row's number in Parquet."""

    def has(self, *keys: str) -> bool:
        """Whether all of these columns are filled: Parquet has a cell, if null, in every row."""
        return all(self.values.get(key) is not None for key in keys)


@dataclass(frozen=True)
class Rows(Generic[T]):
    """The usable rows of one file, at any stage from record to token ids."""

    items: tuple[T, ...]
    path: str
    skipped: tuple[str, ...] = ()
    """One line for each row left out under ``skip_bad_rows``: what was wrong, and where."""
    notes: tuple[str, ...] = ()
    """What else is to be said of the rows, a line each."""

    def __len__(self) -> int:
        return len(self.items)

    def note(self) -> str:
        """What was skipped, in one line, and the ``notes``; "" if there is nothing to say."""
        lines = self.notes
        if self.skipped:
            count, first = len(self.skipped), self.skipped[0]
            skipped = f"data.skip_bad_rows: {self.path}: {count} skipped; first: {first}"
            lines = (skipped, *lines)
        return "\n".join(lines)


def read_rows(path: str, skip_bad_rows: bool = False) -> Rows[Row]:
    """The rows of a file, each with its place.

    A JSONL file holds one JSON object a line, in UTF-8, with no key twice; a byte-order mark, CRLF
    line ends and blank lines are accepted. Text anywhere in a row must be free of NUL and of lone
    surrogates, which neither tokenizers nor log files can carry.

    A null inside of a column stands for a field that is not there, and is left out: Parquet writes
    one for every field that the struct has in some other row. Both formats give the same rows.

    Args:
      path: a .jsonl or .parquet file, here or by URL (``remote``), ``package:relative/path`` for
        one inside an installed package, such as ``jaxrlhf:demo/openings_train.jsonl``, or
        ``hf:org/name[/subset][@revision][:split]`` for a dataset of the Hugging Face hub, read by
        the package datasets; its split is train where none is named.
      skip_bad_rows: leave a bad row out and say so in ``Rows.skipped``.

    Raises:
      InputError: a file that is missing, unreadable, empty or of another kind; a bad row, with
        ``path:line``.
    """
    if on_hub(path):
        raw: Any = _guarded(_read_hub(path), path)
        return transform(Rows(raw, path), _parse, skip_bad_rows)
    source = locate(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    suffix = Path(source.name).suffix.lower()
    if suffix not in readers:
        raise InputError(f"{path}: unknown extension {suffix!r}; give a .jsonl or .parquet file")
    with refused(f"{path}: cannot be read", "check the file"):
        file = source.open("rb")
    with file:
        # Read while they are parsed: a file's raw rows are never all in memory.
        raw = _guarded(readers[suffix](file, path), path)
        return transform(Rows(raw, path), _parse, skip_bad_rows)


def transform(rows: Rows[S], function: Callable[[S], T], skip_bad_rows: bool = False) -> Rows[T]:
    """``function`` of every row; a row it raises InputError for stops all, or is skipped."""
    kept: list[T] = []
    bad = list(rows.skipped)
    for item in rows.items:
        try:
            kept.append(function(item))
        except InputError as error:
            if not skip_bad_rows:
                raise
            bad.append(str(error))
    # Skipping may thin a data set out, but never empty it: that is a wrong file, not a bad row.
    if not kept and bad:
        raise InputError(f"{rows.path}: none of its {len(bad)} rows is usable; the first: {bad[0]}")
    if not kept:
        raise InputError(f"{rows.path}: no rows; give a file with at least one")
    return Rows(tuple(kept), rows.path, tuple(bad), rows.notes)


def locate(path: str) -> Traversable:
    """The file that ``path`` or ``package:relative/path`` names, or the copy of a URL's; InputError
    if there is none."""
    if is_url(path):
        return Path(remote.fetch("data", path))
    # The functions of os.path raise over no name, however long or odd.
    file = Path(os.path.expanduser(path))
    match = re.fullmatch(r"([A-Za-z_][\w.]+):(.+)", path)
    found: Traversable = file
    # A file of that very name goes first.
    if match and not os.path.exists(file):
        package, relative = match.groups()
        try:
            # The files that this package ships lie in data/.
            inside = "data" if package == "jaxrlhf" else ""
            found = resources.files(package).joinpath(inside, relative)
        except (ImportError, TypeError, ValueError) as error:
            message = f"{path}: no package {package!r} is installed; install it or give a file"
            raise InputError(message) from error
    with suppress(OSError, ValueError):
        if found.is_file():
            return found
    raise InputError(f"{path}: no such file; check the path")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL, UTF-8; InputError if the file cannot be written."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(path):
        Path(path).write_text("".join(lines), encoding="utf-8")


_ON_HUB = re.compile(
    r"hf:([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w.-]+))?(?:@([\w./-]+))?(?::(\w+))?", re.ASCII
)


def on_hub(path: str) -> bool:
    """Whether ``path`` names a dataset of the Hugging Face hub, and no file here."""
    return path.startswith("hf:") and not os.path.exists(path)


def _read_hub(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    match = _ON_HUB.fullmatch(path)
    if match is None:
        raise InputError(f"{path}: no name of a dataset: hf:org/name[/subset][@revision][:split]")
    try:
        import datasets  # noqa: PLC0415 (an extra)
    except ImportError:
        raise InputError(f"{path}: needs the package datasets: {to_install('hf')}") from None
    name, subset, revision, split = match.groups()
    try:
        # Files of rows alone: since version 4 there is no code of a repository that it could run.
        rows = datasets.load_dataset(name, subset, split=split or "train", revision=revision)
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise InputError(
            f"{path}: the hub does not give it ({reason}): check the name; where there is no "
            "network, save it as .jsonl or .parquet where there is one, and give that"
        ) from None
    for number, values in enumerate(rows, 1):
        yield f"{path}:{number}", dict(values)


def _read_jsonl(file: IO[bytes], path: str) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(file, 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        # A blank line is no row, but counts as a line of the file.
        if text.strip():
            yield f"{path}:{number}", text


def _read_parquet(file: IO[bytes], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    size, number, expanded = file.seek(0, os.SEEK_END), 0, 0
    table = pq.ParquetFile(file)
    # Rows that are all alike take no room: a few bytes may say that there are billions.
    if table.metadata.num_rows > max(size, 2**20):
        rows = table.metadata.num_rows
        raise InputError(f"{path}: {rows} rows in {size} bytes: is it the right file?")
    for batch in table.iter_batches(batch_size=AT_ONCE):
        expanded += batch.nbytes
        if expanded > MOST_EXPANDED + EXPANSION * size:
            raise InputError(f"{path}: {size} bytes of Parquet become {expanded}: is it all right?")
        for values in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", values


def _guarded(rows: Iterator[T], path: str) -> Iterator[T]:
    """``rows``; whatever a library raises over the file is an InputError."""
    with refused(f"{path}: cannot be read", "check the file"):
        yield from rows


class _TwiceError(ValueError):
    """A key that stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    # Of two keys alike, json would keep the last, and the first would go unseen.
    if len(values) < len(pairs):
        raise _TwiceError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return values


def _parse(raw: tuple[str, bytes | dict[str, Any]]) -> Row:
    where, content = raw
    try:
        values = parse_json(content, _object) if isinstance(content, bytes) else content
        check_text(values, where)
    except NotJsonError as error:
        raise InputError(f"{where}: not JSON ({error}); mend or drop it") from None
    except _TwiceError as error:
        what = f"key {shown(error.args[0])} stands twice in one object; keep one"
        raise InputError(f"{where}: {what}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: {shown(values)} is no object; a row is {{column: value, …}}")
    return Row({name: _without_nulls(value) for name, value in values.items()}, where)


def _without_nulls(value: Any) -> Any:
    """``value`` without the fields of objects, at any depth, that are null; lists keep theirs."""
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def value_of(row: Row, key: str) -> Any:
    """Whatever stands in a column, or an InputError that names those there are."""
    if key not in row.values:
        keys = f"{', '.join(map(str, row.values)):.200}" or "none"
        raise InputError(f"{row.where}: no {key!r} among its columns ({keys}); {_remedy(row, key)}")
    return row.values[key]


RENAMED = {
    "prompt": ("question", "instruction", "query", "input", "problem"),
    "completion": ("answer", "response", "output", "solution", "chosen"),
    "rejected": ("reject", "loser"),
    "chosen": ("winner", "preferred"),
    "steps": ("completions",),
}
"""What others call our columns."""


def _remedy(row: Row, key: str) -> str:
    """How a row of another shape becomes one with ``key``; docs/from_trl.md has all of them."""
    if row.has("conversations"):
        return (
            "turn its conversations into messages: {from: human, value: x} is {role: user, content:"
            " x}, and gpt is assistant"
        )
    if key == "prompt" and row.has("messages"):
        return "give prompt: the messages up to the turn that is to be answered"
    if key in ("chosen", "rejected") and row.has("completion", "label"):
        return (
            "answers that are labelled one by one are for kto, bco, or pointwise_reward_model with "
            "kind: binary"
        )
    if key in ("chosen", "rejected", "label") and row.has("messages"):
        return "messages alone are for sft"
    if found := [name for name in RENAMED.get(key, ()) if row.has(name)]:
        return f"rename {found[0]} to {key}"
    return "add or rename one"


def text_of(row: Row, key: str) -> Text:
    """The plain text or chat in a column; InputError if there is none."""
    return as_text(value_of(row, key), key, row.where)


def list_of(row: Row, key: str) -> list[Any]:
    """The list in a column, as it stands there; InputError if there is none."""
    value = value_of(row, key)
    if not isinstance(value, list):
        raise InputError(f"{row.where}: {key}={shown(value)} is {type(value).__name__}, not a list")
    return value


def columns_of(row: Row, *used: str) -> dict[str, Any]:
    """The columns besides ``used``, which reward functions get by name."""
    arguments = {"prompts", "completions"} - set(used)
    for name in arguments:
        if row.has(name):
            raise InputError(f"{row.where}: column {name!r} is the name of an argument; rename it")
    return {name: x for name, x in row.values.items() if name not in arguments.union(used)}


def as_text(value: Any, name: str, where: str) -> Text:
    """``value`` if it is plain text that is not blank, or a chat; ``name`` is for the error.

    A message has a role, and content that is not blank: text, or a list of parts of text. It may be
    left out beside the assistant's calls of tools, and be blank in a system prompt.
    """
    if not isinstance(value, list):
        return as_string(value, name, where)
    if not value:
        raise InputError(f"{where}: {name} is an empty list; give messages or drop the row")
    for index, message in enumerate(value):
        turn = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: {turn}={shown(message)}: a message is {{role, content}}")
        as_string(message.get("role"), f"{turn}.role", where)
        _check_content(message, f"{turn}.content", where)
    return value


def _check_content(message: Message, name: str, where: str) -> None:
    """Raise InputError unless a message's content is text, or parts of text, where it needs one."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) for part in content):
            as_string(content, name, where)
        for index, part in enumerate(content):
            kind = part.get("type")
            if kind != "text":
                raise InputError(
                    f"{where}: {name}[{index}] is of type {shown(kind)}; only parts "
                    '{"type": "text", "text": …} can be read: drop the row'
                )
            if not isinstance(part.get("text"), str):
                as_string(part.get("text"), f"{name}[{index}].text", where)
    blank = content is None or not content_text(message).strip()
    # A turn may be a call alone, and a system prompt may say that there is none.
    calls = message["role"] == "assistant" and (CALLS & message.keys())
    none = message["role"] in ("system", "developer") and content is not None
    if (blank and not (calls or none)) or not isinstance(content, str | list | type(None)):
        as_string("" if isinstance(content, list) else content, name, where)


CALLS = {"tool_calls", "function_call"}
"""Fields of a message that hold calls of tools."""


def calls_of(message: Message) -> Iterator[tuple[str, dict[str, Any]]]:
    """The calls of tools in a message: where each stands, and its ``{name, arguments}``.

    What is no call, a template may still write; it is passed over.
    """
    for field in sorted(CALLS & message.keys()):
        calls = message[field] if isinstance(message[field], list) else [message[field]]
        for index, call in enumerate(calls):
            inner = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(inner, dict):
                yield f"{field}[{index}]" if field == "tool_calls" else field, inner


def content_text(message: Message) -> str:
    """The text of a message's content, that of its parts joined; "" where it has none."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def as_string(value: Any, name: str, where: str) -> str:
    """``value`` if it is text that is not blank."""
    if not isinstance(value, str):
        kind = "null or missing" if value is None else type(value).__name__
        message = f"{where}: {name}={shown(value)} is {kind}, not text; mend or drop the row"
        raise InputError(message)
    if not value.strip():
        raise InputError(f"{where}: {name}={shown(value)} is empty; fill it or drop the row")
    return value


def as_number(value: Any, name: str, where: str, remedy: str = ", or drop the row") -> float:
    """``value`` if it is a finite number, and no bool."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Arrays are float32, which ends at 3.4e38. The comparison is False for NaN too.
    if not number or not abs(value) < 1e38:
        raise InputError(f"{where}: {name}={shown(value)}: give a finite number{remedy}")
    return float(value)
