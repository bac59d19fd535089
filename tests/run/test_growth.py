"""Five hundred iterations hold no more memory, files, threads and processes than the first hundred
did; by `make growth`."""

import contextlib
import gc
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
from memory import occupied

from jaxrlhf.config import CheckpointConfig, EvalConfig, RewardConfig
from jaxrlhf.run.loop import train
from jaxrlhf.run.speed import Meter

pytestmark = [
    pytest.mark.growth,
    pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc"),
]

STEPS, SETTLED = 500, 100
GROWTH = 8
"""MiB between the means of the first and the last hundred iterations after SETTLED."""


def paid(prompts, completions, **columns):
    """Of a stranger, so that it is asked in a worker."""
    return [float(len(text)) for text in completions]


def children():
    """How many processes this one has started that have not ended."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            count += int(path.read_bytes().rpartition(b")")[2].split()[1]) == os.getpid()
    return count


def held():
    """Bytes in memory, open files, threads, and processes that this one has started."""
    return occupied("VmRSS"), len(os.listdir("/proc/self/fd")), threading.active_count(), children()


@pytest.mark.parametrize("name", ["ppo", "sft"])
def test_five_hundred_iterations_hold_no_more(name, tmp_path, monkeypatch):
    """With a save every five of them, and an evaluation every fifty."""
    counts = []
    real = Meter.begin

    def begin(self, seconds):
        # What is garbage is not held; when Python would look for it is chance.
        gc.collect()
        counts.append(held())
        real(self, seconds)

    monkeypatch.setattr(Meter, "begin", begin)
    config = runs.of(name, tmp_path, steps=STEPS, checkpoint=CheckpointConfig(every=5, keep=2))
    data = replace(config.data, eval=config.data.train)
    config = replace(config, data=data, eval=EvalConfig(every=50))
    if name == "ppo":
        config = replace(config, rewards=(RewardConfig("test_growth:paid"),))
    gc.freeze()
    train(config, runs.one_device())
    memory, files, threads, processes = np.array(counts[SETTLED:STEPS]).T
    hundreds = memory.reshape(-1, 100).mean(1) / 2**20
    print(f"{name}: MiB of each hundred iterations: {hundreds.round(1).tolist()}")
    for what, few in {"files": files, "threads": threads, "processes": processes}.items():
        print(f"{what} {few.min()} to {few.max()}, at the end {few[-100:].min()}")
        assert few[-100:].min() <= few[:100].min()
        assert few[-100:].max() <= few[:100].max()
    assert hundreds[-1] - hundreds[0] < GROWTH
