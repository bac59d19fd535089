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
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pydantic
import tyro
import yaml

from jaxrlhf.config.run import Config
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import write_atomic
from jaxrlhf.core.reading import parse_yaml, problem_of, read_yaml
from jaxrlhf.core.shown import shown


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The Config that a YAML file and the overrides after it describe.

    Types, names and choices are checked here; ``check`` holds the rules between fields.

    Args:
      path: a YAML file, or ``jaxrlhf:configs/NAME``, one of this package's; fields that it leaves
        out have their defaults.
      overrides: see ``override``.

    Raises:
      InputError: no such file, bad YAML, an unknown key, a value of the wrong type.
      SystemExit: an override that does not parse; tyro has said why on stderr.
    """
    config = build(Config, read(locate_config(path)), str(path))
    return override(config, overrides) if overrides else config


def dump(config: Config) -> str:
    """Every field of ``config``, defaults included, as YAML that loads to an equal Config."""
    # ASCII, with escapes: with allow_unicode PyYAML reads some line separators back as spaces.
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def save(config: Config, path: str | Path) -> None:
    """Write ``dump(config)`` to a file."""
    write_atomic(path, dump(config))


def override(config: Config, words: Sequence[str], prog: str = "jaxrlhf train CONFIG") -> Config:
    """``config`` with some of its fields changed by command-line words.

    Flags (``--optim.learning-rate 1e-5``, ``--data.packing``, ``--data.no-packing``,
    ``--sample.stop 1 2``, ``--rewards.0.weight 2``; ``-`` and ``_`` are the same) or assignments
    (``optim.learning_rate=1e-5``, ``data.packing=true``, ``sample.stop=[1, 2]``); of two for one
    field the last counts. A value is read as in the YAML (``null``, which may also be ``None``,
    ``[q, v]``, ``{a: 1}``), but a field of text takes it as it is.
    They change fields of parts that are there: another algorithm, one more reward, LoRA or a
    decoder where there is none are written in the YAML.

    Raises:
      InputError: a value that is not YAML or of the wrong type, a number that is not finite, a
        value for a whole part.
      SystemExit: on ``--help``, and on words that name no field or lack a value; tyro says why.
    """
    constants = _constants(type(config.algorithm), _members(get_type_hints(Config)["algorithm"]))
    for word in words:
        named = re.match(r"(?:--)?algorithm\.(?:no[-_])?([\w-]+)", word)
        if named and (name := named[1].replace("-", "_")) in constants:
            unread = f"{config.algorithm.name} does not read it: leave it out"
            raise InputError(f"command line: algorithm.{name}: {unread}")
    content = dataclasses.asdict(config)
    left, unknown = list(words), []
    while left:
        word = left.pop(0)
        found = _named_by(config, word)
        values = None if found is None else _values(config, found, left)
        if found is None or values is None:
            unknown.append(_flag(word))
            continue
        section: Any = content
        for part in found.path[:-1]:
            section = section[part]
        section[found.path[-1]] = _parsed(found, values)
    if unknown:
        # tyro knows the same fields, has the help, and finds the nearest name to a wrong one.
        tyro.cli(
            Config,
            prog=prog,
            description="Train as CONFIG, a YAML file, says; each option changes one of its "
            "fields, and so does an assignment, as optim.warmup=5. Values are written as in the "
            "YAML: null, [1, 2], {a: 1}. --resume-with-changes, anywhere, goes on with a run that "
            "was begun with other settings.",
            args=unknown,
            default=config,
            config=(tyro.conf.AvoidSubcommands,),
        )
        raise InputError(f"command line: {unknown[0]}: is no field of CONFIG (see --help)")
    return build(Config, content, "command line")


class _Field(NamedTuple):
    """A field that a command-line word names."""

    path: list[str | int]
    kind: Any
    """The type in its annotation."""
    value: str | None
    """What stands behind ``=``; None without one."""
    off: bool
    """Whether a flag says no: ``--data.no-packing``."""

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


def _named_by(config: Config, word: str) -> _Field | None:
    """The field that ``--key``, ``--key=value`` or ``key=value`` names; None if it names none."""
    match = re.fullmatch(r"(--)?([\w.-]+?)(?:=(.*))?", word, re.DOTALL)
    if not match or not (match[1] or match[3] is not None):
        return None
    key = match[2].replace("-", "_")
    parts = (_aliases().get(key, key) if match[1] else key).split(".")
    at, kind, path, off = config, Config, [], False
    for part in parts:
        hints = get_type_hints(type(at)) if dataclasses.is_dataclass(at) else {}
        bare = part.removeprefix("no_")
        if isinstance(at, tuple) and part.isdecimal() and int(part) < len(at):
            at, name = at[int(part)], int(part)
            kind = type(at) if dataclasses.is_dataclass(at) else None
        elif part in hints or (match[1] and match[3] is None and hints.get(bare) is bool):
            name = part if part in hints else bare
            off, kind, at = part not in hints, hints[name], getattr(at, name)
        else:
            return None
        path.append(name)
    # Which algorithm it is decides what fields there are.
    if kind is None or path == ["algorithm", "name"]:
        return None
    return _Field(path, kind, match[3], off)


@functools.cache
def _aliases() -> dict[str, str]:
    """Short flags → dotted keys: ``process`` → ``distributed.process``."""
    return {
        alias.removeprefix("--"): f"{section}.{name}"
        for section, kind in get_type_hints(Config).items()
        if dataclasses.is_dataclass(kind)
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for note in getattr(hint, "__metadata__", ())
        for alias in getattr(note, "aliases", None) or ()
    }


def _values(config: Config, field: _Field, left: list[str]) -> list[str] | None:
    """The words that are the field's value, taken off ``left``; None if it lacks one."""
    if field.value is not None:
        return [field.value]
    if field.kind is bool:
        return ["false" if field.off else "true"]
    several = _item(field.kind) is not None
    values = []
    while left and not left[0].startswith("--") and (several or not values):
        # A list ends where the next assignment begins; one value may look like one.
        if several and _named_by(config, left[0]):
            break
        values.append(left.pop(0))
    return values if values or several else None


def _parsed(field: _Field, values: Sequence[str]) -> Any:
    """The value of a field as a YAML file would have it."""
    members, item = _members(field.kind), _item(field.kind)
    if any(map(dataclasses.is_dataclass, (*members, item))):
        if types.NoneType in get_args(field.kind) and values in (["null"], ["None"]):
            return None
        given = f"command line: {field.key}={shown(' '.join(values), 80)}"
        raise InputError(f"{given}: a whole part: give its fields one by one, or in the YAML")
    if item is None:
        return _scalar(field.kind, values[0], field.key)
    if len(values) == 1 and values[0].lstrip().startswith("["):
        return _yaml(values[0], field.key)
    return [_scalar(item, value, field.key) for value in values]


def _item(kind: Any) -> Any:
    """The type of the items of a list; None for any other type."""
    found = (get_args(member)[0] for member in _members(kind) if get_origin(member) is tuple)
    return next(found, None)


def _scalar(kind: Any, text: str, key: str) -> Any:
    if types.NoneType in get_args(kind) and text in ("null", "None"):
        return None
    words = all(
        member is str or (get_origin(member) is Literal and isinstance(get_args(member)[0], str))
        for member in _members(kind)
    )
    return text if words else _yaml(text, key)


def _yaml(text: str, key: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"command line: {key}={shown(text, 80)}: not YAML ({problem_of(error)}): write it as "
            "5, null, [1, 2] or {a: 1}"
        ) from None


def _flag(word: str) -> str:
    """An assignment to what might be a field of Config as a flag; every other word as it is."""
    match = re.match(r"(\w+)[\w.-]*=", word)
    return f"--{word}" if match and match[1] in Config.__dataclass_fields__ else word


def read(path: Path) -> Any:
    """The contents of a YAML file that is not empty, as plain lists, dicts and scalars."""
    content = read_yaml(path)
    if content is None:
        raise InputError(f"{path}: the file is empty: give at least algorithm, model and data")
    return content


def packaged(name: str = "") -> Path:
    """A file of configs/, which lies inside an installed package and beside its source."""
    package = Path(__file__).parents[1]
    inside = package / "configs" / name
    return inside if inside.exists() else package.parent / "configs" / name


PACKAGED = "jaxrlhf:configs/"
"""What the name of a config begins with that comes with this package."""


def locate_config(path: str | Path) -> Path:
    """The file that ``path`` names, or that ``jaxrlhf:configs/NAME`` does in this package.

    Raises:
      InputError: none of those has this name; the message names close ones.
    """
    if not str(path).startswith(PACKAGED) or Path(path).exists():
        return Path(path)
    name, root = str(path).removeprefix(PACKAGED), packaged()
    known = sorted(x.relative_to(root).as_posix() for x in root.rglob("*.yaml"))
    if name not in known:
        close = difflib.get_close_matches(name, known, 3, 0.4)
        remedy = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
        raise InputError(f"{path}: no such config in the package ({remedy})")
    return packaged(name)


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
            raise InputError(f"{source}: {key}={shown(value, 80)}: should be a list")
        item = get_args(kind)[0]
        return tuple(build(item, v, source, f"{key}.{i}") for i, v in enumerate(value))
    return _leaf(kind, value, source, key)


def _section(members: Sequence[type], value: Any, source: str, key: str) -> Any:
    """A mapping → one of the dataclasses ``members``, told apart by their ``name``."""
    if not isinstance(value, Mapping):
        named = f"{key}={shown(value, 80)}: " if key else ""
        raise InputError(f"{source}: {named}should be keys with values, one a line")
    prefix = f"{key}." if key else ""
    kind = _named(members, value, source, prefix) if len(members) > 1 else members[0]
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    constants = _constants(kind, members)
    # A constant of this algorithm, as older versions wrote it, says nothing new.
    value = {n: v for n, v in value.items() if n not in constants or v != constants[n]}
    for name in value:
        said = f"{prefix}{name:.80}" if isinstance(name, str) else f"{prefix}{shown(name)}"
        if name in constants:
            why = f"{kind.name} does not read it: leave it out"  # type: ignore[attr-defined]
            raise InputError(f"{source}: {said}={shown(value[name], 80)}: {why}")
        if name not in fields:
            close = difflib.get_close_matches(
                said.removeprefix(prefix).replace("-", "_"), fields, 1
            )
            known = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            raise InputError(f"{source}: {said}: unknown key ({known})")
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
    given = f"name={shown(name, 80)}: unknown" if "name" in value else "name: missing"
    raise InputError(f"{source}: {prefix}{given} (choose one of {', '.join(known)})")


def _leaf(kind: Any, value: Any, source: str, key: str) -> Any:
    """A scalar or a tuple of scalars; text that reads as a number is one (YAML's ``1e-5``)."""
    try:
        leaf = _adapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join([key, *(str(part) for part in first["loc"] if isinstance(part, int))])
        message = first["msg"].removeprefix("Input ")
        raise InputError(f"{source}: {key}={shown(first['input'], 80)}: {message}") from None
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
