"""A run whose output is a URL: what is there after kills, failures and on another machine."""

import json
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import runs

from jaxrlhf.core import remote
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.signals import Stop
from jaxrlhf.models.load import load_model
from jaxrlhf.run import copying, lease, loop, mirror
from jaxrlhf.run.session import Session

URL = "memory://bucket/run"


class Died(BaseException):
    """A machine that is gone: nothing after it is done."""


@pytest.fixture
def store(tmp_path, monkeypatch):
    """memory://, empty; nothing is copied but at the end, and by ``flush``."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    monkeypatch.setattr(remote, "_here", {})
    monkeypatch.setattr(copying, "PAUSE", 1000.0)
    monkeypatch.setattr(lease, "SECONDS", 0.2)
    monkeypatch.setattr(copying, "TRIES", (0.01, 0.01))
    machine(monkeypatch, tmp_path, "first")
    yield fs
    fs.store.clear()


def machine(monkeypatch, tmp_path, name):
    """Another machine: its home has nothing."""
    monkeypatch.setenv("HOME", str(tmp_path / name))
    monkeypatch.setattr(lease.socket, "gethostname", lambda: name)


def train(config):
    return loop.train(config, runs.one_device())


def lines(fs, name="metrics.jsonl"):
    """The figures that follow from the seed, of each line."""
    text = fs.cat_file(f"/bucket/run/{name}").decode()
    found = [json.loads(line) for line in text.splitlines()]
    kept = ("step", "score", "loss", "kl", "grad_norm", "eval/loss")
    return [{key: x[key] for key in kept if key in x} for x in found]


def names(fs):
    return {name.removeprefix("/bucket/run/") for name in fs.find("/bucket/run")}


def flushed_saves(monkeypatch):
    """Each checkpoint is copied as soon as it is whole, in the main thread."""
    save = Session.save

    def saving(session, done):
        save(session, done)
        session.checkpoints.wait()
        session._mirror._copy()

    monkeypatch.setattr(Session, "save", saving)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The figures of a run on a disk, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(runs.ppo(folder))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pipe_file("/bucket/run/metrics.jsonl", (folder / "run/metrics.jsonl").read_bytes())
    return lines(fs)


def test_machine_that_dies_in_a_copy_is_replaced_by_one_with_nothing(
    store, tmp_path, monkeypatch, whole, capsys
):
    """The rows too are read by URL; step 4's copy is cut, so the second machine begins at 2."""
    config = runs.ppo(tmp_path, output=URL)
    rows = Path(config.data.train)
    store.pipe_file("/bucket/rows.jsonl", rows.read_bytes())
    rows.unlink()
    config = replace(config, data=replace(config.data, train="memory://bucket/rows.jsonl"))
    with monkeypatch.context() as patch:
        flushed_saves(patch)
        put = remote.put_whole

        def dying(fs, source, target):
            if "/checkpoints/4/state" in target:
                raise Died
            put(fs, source, target)

        patch.setattr(remote, "put_whole", dying)
        # Of a machine that is gone the lease stays, and is not renewed.
        patch.setattr(mirror.Mirror, "end", lambda self: self.lease._over.set())
        with pytest.raises(Died):
            train(config)
    there = names(store)
    assert "checkpoints/2.whole" in there
    assert "checkpoints/4.whole" not in there
    assert any(name.startswith("checkpoints/4/") for name in there)
    machine(monkeypatch, tmp_path, "second")
    train(config)
    said = capsys.readouterr()
    assert f"{URL}: step 2 is brought to {tmp_path}/second" in said.err
    assert "resumed after iteration 2 of 4" in said.out
    assert lines(store) == whole
    there = names(store)
    assert {"config.yaml", "summary.json", "report.html", "checkpoints/4.whole"} <= there
    assert "lease.json" not in there
    assert f"output: {URL}" in store.cat_file("/bucket/run/config.yaml").decode()
    # And as a model, on a third.
    machine(monkeypatch, tmp_path, "third")
    model, params, _ = load_model(URL)
    assert model.decoder == runs.DECODER
    assert set(params) >= {"embed", "layers"}


def tiny_folder(store, tmp_path, monkeypatch):
    """A mirror of a folder with one step, by hand."""
    folder = remote.scratch(URL)
    step = folder / "checkpoints/2"
    (step / "host").mkdir(parents=True)
    (step / "host/metadata").write_text("{}")
    (step / "array").write_text("2")
    (folder / "checkpoints/run.json").write_text('{"run": "a"}')
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_steps_come_whole_or_not_at_all_and_go_with_those_here(store, tmp_path, monkeypatch):
    folder = tiny_folder(store, tmp_path, monkeypatch)
    (folder / ".lock").write_text("")
    (folder / "a.part").write_text("")
    (folder / "checkpoints/damaged/1").mkdir(parents=True)
    (folder / "checkpoints/damaged/1/a").write_text("")
    with mirror.mirrored(URL) as here:
        here.flush()
        first = names(store)
        (folder / "checkpoints/2").rename(folder / "checkpoints/3")
        here.flush()
    assert first == {
        "lease.json", "metrics.jsonl", "checkpoints/run.json", "checkpoints/2/host/metadata",
        "checkpoints/2/array", "checkpoints/2.whole",
    }  # fmt: skip
    assert {name for name in names(store) if name.startswith("checkpoints/")} == {
        "checkpoints/run.json", "checkpoints/3/host/metadata", "checkpoints/3/array",
        "checkpoints/3.whole",
    }  # fmt: skip


def test_changed_step_loses_its_mark_until_it_is_whole_again(store, tmp_path, monkeypatch):
    folder = tiny_folder(store, tmp_path, monkeypatch)
    marks = []
    put = remote.put_whole
    with mirror.mirrored(URL) as here:
        here.flush()
        monkeypatch.setattr(
            remote, "put_whole", lambda *x: (marks.append("checkpoints/2.whole" in names(store)),
                                             put(*x))
        )  # fmt: skip
        (folder / "checkpoints/2/host/metadata").write_text('{"amended": 1}')
        here.flush()
        (folder / "checkpoints/2/array").write_text("changed")
        here.flush()
    # A note alone is replaced as a whole.
    assert marks == [True, False]
    assert "checkpoints/2.whole" in names(store)


def test_failed_copies_are_counted_and_tried_again(store, tmp_path, monkeypatch, caplog):
    folder = tiny_folder(store, tmp_path, monkeypatch)
    put, failing = remote.put_whole, 2

    def fails(*given):
        nonlocal failing
        failing -= 1
        if failing >= 0:
            raise OSError("503 try later")
        put(*given)

    monkeypatch.setattr(remote, "put_whole", fails)
    with mirror.mirrored(URL) as here:
        here._copy()
        here._copy()
        assert here.failed == 2
        here._copy()
        assert here.failed == 2
    assert caplog.text.count("503 try later; it is tried again") == 1
    assert "is written again, and has all of it" in caplog.text
    failing = 1000
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with (
        pytest.raises(InputError, match=r"could not be written \(503 .*has it all: the same comma"),
        mirror.mirrored(URL),
    ):
        pass


def test_copy_that_hangs_does_not_hold_up_a_signal(store, tmp_path, monkeypatch):
    """It is waited for once."""
    tiny_folder(store, tmp_path, monkeypatch)
    monkeypatch.setattr(remote, "put_whole", lambda *_: time.sleep(2))
    began = time.perf_counter()
    with pytest.raises(InputError, match=r"not within 0\.1 s"), mirror.mirrored(URL) as here:
        here.flush(0.1)
    assert time.perf_counter() - began < 1


def test_second_run_waits_for_the_lease_and_refuses_while_it_is_renewed(
    store, tmp_path, monkeypatch
):
    with mirror.mirrored(URL) as here:
        with (
            pytest.raises(InputError, match="another run on this machine writes there"),
            mirror.mirrored(URL),
        ):
            pass
        machine(monkeypatch, tmp_path, "second")
        monkeypatch.setattr(lease.time, "sleep", lambda _: here.lease.renew())
        with (
            pytest.raises(InputError, match=r"another run writes there \(first, process"),
            mirror.mirrored(URL),
        ):
            pass
        monkeypatch.undo()


def test_run_whose_lease_another_has_taken_ends(store, tmp_path, monkeypatch):
    first = mirror.mirrored(URL)
    here = first.__enter__()
    machine(monkeypatch, tmp_path, "second")
    with ExitStack() as after:
        with here.lease._turn:  # it stands still
            after.enter_context(mirror.mirrored(URL))
        here._copy()
        with pytest.raises(InputError, match=r"another run has taken over there \(second"):
            here.check()
    with pytest.raises(InputError, match="taken over"):
        first.__exit__(None, None, None)


@pytest.mark.parametrize("emptied", [False, True])
def test_folder_of_before_goes_on_unless_the_store_was_emptied(
    emptied, store, tmp_path, monkeypatch
):
    folder = tiny_folder(store, tmp_path, monkeypatch)
    with mirror.mirrored(URL):
        pass
    (folder / "checkpoints/2").rename(folder / "checkpoints/4")
    if emptied:
        store.store.clear()
    with mirror.mirrored(URL):
        assert (folder / "checkpoints/4").exists() != emptied
    kept = list(folder.parent.glob(f"{folder.name}.*/checkpoints/4"))
    assert len(kept) == emptied


def test_sigterm_is_answered_once_all_is_copied(store, tmp_path, monkeypatch, capsys):
    config = runs.ppo(tmp_path, output=URL)
    record = Session.record

    def stopped(session, step, *more):
        record(session, step, *more)
        if step == 3:
            raise Stop("SIGTERM")

    monkeypatch.setattr(Session, "record", stopped)
    with pytest.raises(SystemExit):
        train(config)
    assert "stopped by SIGTERM after iteration 3, which is saved" in capsys.readouterr().out
    assert {"checkpoints/3.whole", "metrics.jsonl"} <= names(store)
    assert "lease.json" not in names(store)


def test_lease_that_is_being_renewed_is_given_back_after_that(store, tmp_path, monkeypatch):
    here = mirror.Mirror(URL, tmp_path / "run")
    here.lease.take()
    looking, go_on = threading.Event(), threading.Event()
    content = here.lease._content

    def slow():
        found = content()
        looking.set()
        go_on.wait(10)
        return found

    monkeypatch.setattr(here.lease, "_content", slow)
    renewal = threading.Thread(target=here.lease.renew)
    renewal.start()
    looking.wait(10)
    end = threading.Thread(target=here.lease.give_back)
    end.start()
    go_on.set()
    renewal.join()
    end.join()
    assert "lease.json" not in names(store)
