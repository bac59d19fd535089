"""Some faults, always the same ones, do a run no harm; `make soak` and `make kills` are hours of
them, on pipelines too."""

import random

import pytest
import servers
from soak import FAULTS, KILLS, Soak, carry_on, targets_of, told_of
from targets import Unreliable


@pytest.mark.slow
def test_faults_and_kills_change_nothing(tmp_path):
    unreliable = Unreliable(0)
    soak = Soak(random.Random(0), FAULTS)
    with servers.service(unreliable) as server:
        targets = targets_of(["ppo"], tmp_path, 40, server.url)
        tally = carry_on(tmp_path, soak, targets, most=6, seconds=0)
    print(told_of(tally))
    assert not tally.wrong
    assert tally["resumed"] >= 4
    assert sum(unreliable.bad.values()) > 0


def test_kills_of_one_of_two_change_nothing(tmp_path):
    soak = Soak(random.Random(0), KILLS)
    tally = carry_on(tmp_path, soak, targets_of(["sft2"], tmp_path, 40, ""), most=2, seconds=0)
    assert not tally.wrong
