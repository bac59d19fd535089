"""Every field of a config is read somewhere: a setting that changes nothing is a bug."""

import ast
import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from jaxrlhf.config import Config, MeshConfig

PACKAGE = Path(__file__).parents[2] / "jaxrlhf"


def sections(kind):
    """The dataclasses that a type is made of, itself included."""
    if dataclasses.is_dataclass(kind):
        yield kind
        for hint in get_type_hints(kind).values():
            yield from sections(hint)
    for part in get_args(kind):
        yield from sections(part)


def attributes_read():
    """Names of all attributes that are read outside the config package itself."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "config":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    yield node.attr


READ = frozenset(attributes_read())
READ_WHOLE = {MeshConfig}
"""make_mesh reads all of its fields at once, by asdict."""

SECTIONS = sorted(set(sections(Config)) - READ_WHOLE, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_field_is_read(section):
    unread = {field.name for field in dataclasses.fields(section)} - READ
    assert not unread, f"{section.__name__}: no module of jaxrlhf reads {sorted(unread)}"


def test_sections_reach_the_nested_ones():
    names = {kind.__name__ for kind in SECTIONS}
    assert {"Config", "PPOConfig", "SFTConfig", "RopeScaling", "LoraConfig"} <= names
