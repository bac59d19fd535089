"""Two processes without a common disk, whose output is a URL: what is there after one is killed,
and what other numbers of processes make of it. With states that are quickly computed; those of
runs are in test_parts_trained.py."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import shared_store  # noqa: F401 (shared://)
from jax.sharding import NamedSharding, PartitionSpec
from loopback import by_flags, ended, free_port, started

from jaxrlhf.config import CheckpointConfig, Config, override
from jaxrlhf.core import remote
from jaxrlhf.mesh.checkpoint import Checkpoints, load
from jaxrlhf.mesh.processes import is_first, together
from jaxrlhf.run import copying, lease
from jaxrlhf.run.mirror import mirrored
from jaxrlhf.run.parts import PIECE, Parts, cells, needed, unsent

PROGRAM = "import test_parts; test_parts.program()"
URL = "shared://bucket/run"
STEPS = 4
SPECS = {
    "split": PartitionSpec("fsdp"),
    "across": PartitionSpec(None, "fsdp"),
    "all": PartitionSpec(),
    "n": PartitionSpec(),
}
SHAPES = {"split": (8, 3), "across": (5, 8), "all": (7,), "n": ()}


def four():
    return jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])


def abstract():
    """What each array is: split one way or the other, on all devices whole, a scalar."""
    mesh = four()
    place = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return {
        name: jax.ShapeDtypeStruct(SHAPES[name], np.float32, sharding=place[name]) for name in SPECS
    }


def fresh(name, x):
    whole = np.random.default_rng(len(name)).random(x.shape, np.float32)
    return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index])


def go(steps, url=URL):
    """A run whose state follows from the one before; every step is saved, and copied."""
    advance = jax.jit(lambda state, step: {name: x * 1.25 + step for name, x in state.items()})
    with mirrored(url) as copier:
        parts = copier if isinstance(copier, Parts) else None
        folder = parts.folder if parts else remote.scratch(url) / "checkpoints"
        with Checkpoints(folder, CheckpointConfig(keep=2), parts) as checkpoints:
            found = checkpoints.restore(abstract())
            start = found[0] if found else 0
            state = found[1] if found else {name: fresh(name, x) for name, x in abstract().items()}
            print("begins after", start, flush=True)
            for step in range(start + 1, steps + 1):
                state = advance(state, float(step))
                if is_first():
                    remote.scratch(url).mkdir(exist_ok=True)
                    with open(remote.scratch(url) / "metrics.jsonl", "a", encoding="utf-8") as file:
                        print(json.dumps({"step": step}), file=file)
                checkpoints.save(step, state, {"clock": time.time()})
                checkpoints.wait()
                copier.flush()


def program():
    """``go`` for each place, config:store:homes:die, where one of two may die in the third copy."""
    copying.PAUSE, lease.SECONDS = 1000.0, 0.2
    put_all = copying.Bucket.put_all

    def dying(store, sources):
        if any("/3/" in name for name in sources) and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        put_all(store, sources)

    words = [*sys.argv[2:], "--distributed.heartbeat", "4"]
    with together(override(Config(), words).distributed):
        for place in sys.argv[1].split(","):
            os.environ["SHARED"], homes, die = place.split(":")
            os.environ["HOME"] = f"{homes}/{jax.process_index()}"
            copying.Bucket.put_all = dying if die else put_all
            go(STEPS)


def two(*places):
    """PROGRAM by two processes with two devices each; (status, output, errors) of each."""
    here = Path(__file__)
    paths = [here.parent, here.parents[1], here.parents[2], os.environ.get("PYTHONPATH", "")]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    variables = {"XLA_FLAGS": flags, "PYTHONPATH": ":".join(map(str, paths))}
    named = [(words, variables) for words, _ in by_flags(free_port())]
    with started(",".join(places), *named, program=PROGRAM) as running:
        return ended(running, 120)


def alone(monkeypatch, root, home, steps):
    monkeypatch.setenv("SHARED", str(root))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(copying, "PAUSE", 1000.0)
    go(steps)


def lines(root):
    text = (root / "bucket/run/metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["step"] for line in text.splitlines()]


def marks(root):
    return {path.name for path in (root / "bucket/run/checkpoints").glob("*.whole")}


def arrays(root, step=STEPS):
    """The newest step as one process reads it."""
    found = load(root / "bucket/run/checkpoints", abstract())
    assert found[0] == step
    return found[1]


def pieces(step):
    names = {path.relative_to(step).as_posix() for path in step.rglob("*")}
    return {name for name in names if PIECE.fullmatch(name)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders, and what was said: ``whole`` by two, undisturbed; ``killed``, in the copy of step 3,
    gone on with by two new machines; ``same``, by the machines of before; ``mixed``, by the first
    of them and a new one; ``other``, begun by one process and gone on with by two."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder / "other", folder / "home", 2)
    first = two(f"{folder}/whole:{folder}/homes_whole:", f"{folder}/killed:{folder}/homes:die")
    left = marks(folder / "killed")
    assert left, "\n".join(x for y in first for x in y[1:])
    for name in ("same", "mixed"):
        shutil.copytree(folder / "killed", folder / name)
    shutil.copytree(folder / "homes/0", folder / "homes_mixed/0")
    second = two(
        f"{folder}/killed:{folder}/homes_new:",
        f"{folder}/same:{folder}/homes:",
        f"{folder}/mixed:{folder}/homes_mixed:",
        f"{folder}/other:{folder}/homes_other:",
    )
    return folder, first, left, second


def test_kill_in_a_copy_leaves_the_step_before(made):
    folder, ends, left, _ = made
    assert ends[1][0] == -9
    assert ends[0][0] not in (0, None)
    # The first has gone with that of the folder, which keeps two.
    assert left == {"2.whole"}
    # A process has its own pieces, and what was copied has those of both.
    homes = [folder / f"homes_whole/{i}/.cache/jaxrlhf/runs" for i in range(2)]
    first, second = (pieces(next(x.glob(f"run-*.{i}-of-2/4"))) for i, x in enumerate(homes))
    assert not first & second
    assert first | second == pieces(folder / "whole/bucket/run/checkpoints/4")
    assert {"state/split/0.0", "state/across/0.1"} <= first
    assert {"state/split/3.0", "state/across/0.2"} <= second


def test_two_go_on_bit_for_bit(made):
    """On new machines from the newest whole step; those of before send the next one first."""
    folder, _, _, second = made
    assert [status for status, *_ in second] == [0, 0], "\n".join(x for y in second for x in y[1:])
    for _, told, _ in second:
        assert [line for line in told.splitlines() if "begins" in line] == [
            "begins after 2", "begins after 3", "begins after 2", "begins after 2",
        ]  # fmt: skip
    for name in ("killed", "same", "mixed", "other"):
        jax.tree.map(np.testing.assert_array_equal, arrays(folder / name), arrays(folder / "whole"))
        assert marks(folder / name) == {"3.whole", "4.whole"}
        assert not (folder / name / "bucket/run/lease.json").exists()
    assert lines(folder / "whole") == [1, 2, 3, 4]
    assert set(lines(folder / "killed")) == {1, 2, 3, 4}
    # All but its note, which was there, and two pieces of each of two arrays.
    assert "step 2: 17 of its 22 files" in second[1][2]


def test_one_goes_on_where_two_were(made, tmp_path, monkeypatch, capsys):
    folder = made[0]
    shutil.copytree(folder / "whole", tmp_path / "whole")
    alone(monkeypatch, tmp_path / "whole", tmp_path / "home", 5)
    assert "begins after 4" in capsys.readouterr().out
    assert lines(tmp_path / "whole") == [1, 2, 3, 4, 5]
    fourth, fifth = arrays(folder / "whole"), arrays(tmp_path / "whole", 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a * 1.25 + 5), fourth, fifth)


NOTES = {"2": "a", "4": "b"}


@pytest.mark.parametrize(
    ("there", "here", "found"),
    [
        ({}, [NOTES, NOTES], 4),
        ({"4": "b"}, [NOTES, NOTES], None),
        ({"5": "c"}, [NOTES, NOTES], None),
        ({"1": "c"}, [NOTES, {"2": "a"}], 2),
        ({"1": "c"}, [NOTES, {"2": "a", "4": "another save"}], 2),
        ({}, [{}, NOTES], None),
    ],
)
def test_unsent_is_of_all_and_of_one_save(there, here, found):
    told = [{"run": "r", "sent": [], "steps": x} for x in here]
    assert unsent({"run": "", "steps": there}, told) == found
    assert unsent({"run": "another", "steps": there}, told) is None
    told[0]["sent"] = [2, 4]  # and whoever emptied the store begins anew
    assert unsent({"run": "", "steps": there}, told) is None


def test_cells_are_those_of_the_devices_here():
    """Eight devices, 4 × 2; pieces that do not divide the shards' edges."""
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    half = NamedSharding(jax.sharding.Mesh(mesh.devices[:2], ("a", "b")), PartitionSpec("a"))
    assert cells((8, 6), (3, 4), half) == {f"{i}.{j}" for i in range(3) for j in range(2)}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert cells((), (), one) == {"0"}
    assert cells((5,), (2,), one) == {"0", "1", "2"}


def test_needed_leaves_out_arrays_and_pieces_of_others(tmp_path, monkeypatch):
    (tmp_path / "state/a.b").mkdir(parents=True)
    (tmp_path / "state/a.b/.zarray").write_text(json.dumps({"chunks": [2]}))
    x = jax.ShapeDtypeStruct(
        (4,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    names = ["state/a.b/0", "state/a.b/1", "state/a.b/2", "state/c/0"]
    assert needed(names, tmp_path, {"a.b": x}) == names[:2]
    whole = jax.ShapeDtypeStruct((4,), np.float32)
    assert needed(names, tmp_path, {"a.b": whole}) == names[:3]
