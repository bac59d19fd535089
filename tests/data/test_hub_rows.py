"""Rows of a dataset of the hub, a fake one on the loopback, read by the package datasets."""

import json

import pytest
from hub import COMMIT, believe_in, hub

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.rows import locate, on_hub, read_rows

datasets = pytest.importorskip("datasets", reason="the extra hf")

ROWS = [
    {"prompt": f"p{i}", "n": i, "messages": [{"role": "user", "content": "x"}]} for i in range(5)
]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]
FILES = {"train.jsonl": b"".join(LINES), "test.jsonl": LINES[0]}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub({("datasets", "org/rows"): FILES}) as server:
        believe_in(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        yield server


def test_read_rows_of_the_hub(server):
    rows = read_rows("hf:org/rows")
    assert [row.values for row in rows.items] == ROWS
    assert rows.items[2].where == "hf:org/rows:3"
    assert [row.values["n"] for row in read_rows("hf:org/rows:test").items] == [0]
    assert len(read_rows(f"hf:org/rows@{COMMIT}:train")) == 5


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf:org", r"no name of a dataset: hf:org/name\[/subset\]"),
        ("hf:org/none", "'org/none' doesn't exist on the Hub.*save it as .jsonl"),
        ("hf:org/rows:validation", "Unknown split"),
        ("hf:org/rows/main", "BuilderConfig 'main' not found"),
    ],
)
def test_read_rows_of_what_the_hub_has_not(server, path, message):
    with pytest.raises(InputError, match=f"^{path}: .*{message}"):
        read_rows(path)


def test_read_rows_runs_no_code(server):
    server.repositories["datasets", "org/code"] = {"code.py": b"raise SystemExit('run')"}
    with pytest.raises(InputError, match=r"hf:org/code: the hub does not give it"):
        read_rows("hf:org/code")


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert on_hub("hf:a.jsonl")
    (tmp_path / "hf:a.jsonl").write_bytes(LINES[0])
    assert not on_hub("hf:a.jsonl")
    assert len(read_rows("hf:a.jsonl")) == 1
    assert locate("hf:a.jsonl").name == "hf:a.jsonl"
