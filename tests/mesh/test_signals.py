"""SIGTERM and Ctrl-C in each phase of a run: what is done is saved, and the next launch goes on."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import runs
from targets import contents

from jaxrlhf.config import EvalConfig, RewardConfig
from jaxrlhf.run import loop

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


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C, which is ignored in what a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def config_of(folder, **changes):
    """Four iterations, saved every other; evaluated before, between, and at the end."""
    config = runs.ppo(folder)
    return replace(
        config,
        rewards=(RewardConfig(function=f"{__name__}:proxy", in_process=True),),
        data=replace(config.data, eval=config.data.train),
        eval=EvalConfig(
            every=2, n=1, gold=(RewardConfig(function=f"{__name__}:gold", in_process=True),)
        ),
        **changes,
    )


def launch(config, number=None, **wait):
    """Train; a run that is held is stopped by the signal, and ends long before the wait does."""
    CALLS.clear()
    WAIT.clear()
    WAIT.update(wait, signal=number)
    if number is None:
        loop.train(config, runs.one_device())
        return
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        loop.train(config, runs.one_device())
    assert stopped.value.code == 0
    assert time.monotonic() - began < 55


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, capsys):
    """Stopped in the first reward, in the evaluation of the start, between, and at the end."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, config = config_of(tmp_path / "whole"), config_of(tmp_path / "stopped")
    launch(whole)
    capsys.readouterr()
    for number, name, call, said in [
        (signal.SIGINT, "proxy", 1, "stopped by SIGINT after iteration 0, nothing new to save"),
        (signal.SIGTERM, "gold", 1, "stopped by SIGTERM after iteration 1, which is saved"),
        (signal.SIGINT, "gold", 2, "stopped by SIGINT after iteration 2, which is saved"),
        (signal.SIGTERM, "proxy", 3, "stopped by SIGTERM after iteration 3, which is saved"),
        (signal.SIGTERM, "gold", 1, "stopped by SIGTERM after iteration 4, which is saved"),
    ]:
        launch(config, number, **{name: call})
        assert said in capsys.readouterr().out
    launch(config)
    # Arrays too, by their digests.
    assert contents(Path(config.output)) == contents(Path(whole.output))


WOKEN = """
import threading, time
from jaxrlhf.mesh.signals import Signals

looking = threading.Event()

def said(signals, topic):
    looking.set()
    {wait}
    return {{1: "SIGTERM"}}

Signals._said = said
signals = Signals()
signals._several = True
with signals:
    looking.wait()
print("left", signals.asked, flush=True)
"""


@pytest.mark.parametrize(
    ("wait", "asked"), [("signals._over.wait()", ""), ("signals._over.wait(0.05)", "SIGTERM")]
)
def test_a_run_that_ends_while_another_is_asked_to_stop(wait, asked):
    """Nothing comes once the handlers are those of before, which would end the process."""
    code = WOKEN.format(wait=wait)
    if asked:  # it is sent while the run goes on
        code = code.replace("looking.wait()", "looking.wait(); time.sleep(0.5)")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"left {asked}\n"), done.stderr
