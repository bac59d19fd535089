"""Rows of files: each with its place, whatever is wrong with one said there; and the prompts of the
demo, which the package ships."""

import difflib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import shown
from jaxrlhf.data.rows import Row, Rows, locate, read_rows, transform
from jaxrlhf.rewards.functions import resolve

GOOD = {"prompt": "a"}


def test_read_rows_jsonl_keeps_line_numbers(jsonl):
    path = jsonl(GOOD, b"", b"  ", {"prompt": "b", "topic": 3})
    rows = read_rows(path)
    assert rows.items == (
        Row({"prompt": "a"}, f"{path}:1"),
        Row({"prompt": "b", "topic": 3}, f"{path}:4"),
    )
    assert rows.skipped == ()


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n',  # a byte-order mark, CRLF
        b'{"prompt": "a"}\n{"prompt": "b"}',  # no last line end
    ],
)
def test_read_rows_accepts_other_line_ends(content, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content)
    rows = read_rows(str(tmp_path / "x.jsonl"))
    assert [row.values["prompt"] for row in rows.items] == ["a", "b"]


def test_read_rows_parquet_counts_rows_over_row_groups(tmp_path):
    path = str(tmp_path / "x.parquet")
    chats = [[{"role": "user", "content": str(i)}] for i in range(5)]
    table = pa.table({"prompt": chats, "n": list(range(5))})
    pq.write_table(table, path, row_group_size=2)
    rows = read_rows(path)
    assert [row.where for row in rows.items] == [f"{path}:{i}" for i in range(1, 6)]
    assert rows.items[3].values == {"prompt": [{"role": "user", "content": "3"}], "n": 3}


BAD_LINES = {
    "truncated": (b'{"prompt": "a"', "not JSON"),
    "array": (b'["a"]', "is no object"),
    "number": (b"3", "is no object"),
    "null": (b"null", "is no object"),
    "raw NUL": (b'{"prompt": "a\0b"}', "not JSON"),
    "NUL": (b'{"prompt": "a\\u0000b"}', "a NUL at character 2"),
    "NUL in a chat": (b'{"prompt": [{"role": "user", "content": "\\u0000"}]}', "a NUL"),
    "NUL in a key": (b'{"pro\\u0000mpt": "a"}', "a NUL"),
    "surrogate": (b'{"prompt": "a\\ud800"}', "a lone surrogate '\\ud800' at character 2"),
    "raw surrogate": (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
    "latin-1": (b'{"prompt": "caf\xe9"}', "not UTF-8"),
    "nested": (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "key twice": (b'{"prompt": "a", "x": 1, "x": 1}', "key 'x' stands twice in one object"),
    "key twice in a chat": (
        b'{"prompt": [{"role": "user", "content": "a", "content": "b"}]}',
        "key 'content' stands twice",
    ),
    "long number": (b'{"x": ' + b"9" * 5000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_read_rows_bad_line_names_its_place(jsonl, name):
    line, message = BAD_LINES[name]
    path = jsonl(GOOD, line, GOOD)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 300
    rows = read_rows(path, skip_bad_rows=True)
    assert [row.where for row in rows.items] == [f"{path}:1", f"{path}:3"]
    assert rows.skipped == (text,)


def test_read_rows_pair_of_surrogates_and_ten_megabytes(jsonl):
    path = jsonl(b'{"prompt": "\\ud83d\\ude00"}', {"prompt": "a " * 5_000_000})
    first, second = (row.values["prompt"] for row in read_rows(path).items)
    assert (first, len(second)) == ("😀", 10_000_000)


BAD_FILES = {
    b"": "no rows; give a file",
    b"\n\n": "no rows",
    b"\xef\xbb\xbf": "no rows",
    b"{\n[\n": "none of its 2 rows is usable; the first: .*:1: not JSON",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_read_rows_no_row_is_an_error_even_when_skipping(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.jsonl: {BAD_FILES[content]}"):
        read_rows(str(tmp_path / "x.jsonl"), skip_bad_rows=True)


def test_read_rows_files_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "x.csv").write_text("prompt\na\n")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    cases = {
        "absent.jsonl": "no such file",
        "folder.jsonl": "no such file",
        "x.csv": r"unknown extension '\.csv'; give a \.jsonl or \.parquet file",
        "x.parquet": "cannot be read",
        "jaxrlhf:demo/absent.jsonl": "no such file",
        "jaxrlhg:demo/x.jsonl": "no package 'jaxrlhg' is installed",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read_rows(name, skip_bad_rows=True)
        assert str(caught.value).startswith(f"{name}: ")
        assert "\n" not in str(caught.value)


def test_locate_prefers_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jaxrlhf:x.jsonl").write_text(json.dumps(GOOD))
    assert locate("jaxrlhf:x.jsonl").is_file()


def test_transform_adds_to_what_was_skipped():
    def half(item):
        if item % 2:
            raise InputError(f"x:{item}: odd")
        return item // 2

    rows = Rows((2, 3, 4), "x", ("before",))
    assert transform(rows, half, True) == Rows((1, 2), "x", ("before", "x:3: odd"))
    with pytest.raises(InputError, match="x:3: odd"):
        transform(rows, half)


def test_shown_is_one_short_line():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) == 60


def openings(split):
    rows = read_rows(f"jaxrlhf:demo/openings_{split}.jsonl").items
    assert rows[1].where == f"jaxrlhf:demo/openings_{split}.jsonl:2"
    assert all(row.values.keys() == {"prompt"} for row in rows)
    return [row.values["prompt"] for row in rows]


@pytest.mark.parametrize(("split", "least"), [("train", 160), ("eval", 40)])
def test_openings_are_neutral_and_short(split, least):
    prompts = openings(split)
    assert len(prompts) >= least
    assert resolve("sentiment")([""] * len(prompts), prompts) == [0.0] * len(prompts)
    assert all(4 <= len(prompt.split()) <= 12 for prompt in prompts)
    assert all(prompt == prompt.strip() and prompt[-1].isalpha() for prompt in prompts)


def test_openings_are_distinct_across_the_split():
    train, held_out = openings("train"), openings("eval")
    assert len(set(train + held_out)) == len(train) + len(held_out)
    for prompt in held_out:
        matcher = difflib.SequenceMatcher(b=prompt.split())
        for other in train:
            matcher.set_seq1(other.split())
            assert matcher.ratio() < 0.75, (prompt, other)


def test_read_rows_parquet_believes_no_size(tmp_path, monkeypatch):
    """Rows that are alike take no room in a file, and all there is in memory."""
    path = str(tmp_path / "x.parquet")
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2**21, np.int32)), ["a"])
    pq.write_table(pa.table({"prompt": rows}), path)
    with pytest.raises(InputError, match=r"x\.parquet: 2097152 rows in \d+ bytes"):
        read_rows(path)
    # One text a thousand times.
    monkeypatch.setattr("jaxrlhf.data.rows.MOST_EXPANDED", 2**20)
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), ["a" * 2**16])
    pq.write_table(pa.table({"prompt": rows}), path, compression="zstd", store_schema=False)
    with pytest.raises(InputError, match=r"x\.parquet: \d+ bytes of Parquet become \d+"):
        read_rows(path)


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a\0b", "~nobody/x.jsonl", "a..b:x.jsonl", "os.path:x"]
)
def test_locate_of_what_is_no_file(path):
    with pytest.raises(InputError, match=r"no such file|no package"):
        locate(path)
