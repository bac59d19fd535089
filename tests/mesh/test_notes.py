"""Folders of checkpoints as people leave them: whole steps are found, and those of another step or
run told."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.config import CheckpointConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.checkpoint import Checkpoints, load
from jaxrlhf.mesh.notes import beside, claim, seal, steps_in, unseal

KEEP2 = CheckpointConfig(keep=2)


def state_at(step):
    return {"x": jnp.arange(8.0) + step}


ABSTRACT = jax.eval_shape(lambda: state_at(0))


def fill(folder, *steps):
    with Checkpoints(folder, KEEP2) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), {"kl_coef": step})
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("whole"), 4, 12)


@pytest.fixture
def folder(whole, tmp_path):
    """Steps 4 and 12 of one run."""
    return shutil.copytree(whole, tmp_path / "checkpoints")


def test_seal_roundtrip_and_change():
    sealed = seal({"a": (1, 2), "b": {"c": float("inf")}, 3: "é"})
    assert unseal(sealed) == {"a": [1, 2], "b": {"c": float("inf")}, "3": "é"}
    sealed["note"]["a"][0] = 2
    with pytest.raises(ValueError, match="not as it was saved"):
        unseal(sealed)


def spoil(folder, step):
    shutil.rmtree(folder / str(step) / "state")


AS_PEOPLE_LEAVE_THEM = {
    "no number": (12, lambda folder: (folder / "²").mkdir()),
    "another number": (12, lambda folder: (folder / "0013").mkdir()),
    "a file": (12, lambda folder: (folder / "13").write_text("x")),
    "a dangling link": (12, lambda folder: (folder / "13").symlink_to("nowhere")),
    "a link to another step": (12, lambda folder: (folder / "13").symlink_to("12")),
    "an empty folder": (12, lambda folder: (folder / "13").mkdir()),
    "no text": (12, lambda folder: os.mkdir(os.fsencode(folder) + b"/\xff13")),
    "other files": (12, lambda folder: (folder / "config.yaml").write_text("x")),
    "trash is a file": (12, lambda folder: (folder / "trash").write_text("x")),
    "trash is a link": (12, lambda folder: (folder / "trash").symlink_to("4")),
    "run.json cut": (12, lambda folder: (folder / "run.json").write_text('{"run": "')),
    "run.json gone": (12, lambda folder: (folder / "run.json").unlink()),
    "damaged is there": (4, lambda folder: (spoil(folder, 12), (folder / "damaged").mkdir())),
    "damaged is a file": (
        4,
        lambda folder: (spoil(folder, 12), (folder / "damaged").write_text("x")),
    ),
    "damaged is a dangling link": (
        4,
        lambda folder: (spoil(folder, 12), (folder / "damaged").symlink_to("nowhere")),
    ),
}


@pytest.mark.parametrize("case", AS_PEOPLE_LEAVE_THEM)
def test_whole_steps_are_found_and_others_saved(case, folder):
    step, change = AS_PEOPLE_LEAVE_THEM[case]
    change(folder)
    assert load(folder, ABSTRACT)[0] == step
    with Checkpoints(folder, KEEP2) as checkpoints:
        found, state, host = checkpoints.restore(ABSTRACT)
        assert (found, host) == (step, {"kl_coef": step})
        assert float(state["x"][0]) == step
        for later in (12, 13, 14):  # to where something lies, and beyond what is kept
            checkpoints.save(later, state_at(later), {})
        checkpoints.wait()
        assert checkpoints.failed == 0
    assert sorted(steps_in(folder)) == [13, 14]


def test_swapped_steps_are_refused(folder):
    os.rename(folder / "4", folder / "4.moved")
    os.rename(folder / "12", folder / "4")
    os.rename(folder / "4.moved", folder / "12")
    with pytest.raises(InputError, match=r"step 12: .* those of step 4; step 4: .* of step 12"):
        load(folder, ABSTRACT)


def test_steps_of_another_run_are_passed_over(folder, caplog):
    other = fill(folder.parent / "other", 4, 12)
    shutil.rmtree(folder / "12")
    shutil.copytree(other / "12", folder / "12")
    with Checkpoints(folder, KEEP2) as checkpoints:
        assert checkpoints.noted() == {"kl_coef": 4}
        assert checkpoints.restore(ABSTRACT)[0] == 4
    assert "12 is DAMAGED, passing over it: ValueError: its files are those of another run" in (
        caplog.text
    )
    shutil.rmtree(folder / "4" / "state")  # its note is its own, its arrays are not
    shutil.copytree(other / "12/state", folder / "4/state")
    with pytest.raises(InputError, match="x is not as it was saved"):
        load(folder, ABSTRACT)


def test_claim_is_a_new_run_without_steps_and_the_same_with(folder):
    name = json.loads((folder / "run.json").read_text())["run"]
    (folder / "run.json").unlink()
    assert claim(folder) == claim(folder) == name
    for step in (4, 12):
        shutil.rmtree(folder / str(step))
    assert claim(folder) != name


def test_noted_is_of_the_newest_note_that_is_whole(folder):
    with Checkpoints(folder, KEEP2) as checkpoints:
        assert checkpoints.noted() == {"kl_coef": 12}
        (folder / "12/host/metadata").write_text("{")
        assert checkpoints.noted() == {"kl_coef": 4}
        (folder / "4/host/metadata").write_text("[" * 100_000)
        assert checkpoints.noted() is None


def test_beside_takes_no_place_of_others(tmp_path):
    assert beside(tmp_path, "trash") == tmp_path / "trash"
    (tmp_path / "trash").symlink_to("nowhere")
    (tmp_path / "trash_").write_text("")
    assert beside(tmp_path, "trash").name == "trash__"
