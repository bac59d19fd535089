"""Faults of each kind that ends a launch do a run no harm; `make soak` and `make kills` are hours
of them, drawn by chance, on pipelines too."""

import random

import pytest
import servers
from soak import KILLS, Soak, compare, disturbed, undisturbed
from targets import Unreliable, contents, run


def survives(target, folder, plan):
    """What has happened; the run has ended as one that nothing disturbed."""
    soak = Soak(random.Random(0), KILLS)
    wanted = undisturbed(target, folder, soak.tally)
    disturbed(target, folder / "run", soak, plan)
    compare(wanted, contents(folder / "run"), soak.tally, target.name)
    assert not soak.tally.wrong
    return soak.tally


@pytest.mark.slow
def test_faults_and_kills_change_nothing(tmp_path):
    unreliable = Unreliable(0)
    with servers.service(unreliable) as server:
        target = run("ppo", tmp_path, 60, server.url)
        plan = ["kill", "kill", "flip", "kill at a save", "term"]
        tally = survives(target, tmp_path, plan)
    assert tally["resumed"] >= 1
    assert sum(unreliable.bad.values()) >= 1


def test_kills_of_one_of_two_change_nothing(tmp_path):
    tally = survives(run("sft", tmp_path, 40, processes=2), tmp_path, ["kill"])
    assert tally["kill"] == 1
