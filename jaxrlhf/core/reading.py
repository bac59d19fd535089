"""Small files that others have written, JSON and YAML, read within limits.

Whatever the bytes, a reader gives plain values or an InputError that begins with the path, and the
line where there is one. What is read is at most ``MOST`` bytes, so that time and memory are bounded
too: JSON takes up to 24 times its size (``{},{},…``), and YAML some seconds a MiB.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import one_line, shown

MOST = 8 * 2**20
"""Bytes of a JSON file, unless its reader says otherwise."""

MOST_YAML = 2**17
"""Bytes of a YAML file."""

MOST_WRITTEN_OUT = 2**20
"""Characters of a YAML file, each alias written out as what it stands for."""

MOST_DEEP = 100
"""Lists and objects inside of one another: Python walks them by recursion."""

MOST_STEPS = 2**53
"""Steps that a run cannot have: beyond, floats do not tell one from the next."""


def read_bytes(path: str | Path, most: int = MOST, remedy: str = "check the path") -> bytes:
    """The contents of a file.

    Raises:
      InputError: it is not there, cannot be read, or has more than ``most`` bytes.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    # A ValueError is a name that no file can have, as one with a NUL.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{path}: {reason}: {remedy}") from None
    if len(content) > most:
        raise InputError(f"{path}: more than {most} bytes: is it the right file?")
    return content


def read_json(path: str | Path, most: int = MOST, remedy: str = "mend or remove it") -> Any:
    """What a JSON file holds.

    Raises:
      InputError: as ``read_bytes``; not JSON.
    """
    try:
        return parse_json(read_bytes(path, most))
    except NotJsonError as error:
        raise InputError(f"{path}: not JSON ({error}): {remedy}") from None


def read_object(path: str | Path, most: int = MOST, remedy: str = "mend or remove it") -> dict:
    """The object that a JSON file holds; errors as of ``read_json``, or that it holds none."""
    content = read_json(path, most, remedy)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object ({shown(content)}): {remedy}")
    return content


class NotJsonError(ValueError):
    """Why a text is not JSON."""


def parse_json(content: bytes, pairs_hook: Any = None) -> Any:
    """The value that UTF-8 text of JSON stands for.

    Args:
      pairs_hook: makes an object out of its pairs; a ValueError of it passes.

    Raises:
      NotJsonError: it is none.
    """
    try:
        text = content.decode()
        value = json.loads(text, parse_int=_integer, object_pairs_hook=pairs_hook)
    except UnicodeDecodeError as error:
        raise NotJsonError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}"
        raise NotJsonError(f"{error.msg} at {place}") from None
    except RecursionError:
        raise NotJsonError("nested too deeply") from None
    # So many brackets have to be there; most rows have fewer, and are not walked.
    if text.count("[") + text.count("{") > MOST_DEEP and _is_deep(value):
        raise NotJsonError("nested too deeply")
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie more than ``MOST_DEEP`` deep."""
    layer, depth = [value], 0
    while layer and depth <= MOST_DEEP:
        layer = [x for outer in layer for x in _items(outer)]
        depth += 1
    return bool(layer)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _integer(text: str) -> int:
    # float() of it would raise OverflowError, wherever it is used.
    if len(text) > 300:
        raise NotJsonError(f"a number of {len(text)} digits")
    return int(text)


def record_of(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl or samples.jsonl; None if it is no object with a step, which is a
    whole number from 0 on."""
    try:
        record = parse_json(line)
    except NotJsonError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < MOST_STEPS:
        return record
    return None


def check_text(value: Any, where: str, nul: bool = False) -> None:
    """Raise InputError if a text anywhere in ``value`` holds a lone surrogate, or unless ``nul`` a
    NUL: UTF-8, tokenizers and names of files cannot carry them."""
    if isinstance(value, str):
        found = re.search(r"[\0\ud800-\udfff]" if not nul else r"[\ud800-\udfff]", value)
        if found:
            kind = "a NUL" if found[0] == "\0" else f"a lone surrogate {found[0]!r}"
            message = f"{where}: {kind} at character {found.start() + 1} of {shown(value)}"
            raise InputError(f"{message}; remove it")
    elif isinstance(value, dict | list):
        for item in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            check_text(item, where, nul)


def read_yaml(path: str | Path) -> Any:
    """The contents of a YAML file, as plain lists, dicts and scalars; None if it is empty.

    Raises:
      InputError: as ``read_bytes``, of at most ``MOST_YAML``; as ``parse_yaml``; a lone
        surrogate.
    """
    try:
        content = parse_yaml(read_bytes(path, MOST_YAML, "give the path of a YAML file"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not YAML: {problem_of(error)}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {problem_of(error)}") from None
    check_text(content, str(path), nul=True)
    return content


def parse_yaml(text: str | bytes) -> Any:
    """The value that a text of YAML stands for, of the kinds that JSON has.

    Raises:
      yaml.YAMLError: it is none, has a key twice, or is longer than ``MOST_WRITTEN_OUT`` with each
        alias written out.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    # What PyYAML makes of "!!int x", "!!bool x" and "0b_".
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise yaml.YAMLError(f"a value that is not of its kind ({one_line(error)})") from None


def problem_of(error: yaml.YAMLError) -> str:
    """What PyYAML has to say of a text, in one line."""
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{problem:.200}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key which is written twice, where YAML drops the first, and aliases
    that stand for more than can be written out."""

    def fetch_flow_collection_start(self, kind: Any) -> None:
        # The scanner's time grows with the square of how many brackets are open.
        if self.flow_level >= MOST_DEEP:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(kind)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _written_out(node, {})
        return node


def _written_out(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Characters of what a node stands for, at least one a node, and how deep it is nested.

    Args:
      known: those of nodes seen before, by id; (0, 0) for those that ``node`` lies in.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value), 0
    if id(node) not in known:
        known[id(node)] = 0, 0
        items = _pairs(node) if isinstance(node, yaml.MappingNode) else node.value
        sizes, depths = zip((1, 0), *(_written_out(item, known) for item in items), strict=True)
        known[id(node)] = sum(sizes), 1 + max(depths)
    size, depth = known[id(node)]
    if size == 0 or size > MOST_WRITTEN_OUT or depth > MOST_DEEP:
        problem = "too much, by its aliases" if size else "an alias of what it stands in"
        problem = "nested too deeply" if depth > MOST_DEEP else problem
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return size, depth


def _pairs(node: yaml.MappingNode) -> Iterator[yaml.Node]:
    return chain.from_iterable(node.value)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            problem = f"the key {key.value} stands here a second time"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    # As of JSON; 60 to the power of 100, base and most colons, is a float too.
    if len(node.value) > 200:
        problem = f"a number of {len(node.value)} digits"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# Nothing that JSON has not: no binary, no set, and a date is text, quoted or not.
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: make
    for tag, make in _Loader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _KINDS
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
