"""Files by URL, on memory:// and on a fake of Google's store on the loopback."""

import os
import sys
import threading
from pathlib import Path

import pytest
from shared_store import google

from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.rows import read_rows


def test_rows_by_url_are_those_of_the_file_and_errors_name_the_url(store, capsys):
    store.pipe_file("/a/rows.jsonl", b'{"prompt": "one"}\n{"prompt": "two"}\n')
    rows = read_rows("memory://a/rows.jsonl")
    assert [row.values["prompt"] for row in rows.items] == ["one", "two"]
    assert rows.items[1].where == "memory://a/rows.jsonl:2"
    assert "memory://a/rows.jsonl: 0.0 MiB in" in capsys.readouterr().err
    # Again: nothing is copied, and nothing is said.
    assert len(read_rows("memory://a/rows.jsonl")) == 2
    assert capsys.readouterr().err == ""
    store.pipe_file("/a/torn.jsonl", b'{"prompt": \n')
    with pytest.raises(InputError, match=r"^memory://a/torn\.jsonl:1: not JSON"):
        read_rows("memory://a/torn.jsonl")


def test_fetch_of_what_has_changed_is_another_copy(store):
    store.pipe_file("/a/x.txt", b"old")
    old = remote.fetch("data.train", "memory://a/x.txt")
    store.pipe_file("/a/x.txt", b"newer")
    new = remote.fetch("data.train", "memory://a/x.txt")
    assert Path(old).read_bytes() == b"old"
    assert Path(new).read_bytes() == b"newer"
    assert remote.here("memory://a/x.txt") == new
    # Another process, which has fetched nothing.
    remote._here.clear()
    assert remote.here("memory://a/x.txt") == new
    assert remote.here("memory://a/never") == "memory://a/never"


def test_fetch_of_a_folder_takes_what_is_wanted_and_goes_on_after_a_kill(store, monkeypatch):
    for name, text in (("config.json", b"{}"), ("w.safetensors", b"www"), ("big.bin", b"bbbb")):
        store.pipe_file(f"/m/{name}", text)

    def wanted(names):
        return [name for name in names if not name.endswith(".bin")]

    got, get = [], type(store).get_file

    def killed(fs, source, target, **more):
        got.append(Path(source).name)
        if len(got) == 2:
            raise KeyboardInterrupt
        get(fs, source, target, **more)

    monkeypatch.setattr(type(store), "get_file", killed)
    with pytest.raises(KeyboardInterrupt):
        remote.fetch("model.path", "memory://m", wanted)
    assert remote.here("memory://m") == "memory://m"
    found = Path(remote.fetch("model.path", "memory://m", wanted))
    assert sorted(x.name for x in found.iterdir()) == ["config.json", "w.safetensors"]
    # The file that was whole is not fetched again.
    assert got == ["config.json", "w.safetensors", "w.safetensors"]


def test_fetch_by_several_at_once_copies_once(store, capsys):
    store.pipe_file("/a/x.txt", b"x" * 1000)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(remote.fetch("x", "memory://a/x.txt")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert capsys.readouterr().err.count("MiB in") == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://no/where", "model.path=memory://no/where: nothing is there: check it, and"),
        ("nope://a/b", "model.path=nope://a/b: nothing reads nope://…: give gs://…, s3://…"),
        ("gs://bucket/a", "model.path=gs://bucket/a: needs a package (Please install gcsfs"),
    ],
)
def test_fetch_says_what_is_wrong_in_one_line(url, message, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    # It may have been found before.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    with pytest.raises(InputError) as error:
        remote.fetch("model.path", url)
    assert str(error.value).startswith(message)
    if "gs:" in url:
        assert str(error.value).endswith("[gcs]'")
        with pytest.raises(InputError, match="needs a package"):
            remote.check_url("model.path", url)


def test_fetch_refuses_names_that_lead_out(store):
    store.store["/m/../../evil"] = store.open("/x", "wb")
    store.pipe_file("/m/a", b"")
    with pytest.raises(InputError, match="no name of a file inside of it"):
        remote.fetch("model.path", "memory://m")


def test_marked_are_the_steps_whose_mark_has_come():
    names = ["config.yaml", "checkpoints/2/state/a", "checkpoints/2.whole", "checkpoints/4/state/a"]
    assert remote.marked(names) == {2: ["checkpoints/2/state/a"]}
    assert remote.newest_of(names) == ["checkpoints/2/state/a"]
    # Copied by hand, without marks.
    assert remote.newest_of([x for x in names if ".whole" not in x]) == ["checkpoints/4/state/a"]
    assert remote.newest_of(["config.yaml"]) == []


def test_files_of_google_cloud_storage_are_read_and_written(tmp_path, store, monkeypatch):
    """By gcsfs, over HTTP, from a fake on the loopback."""
    with google(monkeypatch):
        fs, root = remote.store("output", "gs://bucket/run")
        (tmp_path / "a").write_bytes(os.urandom(1000))
        remote.put_whole(fs, tmp_path / "a", f"{root}/checkpoints/1/a")
        copy = remote.fetch("model.path", "gs://bucket/run")
        assert (Path(copy) / "checkpoints/1/a").read_bytes() == (tmp_path / "a").read_bytes()
        assert remote.read_text("output", "gs://bucket/run/none") == ""
