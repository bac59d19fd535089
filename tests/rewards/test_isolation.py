"""A function that misbehaves in any way costs the rows of its call, and nothing else; its process
starts light, and ends with its source or with whoever started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.config import IsolateConfig, RewardConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.functions import Asked
from jaxrlhf.rewards.isolation import Isolated, host_source

MODULE = """
import asyncio, os, sys, time

def act(prompts, completions, **columns):
    print("what a function prints disturbs nobody")
    for text in completions:
        if text == "raise": raise ValueError("two\\nlines")
        if text == "exit": sys.exit(3)
        if text == "die": os._exit(3)
        if text == "kill": os.kill(os.getpid(), 9)
        if text == "hang":
            while True: pass
        if text == "sleep": time.sleep(1000)
        if text == "eat": bytearray(10 * 2**30)
        if text == "few": return []
        if text == "close": os.closerange(3, 100)
    if completions[0] == "column": return [[float(len(text))] for text in completions]
    if completions[0] == "square": return [[0.0, 1.0]] * len(completions)
    known = {"none": None, "nan": float("nan"), "much": "much"}
    return [known.get(text, float(len(text))) for text in completions]

async def later(prompts, completions, **columns):
    await asyncio.sleep(1000 if "hang" in completions else 0)
    return [float(x) for x in columns["answer"]]

def imported(prompts, completions, **columns):
    return [name in sys.modules for name in completions]

def pid(prompts, completions, **columns):
    time.sleep(0.05)
    return [os.getpid()] * len(completions)
"""


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """Make a source of a function of MODULE; all are closed at the end."""
    (tmp_path / "acting.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(name, **limits):
        limits = IsolateConfig(**{"chunk": 2, "timeout": 20.0, **limits})
        made.append(Isolated(RewardConfig(function=f"acting:{name}", isolate=limits)))
        return made[-1]

    yield make
    for source in made:
        source.close()


def alive(process):
    """Z is dead, with nobody to wait for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ask(source, texts, **columns):
    return source(Asked(["p"] * len(texts), texts, columns, [True] * len(texts)))


def test_scores_and_one_bad_call_after_the_other(isolated):
    """One pool through all of it: each failure loses two rows and the next call is well."""
    source = isolated("act")
    scored = ask(source, ["a", "bb", "none", "nan", "much", "ccc"])
    np.testing.assert_array_equal(scored.score_B, [1, 2, np.nan, np.nan, np.nan, 3])
    np.testing.assert_array_equal(scored.applies(), [True, True, False, True, True, True])
    np.testing.assert_array_equal(ask(source, ["column", "bb"]).score_B, [6, 2])
    for text, problem in [
        ("raise", "raised ValueError: two lines"),
        ("exit", "raised SystemExit: 3"),
        ("die", "ended its process (status 3)"),
        ("kill", "ended its process (killed by SIGKILL)"),
        ("eat", "raised MemoryError"),
        ("few", "returned 0 scores for 2 completions"),
        ("square", "returned a score of shape [2] for row 0 for 2 completions"),
        ("close", "ended its process"),
    ]:
        scored = ask(source, ["a", "bb", text, "dd", "eee"])
        np.testing.assert_array_equal(scored.score_B, [1, 2, np.nan, np.nan, 3], err_msg=text)
        assert scored.applies().all(), text
        assert problem in scored.problem, text
        assert "\n" not in scored.problem


def test_call_that_never_returns(isolated):
    source = isolated("act", timeout=1.0)
    for text in ("hang", "sleep"):
        scored = ask(source, [text, "bb", "ccc"])
        np.testing.assert_array_equal(scored.score_B, [np.nan, np.nan, 3])
        assert scored.problem == "took more than 1 s"


def test_async_function(isolated):
    source = isolated("later", timeout=1.0)
    np.testing.assert_array_equal(ask(source, ["a", "b"], answer=["1", "2"]).score_B, [1, 2])
    scored = ask(source, ["a", "b", "hang"], answer=["1", "2", "3"])
    np.testing.assert_array_equal(scored.score_B, [1, 2, np.nan])


def test_workers_share_the_calls(isolated):
    scored = ask(isolated("pid", workers=2, chunk=1), ["a"] * 6)
    assert len(set(scored.score_B)) == 2
    assert os.getpid() not in scored.score_B


@pytest.mark.parametrize("isolate", [None, IsolateConfig()])
def test_verifier_as_a_source(isolate):
    source = host_source(RewardConfig(verifier="number", isolate=isolate))
    scored = ask(source, ["1", "2", "3"], answer=["1", "1", None])
    np.testing.assert_array_equal(scored.score_B, [1, 0, np.nan])
    if isolate:
        assert isinstance(source, Isolated)
        source.close()


def test_worker_imports_neither_jax_nor_transformers(isolated):
    np.testing.assert_array_equal(ask(isolated("imported"), ["jax", "transformers"]).score_B, 0)


def test_function_that_cannot_be_had(isolated, tmp_path):
    with pytest.raises(InputError, match="'acting:atc': acting has no function 'atc'"):
        isolated("atc")
    (tmp_path / "acting.py").write_text("import os; os._exit(3)")
    with pytest.raises(InputError, match=r"importing it ended its process \(status 3\)"):
        isolated("act")


def test_function_that_cannot_be_had_anew_loses_the_rows_of_the_call(isolated, tmp_path):
    source = isolated("act", chunk=5)
    (tmp_path / "acting.py").write_text("1 / 0")
    ask(source, ["die"])
    scored = ask(source, ["a", "bb"])
    np.testing.assert_array_equal(scored.score_B, [np.nan, np.nan])
    assert scored.problem.startswith("its process could not be started: reward function 'acting:a")
    assert "ZeroDivisionError" in scored.problem
    (tmp_path / "acting.py").write_text(MODULE)
    np.testing.assert_array_equal(ask(source, ["a", "bb"]).score_B, [1, 2])


@pytest.mark.timeout(60)
def test_process_that_reads_nothing(isolated):
    """More is sent than the connection holds."""
    source = isolated("act", timeout=1.0)
    os.kill(source._workers[0].process.pid, signal.SIGSTOP)
    scored = ask(source, ["a" * 10_000_000])
    assert np.isnan(scored.score_B).all()
    assert scored.problem == "took more than 1 s"
    np.testing.assert_array_equal(ask(source, ["a", "bb"]).score_B, [1, 2])


def test_workers_end_with_their_source(isolated):
    source = isolated("pid")
    worker = int(ask(source, ["a"]).score_B[0])
    assert alive(worker)
    source.close()
    assert not alive(worker)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Also when that is killed while a call is under way."""
    (tmp_path / "acting.py").write_text(
        "import os, time\n"
        "def f(prompts, completions, **columns):\n"
        "    print(os.getpid(), file=open('pid.part', 'w')); os.rename('pid.part', 'pid')\n"
        "    while True: pass\n"
    )
    code = (
        "import os, threading, time\n"
        "from jaxrlhf.config import IsolateConfig, RewardConfig\n"
        "from jaxrlhf.rewards.functions import Asked\n"
        "from jaxrlhf.rewards.isolation import Isolated\n"
        "source = Isolated(RewardConfig(function='acting:f', isolate=IsolateConfig()))\n"
        "threading.Thread(target=source, args=(Asked(['p'], ['a'], {}, [True]),)).start()\n"
        "while not os.path.exists('pid'): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=os.environ | path, check=False, timeout=60)
    worker = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 10
    while alive(worker):
        assert time.monotonic() < until, "the worker goes on"
        time.sleep(0.02)
