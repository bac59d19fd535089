"""YAML and command-line words → a validated Config, and back.

The same fields everywhere: ``optim.learning_rate`` in this file's errors is ``learning_rate`` under
``optim`` in the YAML, ``config.optim.learning_rate`` in Python and ``--optim.learning-rate`` on the
command line.
"""

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pydantic
import tyro
import yaml

from jaxrlhf.config.run import Config
from jaxrlhf.core.errors import InputError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The Config that a YAML file and the overrides after it describe.

    Types, names and choices are checked here; ``check`` holds the rules between fields.

    Args:
      path: a YAML file; fields that it leaves out have their defaults.
      overrides: see ``override``.

    Raises:
      InputError: no such file, bad YAML, an unknown key, a value of the wrong type.
      SystemExit: an override that does not parse; tyro has said why on stderr.
    """
    config = build(Config, read(Path(path)), str(path))
    return override(config, overrides) if overrides else config


def dump(config: Config) -> str:
    """Every field of ``config``, defaults included, as YAML that loads to an equal Config."""
    # ASCII, with escapes: with allow_unicode PyYAML reads some line separators back as spaces.
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def save(config: Config, path: str | Path) -> None:
    """Write ``dump(config)`` to a file."""
    Path(path).write_text(dump(config), encoding="utf-8")


def override(config: Config, words: Sequence[str], prog: str = "jaxrlhf train CONFIG") -> Config:
    """``config`` with some of its fields changed by command-line words.

    Flags (``--optim.learning-rate 1e-5``, ``--data.packing``, ``--data.no-packing``,
    ``--sample.stop 1 2``, ``--rewards.0.weight 2``; ``-`` and ``_`` are the same) or assignments
    (``optim.learning_rate=1e-5``, ``data.packing=true``); of two for one field the last counts.
    They change fields of parts that are there: another algorithm, one more reward, LoRA or a
    decoder where there is none are written in the YAML.

    Raises:
      InputError: a number that is not finite.
      SystemExit: on ``--help``, and on words that tyro refuses.
    """
    constants = _constants(type(config.algorithm), _members(get_type_hints(Config)["algorithm"]))
    for word in words:
        named = re.match(r"(?:--)?algorithm\.(?:no[-_])?([\w-]+)", word)
        if named and (name := named[1].replace("-", "_")) in constants:
            unread = f"{config.algorithm.name} does not read it: leave it out"
            raise InputError(f"command line: algorithm.{name}: {unread}")
    # tyro parses by the types of the fields; what it made is checked as YAML is.
    changed = tyro.cli(
        Config,
        prog=prog,
        description="Train as CONFIG, a YAML file, says; each option changes one of its fields.",
        args=[_flag(word) for word in words],
        default=config,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return build(Config, dataclasses.asdict(changed), "command line")


def read(path: Path) -> Any:
    """The contents of a YAML file, as plain lists, dicts and scalars."""
    try:
        content = yaml.load(path.read_bytes(), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise InputError(f"{path}: the file is empty: give at least algorithm, model and data")
    return content


def packaged(name: str) -> Path:
    """A file of configs/, which lies inside an installed package and beside its source."""
    package = Path(__file__).parents[1]
    inside = package / "configs" / name
    return inside if inside.exists() else package.parent / "configs" / name


def build(kind: Any, value: Any, source: str, key: str = "") -> Any:
    """``value``, as read from YAML, as a ``kind``: a dataclass, a tuple of them, or a leaf.

    Args:
      kind: a type as it stands in the annotation of a field.
      source: where the value comes from, for the error: a file or "command line".
      key: the dotted name of the field, "" at the top.
    """
    # null means absent only where a field may be absent.
    if value is None and types.NoneType in get_args(kind):
        return None
    members = _members(kind)
    if dataclasses.is_dataclass(members[0]):
        return _section(members, value, source, key)
    if get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]):
        if not isinstance(value, list | tuple):
            raise InputError(f"{source}: {key}={value!r:.80}: should be a list")
        item = get_args(kind)[0]
        return tuple(build(item, v, source, f"{key}.{i}") for i, v in enumerate(value))
    return _leaf(kind, value, source, key)


def _section(members: Sequence[type], value: Any, source: str, key: str) -> Any:
    """A mapping → one of the dataclasses ``members``, told apart by their ``name``."""
    if not isinstance(value, Mapping):
        named = f"{key}={value!r:.80}: " if key else ""
        raise InputError(f"{source}: {named}should be keys with values, one a line")
    prefix = f"{key}." if key else ""
    kind = _named(members, value, source, prefix) if len(members) > 1 else members[0]
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    constants = _constants(kind, members)
    # A constant of this algorithm, as older versions wrote it, says nothing new.
    value = {n: v for n, v in value.items() if n not in constants or v != constants[n]}
    for name in value:
        if name in constants:
            why = f"{kind.name} does not read it: leave it out"  # type: ignore[attr-defined]
            raise InputError(f"{source}: {prefix}{name}={value[name]!r:.80}: {why}")
        if name not in fields:
            close = difflib.get_close_matches(str(name).replace("-", "_"), fields, 1)
            known = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            raise InputError(f"{source}: {prefix}{name}: unknown key ({known})")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise InputError(f"{source}: {prefix}{name}: missing, and it has no default")
    hints = get_type_hints(kind)
    return kind(**{n: build(hints[n], v, source, f"{prefix}{n}") for n, v in value.items()})


def _constants(kind: type, members: Sequence[type]) -> dict[str, Any]:
    """The settings of others of ``members`` that are constants of ``kind``, and their values."""
    others = {field.name for member in members for field in dataclasses.fields(member)}  # type: ignore[arg-type]
    own = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return {name: getattr(kind, name) for name in others - own if hasattr(kind, name)}


def _named(members: Sequence[type], value: Mapping, source: str, prefix: str) -> type:
    """The dataclass whose ``name`` the mapping gives."""
    known = {member.name: member for member in members}  # type: ignore[attr-defined]
    name = value.get("name")
    if isinstance(name, str) and name in known:
        return known[name]
    given = f"{prefix}name={name!r:.80}: unknown" if "name" in value else f"{prefix}name: missing"
    raise InputError(f"{source}: {given} (choose one of {', '.join(known)})")


def _leaf(kind: Any, value: Any, source: str, key: str) -> Any:
    """A scalar or a tuple of scalars; text that reads as a number is one (YAML's ``1e-5``)."""
    try:
        leaf = _adapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join([key, *(str(part) for part in first["loc"] if isinstance(part, int))])
        message = first["msg"].removeprefix("Input ")
        raise InputError(f"{source}: {key}={first['input']!r:.80}: {message}") from None
    # pydantic takes true for 1.
    if isinstance(value, bool) and not isinstance(leaf, bool):
        raise InputError(f"{source}: {key}={value}: should be a number, not true or false")
    return leaf


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(allow_inf_nan=False))


def _members(kind: Any) -> Sequence[Any]:
    """The types that a union joins, None left out; any other type alone."""
    if get_origin(kind) in (Union, types.UnionType):
        return [member for member in get_args(kind) if member is not types.NoneType]
    return [kind]


def _flag(word: str) -> str:
    """An assignment to a field of Config as a flag; every other word as it is."""
    match = re.fullmatch(r"(\w+)((?:\.\w+)*)=(.*)", word, re.DOTALL)
    if not match or match[1] not in Config.__dataclass_fields__:
        return word
    key, value = match[1] + match[2], match[3]
    if value.lower() == "true":
        return f"--{key}"
    if value.lower() == "false":
        head, dot, last = key.rpartition(".")
        return f"--{head}{dot}no-{last}"
    return f"--{key}={value}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key which is written twice, where YAML drops the first."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            problem = f"the key {key.value} stands here a second time"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# A date is text here, quoted or not.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
