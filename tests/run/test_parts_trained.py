"""``test_parts`` with runs that learn: ``make pods``. Two processes without a common disk, whose
output is a URL: what is there after one is killed, and what other numbers make of it."""

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
import os, signal, sys
import jax
import shared_store
from jaxrlhf.config import Config, load, override
from jaxrlhf.mesh.processes import together
from jaxrlhf.run import copying, lease, loop, parts
from jaxrlhf.run.session import Session

copying.PAUSE, lease.SECONDS = 1000.0, 0.2
save, put_all = Session.save, copying.Bucket.put_all

def saving(session, done):
    save(session, done)
    session.checkpoints.wait()
    session._mirror.flush()

def dying(store, sources):
    if any("/3/" in name for name in sources) and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    put_all(store, sources)

Session.save = saving
places, flags = sys.argv[1].split(","), sys.argv[2:]
words = [*flags, "--distributed.heartbeat", "4"]
with together(override(Config(), words).distributed) as watchdog:
    for place in places:
        config, shared, homes, die = place.split(":")
        os.environ["SHARED"] = shared
        os.environ["HOME"] = f"{homes}/{jax.process_index()}"
        if die:
            copying.Bucket.put_all = dying
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
    process and gone on with by two."""
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
        f"{path}:{folder}/killed:{folder}/homes_before:die",
    ])  # fmt: skip
    left = steps(folder / "killed")
    shutil.copytree(folder / "killed", folder / "same")
    second = two([
        f"{path}:{folder}/killed:{folder}/homes_new:",
        f"{path}:{folder}/same:{folder}/homes_before:",
        f"{path}:{folder}/other:{folder}/homes_other:",
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
