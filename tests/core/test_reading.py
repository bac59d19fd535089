"""Files of others: values, or an error with their path; never more than was asked for."""

import pytest
import yaml

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.reading import (
    MOST_STEPS,
    MOST_YAML,
    parse_yaml,
    read_bytes,
    read_json,
    read_object,
    read_yaml,
    record_of,
)

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
"""Ten to the power of twelve items, as the file is written out."""
MERGED = "m0: &m0 {k: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)

YAML = {
    "aliases": (BOMB, r":\d+: not YAML: too much, by its aliases"),
    "merged aliases": (MERGED, r":\d+: not YAML: too much, by its aliases"),
    "itself": ("a: &a [*a]", ":1: not YAML: an alias of what it stands in"),
    "nested": ("[" * 50_000, ":1: not YAML: nested too deeply"),
    "tag": ("a: !!int x", ": not YAML: a value that is not of its kind"),
    "digits": ("a: 0x" + "9" * 5000, ":1: not YAML: a number of 5002 digits"),
    "binary": ("a: !!binary aGk=", ":1: not YAML: could not determine a constructor"),
    "python": ("a: !!python/object/apply:os.system [ls]", ":1: not YAML: could not determine"),
    "long tag": ("!" * 10**5, ":1: not YAML: "),
    "surrogate": ('a: "\\uD800"', ": a lone surrogate"),
    "size": ("#" * (MOST_YAML + 1), ": more than 131072 bytes"),
    "not UTF-8": (b"a: \xff", ": not YAML: "),
}


@pytest.mark.parametrize("name", YAML)
def test_read_yaml_refuses(name, tmp_path):
    content, message = YAML[name]
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"^{path}{message}") as caught:
        read_yaml(path)
    assert len(str(caught.value)) < 400


def test_parse_yaml_reads_what_json_has():
    text = 'base: &b {a: 1, b: [x, null]}\nc: {<<: *b, d: 2026-01-31, e: "2", f: 1.5, g: yes}\n'
    base = {"a": 1, "b": ["x", None]}
    c = {**base, "d": "2026-01-31", "e": "2", "f": 1.5, "g": True}
    assert parse_yaml(text) == {"base": base, "c": c}
    with pytest.raises(yaml.YAMLError, match="a second time"):
        parse_yaml("a: 1\na: 2")


JSON = {
    b"{": "not JSON .* at line 1, character 2",
    b"[" * 10**5: "not JSON .nested too deeply",
    b'"\xff"': "not JSON .not UTF-8 at byte 2",
    b"9" * 5000: "not JSON .a number of 5000 digits",
    b"[1, 2]": r"not a JSON object \(\[1, 2\]\)",
    b" " * 101: "more than 100 bytes",
}


@pytest.mark.parametrize("content", JSON)
def test_read_object_refuses(content, tmp_path):
    (path := tmp_path / "x.json").write_bytes(content)
    most = 100 if content.isspace() else 10**6
    with pytest.raises(InputError, match=f"^{path}: {JSON[content]}"):
        read_object(path, most)


def test_read_json_of_any_value(tmp_path):
    (path := tmp_path / "x.json").write_bytes(b'[1, -2.5, "\xc3\xa9", null, 1e5]')
    assert read_json(path) == [1, -2.5, "é", None, 1e5]


def test_read_bytes_names_what_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none", f"{tmp_path}/a\0b"):
        with pytest.raises(InputError, match="check the path"):
            read_bytes(path)


def test_record_of_a_line():
    assert record_of(b'{"step": 3, "loss": null}') == {"step": 3, "loss": None}
    bad = (b"", b"3", b"[]", b"{}", b'{"step": "3"}', b'{"step": 3.0}', b'{"step": true}', b"\xff")
    far = (b'{"step": -1}', b'{"step": %d}' % MOST_STEPS, b'{"step": %s}' % (b"9" * 5000))
    assert [record_of(line) for line in (*bad, *far)] == [None] * 11
