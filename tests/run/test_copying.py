"""The place of a run in a store, of each kind that tests can have."""

from contextlib import nullcontext

import fsspec
import pytest
from shared_store import google

from jaxrlhf.run.copying import Bucket, is_small, mark


@pytest.mark.parametrize("scheme", ["memory", "shared", "gs"])
def test_bucket_holds_files_by_their_names_in_the_run(scheme, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARED", str(tmp_path / "store"))
    fsspec.filesystem("memory").store.clear()
    sources = {f"checkpoints/{step}/state/a.b/{step}.0": tmp_path / str(step) for step in (1, 10)}
    for source in sources.values():
        source.write_text(source.name)
    with google(monkeypatch) if scheme == "gs" else nullcontext():
        store = Bucket(f"{scheme}://bucket/runs/a/")
        assert store.names() == {}
        store.put_all(sources)
        store.put("config.yaml", tmp_path / "1")
        names = store.names("checkpoints/1")
        assert list(names) == ["checkpoints/1/state/a.b/1.0"]
        assert store.whole(store.names()) == {}
        store.write(mark(1), [*names])
        store.write(mark(10), [*names, "checkpoints/10/lost"])
        assert store.whole(store.names()) == {1: [*names]}
        targets = {name: tmp_path / "here" / name for name in (*names, "config.yaml")}
        store.get_all(targets)
        assert [path.read_text() for path in targets.values()] == ["1", "1"]
        assert not list(tmp_path.rglob("*.part"))
        with pytest.raises(FileNotFoundError):
            store.read("none")
        store.remove_step(1)
        store.remove("config.yaml")
        assert set(store.names()) == {mark(10), "checkpoints/10/state/a.b/10.0"}


def test_small_files_are_those_beside_the_steps():
    small = ["config.yaml", "checkpoints/run.json", "tensorboard/events"]
    others = [
        "lease.json",
        "stage.json",
        ".lock",
        "a.part",
        "checkpoints/1.whole",
        "checkpoints/1/a",
    ]
    assert [name for name in small + others if is_small(name)] == small
