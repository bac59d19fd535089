"""SIGTERM and Ctrl-C in each phase of a run: what is done is saved, and the next launch goes on."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import runs

from jaxrlhf.config import EvalConfig, RewardConfig
from jaxrlhf.run import loop
from jaxrlhf.run.speed import TIMED

CALLS = {}
"""How often each of the functions below has been called, in the run at hand."""

WAIT = {}
"""Which call of a function is to wait for the end of the test, and on what event it says so."""

GOOD = set(runs.WORDS.split()[:6])


def paid(name, completions):
    """A reward that waits at one of its calls."""
    CALLS[name] = CALLS.get(name, 0) + 1
    if WAIT.get(name) == CALLS[name]:
        os.kill(os.getpid(), WAIT["signal"])
        time.sleep(60)
    return [float(sum(word in GOOD for word in text.split())) for text in completions]


def proxy(prompts, completions, **columns):
    return paid("proxy", completions)


def gold(prompts, completions, **columns):
    return paid("gold", completions)


def config_of(folder, **changes):
    """Four iterations, saved every other; evaluated before, between, and at the end."""
    config = runs.ppo(folder)
    gold = RewardConfig(function=f"{__name__}:gold", in_process=True)
    return replace(
        config,
        rewards=(RewardConfig(function=f"{__name__}:proxy", in_process=True),),
        data=replace(config.data, eval=config.data.train),
        eval=EvalConfig(every=2, n=1, gold=(gold,)),
        **changes,
    )


def launch(config, number=None, **wait):
    """The summary of a run; None if it was stopped."""
    CALLS.clear()
    WAIT.clear()
    WAIT.update(wait, signal=number)
    began = time.monotonic()
    try:
        return loop.train(config, runs.one_device())
    except SystemExit as stopped:
        if stopped.code:
            raise
        assert time.monotonic() - began < 50  # the wait was cut short
        return None


def logged(config):
    """What a run has logged, but for its clock."""
    output = Path(config.output)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    return rows, (output / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("undisturbed"))
    launch(config)
    return logged(config), states(config)


def states(config):
    return runs.trained(config)[0]


def test_stop(undisturbed, tmp_path):
    config = config_of(tmp_path)
    for number, wait in [
        (signal.SIGINT, {"proxy": 1}),
        (signal.SIGINT, {"gold": 1}),
        (signal.SIGTERM, {"gold": 1}),
    ]:
        assert launch(config, number, **wait) is None
    launch(config)
    print(logged(config)[0])
    assert logged(config) == undisturbed[0]
