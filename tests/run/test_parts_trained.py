"""``test_parts`` with runs that learn: ``make pods``. Two processes without a common disk, whose
output is a URL: what is there after one is killed, or asked to stop, in the middle of a copy, and
what other numbers make of it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import shared_store  # noqa: F401 (shared://)
from loopback import by_flags, ended, free_port, started

from jaxrlhf.config import CheckpointConfig, MeshConfig, dump
from jaxrlhf.core import remote
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import load_model
from jaxrlhf.run import copying
from jaxrlhf.run.loop import train
from jaxrlhf.run.parts import PIECE

pytestmark = pytest.mark.pods

PROGRAM = """
import os, signal, sys, threading, time
import jax
import shared_store
from jaxrlhf.config import Config, load, override
from jaxrlhf.mesh.processes import together
from jaxrlhf.run import copying, lease, loop, parts, session as sessions
from jaxrlhf.run.session import Session

copying.PAUSE, lease.SECONDS, sessions.STOP_SECONDS = 1000.0, 0.2, 4.0
save, put_all = Session.save, copying.Bucket.put_all
number, begun, end = jax.process_index, threading.Event(), ""
SLOW = {"term": 2.0, "stuck": 1000.0}

def saving(session, done):
    save(session, done)
    session.checkpoints.wait()
    if done < 3 or end not in SLOW:
        session._mirror.flush()
    elif number() == 1:
        assert begun.wait(60)

def ending(store, sources):
    if any("/3/" in name for name in sources) and number() == 1 and not begun.is_set():
        os.kill(os.getpid(), signal.SIGTERM if end in SLOW else signal.SIGKILL)
        begun.set()
        time.sleep(SLOW[end])
    put_all(store, sources)

Session.save = saving
places, flags = sys.argv[1].split(","), sys.argv[2:]
words = [*flags, "--distributed.heartbeat", "4"]
with together(override(Config(), words).distributed) as watchdog:
    for place in places:
        config, shared, homes, end = place.split(":")
        os.environ["SHARED"] = shared
        os.environ["HOME"] = f"{homes}/{number()}"
        if end:
            copying.Bucket.put_all = ending
        loop.train(load(config), feed=watchdog.feed)
"""

STEPS = 4
URL = "shared://bucket/run"


def four():
    return make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])


def two(places):
    """PROGRAM by two processes with two devices each; (status, output, errors) of each."""
    paths = ":".join(str(x) for x in (Path(__file__).parents[1], Path(__file__).parents[2]))
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    cached = {name: x for name, x in os.environ.items() if name.startswith("JAX_")}
    python = f"{paths}:{os.environ.get('PYTHONPATH', '')}"
    variables = {**cached, "XLA_FLAGS": flags, "PYTHONPATH": python}
    named = [(words, variables) for words, _ in by_flags(free_port())]
    with started(",".join(places), *named, program=PROGRAM) as running:
        return ended(running, 300)


def lines(root):
    text = (root / "bucket/run/metrics.jsonl").read_text(encoding="utf-8")
    return [
        {x: row[x] for x in ("step", "loss", "grad_norm")}
        for row in map(json.loads, text.splitlines())
    ]


def steps(root):
    return {path.name for path in (root / "bucket/run/checkpoints").glob("*.whole")}


def pieces(step):
    names = {path.relative_to(step).as_posix() for path in step.rglob("*")}
    return {name for name in names if PIECE.fullmatch(name)}


def arrays(root, monkeypatch):
    """The newest step as one process reads it."""
    monkeypatch.setenv("SHARED", str(root))
    monkeypatch.setenv("HOME", str(root / "reader"))
    monkeypatch.setattr(remote, "_here", {})
    return load_model(URL)[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders, and what was said: ``whole`` by two, undisturbed; ``killed``, in the copy of step 3,
    gone on with by two new machines; ``same``, by the machines of before; ``other``, begun by one
    process and gone on with by two; ``term``, of which one was asked to stop in that copy."""
    folder = tmp_path_factory.mktemp("parts")
    config = replace(
        runs.sft(folder),
        mesh=MeshConfig(fsdp=4),
        checkpoint=CheckpointConfig(every=1, keep=2),
        steps=STEPS,
        output=URL,
    )
    path = folder / "config.yaml"
    path.write_text(dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "homes_one"))
        patch.setenv("SHARED", str(folder / "other"))
        train(replace(config, steps=2), four())
    first = two([
        f"{path}:{folder}/whole:{folder}/homes_whole:",
        f"{path}:{folder}/killed:{folder}/homes_before:kill",
    ])  # fmt: skip
    left = steps(folder / "killed")
    shutil.copytree(folder / "killed", folder / "same")
    second = two([
        f"{path}:{folder}/killed:{folder}/homes_new:",
        f"{path}:{folder}/same:{folder}/homes_before:",
        f"{path}:{folder}/other:{folder}/homes_other:",
        f"{path}:{folder}/term:{folder}/homes_term:term",
    ])  # fmt: skip
    return config, folder, first, left, second


def test_kill_in_a_copy_leaves_the_step_before(made):
    _, folder, ends, left, _ = made
    assert ends[1][0] == -9
    # The first has gone with that of the folder, which keeps two.
    assert left == {"2.whole"}
    # A process has its own pieces, and what was copied has those of both.
    homes = [folder / f"homes_whole/{i}/.cache/jaxrlhf/runs" for i in range(2)]
    first, second = (pieces(next(x.glob(f"run-*.{i}-of-2/4"))) for i, x in enumerate(homes))
    assert first
    assert second
    assert not first & second
    assert pieces(folder / "whole/bucket/run/checkpoints/4") == first | second


def test_new_machines_go_on_bit_for_bit(made, monkeypatch):
    _, folder, _, _, second = made
    assert [status for status, *_ in second] == [0, 0], "\n".join(x for y in second for x in y[1:])
    assert "resumed after iteration 2 of 4" in second[0][1]
    assert lines(folder / "killed") == lines(folder / "whole")
    assert steps(folder / "killed") == steps(folder / "whole") == {"3.whole", "4.whole"}
    whole, killed = (arrays(folder / name, monkeypatch) for name in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, killed, whole)


def test_machines_that_have_a_step_still_send_it_first(made, monkeypatch):
    _, folder, _, _, second = made
    assert "resumed after iteration 3 of 4" in second[0][1]
    assert lines(folder / "same") == lines(folder / "whole")


def test_one_process_and_two_take_over_from_each_other(made, monkeypatch, tmp_path):
    config, folder, _, _, second = made
    assert second[0][1].count("resumed after iteration 2 of 4") == 2
    for one, other in zip(lines(folder / "other"), lines(folder / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    monkeypatch.setenv("SHARED", str(folder / "other"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(copying, "PAUSE", 1000.0)
    train(replace(config, steps=5), four())
    assert [row["step"] for row in lines(folder / "other")] == [1, 2, 3, 4, 5]
    assert steps(folder / "other") == {"4.whole", "5.whole"}


@pytest.fixture(scope="module")
def asked(made):
    """Of ``term``, whose copy goes on after SIGTERM, and of ``stuck``, whose copy does not: what
    two said, which steps were there then, and what two new machines said, which went on."""
    _, folder, _, _, second = made
    path, left = f"{folder}/config.yaml", {"term": steps(folder / "term")}
    third = two([
        f"{path}:{folder}/term:{folder}/homes_term_new:",
        f"{path}:{folder}/stuck:{folder}/homes_stuck:stuck",
    ])  # fmt: skip
    left["stuck"] = steps(folder / "stuck")
    fourth = two([f"{path}:{folder}/stuck:{folder}/homes_stuck_new:"])
    return {"term": (second, left["term"], third), "stuck": (third, left["stuck"], fourth)}


@pytest.mark.parametrize(
    ("name", "step", "said"),
    [
        ("term", 3, "stopped by SIGTERM after iteration 3, which is saved"),
        ("stuck", 2, "could not be written (not within"),
    ],
)
def test_stop_in_a_copy_leaves_a_step_that_is_whole(name, step, said, made, asked, monkeypatch):
    """The one on its way, if it comes within the seconds that a stop has, else the one before; new
    machines go on from there, bit for bit."""
    _, folder, *_ = made
    ends, left, again = asked[name]
    everything = "\n".join(text for _, *texts in ends for text in texts)
    # Above 0: none was aborted because another had gone.
    assert all(x > 0 if name == "stuck" else x == 0 for x, *_ in ends), everything
    assert said in everything
    assert max(left) == f"{step}.whole"
    assert f"resumed after iteration {step} of 4" in again[0][1], again
    assert lines(folder / name) == lines(folder / "whole")
    whole, found = (arrays(folder / x, monkeypatch) for x in ("whole", name))
    jax.tree.map(np.testing.assert_array_equal, found, whole)
