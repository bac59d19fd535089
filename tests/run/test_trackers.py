"""Figures in the trackers: the same as in metrics.jsonl, in their own files, whatever they do."""

import json
import re
import sqlite3
import struct
import sys
import textwrap
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import runs

from jaxrlhf.config import Config, load
from jaxrlhf.core.errors import InputError, to_install
from jaxrlhf.run import trackers, tracking
from jaxrlhf.run.loop import train
from jaxrlhf.run.trackers import Trackers, check_trackers, trackers_of

ROWS = [{"prompt": "a|b\n<i>", "completion": "c", "reward": 0.5}]
LINE = {"reward": 0.25, "kl": None, "reward/a.b:c": 2, "eval/gold": 1.5}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a machine that other tests keep busy a process takes long to end."""
    monkeypatch.setattr(trackers, "END_SECONDS", 300.0)
    monkeypatch.setattr(trackers, "CUT_SECONDS", 300.0)


def launch(name, folder, resumed, steps):
    """One launch of a run with one tracker; what it said."""
    said = []
    made = Trackers([name], folder, resumed, {"algorithm": {"name": "ppo"}}, said.append)
    for step in steps:
        made.metrics(step, {**LINE, "reward": 0.25 * step})
    made.samples(steps[-1], [{"split": "eval", **ROWS[0]}])
    made.samples(steps[-1], ROWS)
    made.samples(steps[-1], ROWS)  # within the same minute: left out
    made.close()
    return said


def both(name, folder, caplog):
    """A launch of three steps, and one that goes on after two of them."""
    where = launch(name, folder, None, [1, 2, 3])
    first = json.loads((folder / "trackers.json").read_text())["id"]
    launch(name, folder, 2, [3, 4])
    assert json.loads((folder / "trackers.json").read_text())["id"] == first
    assert caplog.text == ""
    assert where[0].startswith(f"{name}: ")
    return first


def test_tensorboard_has_the_figures(tmp_path, caplog):
    pytest.importorskip("tensorboardX")
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    both("tensorboard", tmp_path, caplog)
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    launches = []
    for path in files:
        content, events = path.read_bytes(), []
        while content:
            # A record: its length, a checksum of that, the event, a checksum of it.
            (length,) = struct.unpack("<Q", content[:8])
            events.append(proto.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
        launches.append(events)
    values = [
        {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
        for events in launches
    ]
    assert [values[0][step, "reward"] for step in (1, 2, 3)] == [0.25, 0.5, 0.75]
    assert {(1, "reward/a.b_c"), (1, "eval/gold")} <= values[0].keys()
    assert not any(tag == "kl" for _, tag in values[0])
    assert [tag for _, tag in values[0] if "samples" in tag] == [
        "eval/samples/text_summary",
        "samples/text_summary",
    ]
    # A reader drops what the first launch wrote of step 3.
    starts = [e.step for e in launches[1] if e.session_log.status == 1]
    assert starts == [3]
    assert [values[1][step, "reward"] for step in (3, 4)] == [0.75, 1.0]
    texts = [v.tensor.string_val for e in launches[0] for v in e.summary.value if v.tensor]
    assert "a&#124;b<br>&#60;i&#62;" in str(texts)


def test_wandb_has_the_figures_offline(tmp_path, caplog, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = both("wandb", tmp_path, caplog)
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{first}/run-{first}.wandb"))
    assert len(files) == 2
    for path, last in zip(files, (b"0.75", b"1.0"), strict=True):
        content = path.read_bytes()
        assert all(name in content for name in (b"reward/a.b:c", b"eval/gold", b"samples", last))
    (table,) = files[0].parent.glob("files/media/table/samples_*.table.json")
    assert json.loads(table.read_text())["data"] == [["a|b\n<i>", "c", 0.5]]


def test_trackio_has_the_figures(tmp_path, caplog, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    first = both("trackio", tmp_path, caplog)
    with sqlite3.connect(tmp_path / "trackio" / "jaxrlhf.db") as file:
        found = file.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in found} == {f"{tmp_path.name}-{first}"}
    lines = [(step, json.loads(metrics)) for _, step, metrics in found]
    numbers = [(step, line["reward"]) for step, line in lines if "reward" in line]
    assert numbers == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 0.75), (4, 1.0)]
    tables = [line["samples"] for _, line in lines if "samples" in line]
    assert tables[0]["_value"] == ROWS


FAKE = """
import json, os, sys, time
class SummaryWriter:
    def __init__(self, logdir, purge_step):
        {start}
        self.file = open(os.path.dirname(logdir) + "/told.jsonl", "a")
    def add_scalar(self, name, value, step):
        {scalar}
        self.file.write(json.dumps([step, name, value]) + "\\n")
    def add_text(self, name, text, step):
        self.file.write(json.dumps([step, name, text]) + "\\n")
    def flush(self):
        self.file.flush()
    def close(self):
        self.file.close()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """(start=…, scalar=…) → a package tensorboardX that does this where it is called."""
    package = tmp_path / "packages"
    package.mkdir()
    monkeypatch.syspath_prepend(package)

    def make(start="pass", scalar="pass"):
        text = textwrap.dedent(FAKE).format(start=start, scalar=scalar)
        (package / "tensorboardX.py").write_text(text)
        folder = tmp_path / "run"
        folder.mkdir()
        return folder

    return make


@pytest.mark.parametrize(
    ("where", "what", "said"),
    [
        ("start", "raise OSError('no room')", "cannot be used (OSError: no room)"),
        ("start", "sys.exit('enough')", "cannot be used (SystemExit: enough)"),
        ("start", "os._exit(3)", "has ended by itself (status 3)"),
        ("scalar", "raise ValueError('a\\nb')", "has failed (ValueError: a)"),
        ("scalar", "os.abort()", "has ended by itself (status -6)"),
    ],
)
def test_a_tracker_that_fails_is_told_of_once(where, what, said, fake, caplog):
    folder = fake(**{where: what})
    made = Trackers(["tensorboard"], folder)
    for step in range(50):
        made.metrics(step, LINE)
        time.sleep(0.002)
    made.close()
    assert len(caplog.records) == 1
    assert f"trackers: tensorboard {said}" in caplog.text
    assert "metrics.jsonl has all" in caplog.text


def test_a_tracker_that_blocks_holds_nothing_up(fake, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "END_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 20)
    made = Trackers(["tensorboard"], fake(start="time.sleep(600)"))
    (worker,) = made._workers
    began = time.monotonic()
    for step in range(2000):
        made.metrics(step, {f"a_long_name_{i}": 1.0 for i in range(20)})
    assert time.monotonic() - began < 1
    made.close()
    assert worker._process.poll() is not None
    assert [record.getMessage()[:60] for record in caplog.records] == [
        "trackers: tensorboard has 20 records to send, and gets no mo",
        "trackers: tensorboard does not come to its end, and has been",
    ]


def test_a_tracker_ends_by_itself_where_its_run_was_killed(fake, monkeypatch):
    """Its input ends without a word: what came is still sent, within a time."""
    folder = fake()
    limits = []
    timer = SimpleNamespace(daemon=False, start=lambda: None)
    monkeypatch.setattr(
        tracking.threading, "Timer", lambda *given: limits.append(given[0]) or timer
    )
    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
    answers = []
    run = [str(folder), "id", None, {}]
    lines = [run, ["metrics", 1, {"loss": 0.5}], ["metrics", 2, {"loss": 0.25}]]
    tracking.serve("tensorboard", iter(map(json.dumps, lines)), answers.append)
    del sys.modules["tensorboardX"]  # the fake one
    told = [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]
    assert told == [[1, "loss", 0.5], [2, "loss", 0.25]]
    assert answers == [{"where": f"tensorboard --logdir {folder}/tensorboard"}]
    assert limits == [tracking.LEFT_SECONDS]


def test_trackers_begin_a_run_of_their_own_where_the_id_is_damaged(fake, caplog):
    folder = fake()
    (folder / "trackers.json").write_text("{")
    Trackers(["tensorboard"], folder, 3).close()
    assert "trackers.json: cannot be read: the trackers begin another run" in caplog.text
    assert json.loads((folder / "trackers.json").read_text())["id"].isalnum()


def test_train_tells_trackers_what_it_writes(fake, capsys):
    folder = fake()
    config = replace(runs.sft(folder), steps=2, output=str(folder), trackers=("tensorboard",))
    train(config, runs.one_device())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    written = [
        [line["step"], name, x]
        for line in map(json.loads, lines)
        for name, x in line.items()
        if name != "step" and x is not None
    ]
    told = [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]
    assert told == written
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("cpu: 1 device; ")
    assert f"tensorboard: tensorboard --logdir {folder}/tensorboard" in out
    assert [re.sub(r"[\d.]+ s$", "", line) for line in out[2:4]] == [
        "reading the data: ",
        "reading the weights: ",
    ]
    assert any(re.match(r"compiling \d+ programs: [\d.]+ s", line) for line in out)
    assert out[-2:] == [
        f"report: {folder}/report.html",
        f"next: jaxrlhf generate {folder} --raw --prompt TEXT",
    ]
    train(config, runs.one_device())  # all done: no tracker is started
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "tensorboard: " not in out


def test_other_processes_have_no_trackers(fake, monkeypatch):
    folder = fake()
    monkeypatch.setattr(trackers, "is_first", lambda: False)
    config = Config(output=str(folder), trackers=("tensorboard",))
    made = trackers_of(config, None, print)
    made.metrics(1, LINE)
    made.close()
    assert list(folder.iterdir()) == []
    check_trackers(["tensorboard"])


def test_check_trackers_names_the_extra(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape(to_install("wandb"))):
        check_trackers(["wandb"])


def test_load_lists_the_trackers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("trackers: [tensorbord]\n")
    with pytest.raises(InputError, match=r"trackers\.0.*tensorboard.*wandb.*trackio"):
        load(path)
    path.write_text("trackers: [wandb]\n")
    assert load(path).trackers == ("wandb",)
    assert load(path, ["--trackers", "tensorboard", "trackio"]).trackers == (
        "tensorboard",
        "trackio",
    )
