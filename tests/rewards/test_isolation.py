"""A function that misbehaves in any way costs the rows of its call, and nothing else; its process
starts light, and ends with its source or with whoever started it."""

import datetime
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import GOODNESS

from jaxrlhf.config import IsolateConfig, RewardConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.functions import Asked
from jaxrlhf.rewards.isolation import Isolated, host_source, is_foreign
from jaxrlhf.rewards.supervisor import children

MODULE = """
import asyncio, json, multiprocessing, os, subprocess, sys, time

def act(prompts, completions, **columns):
    print("what a function prints disturbs nobody")
    for text in completions:
        if text == "raise": raise ValueError("two\\nlines")
        if text == "exit": sys.exit(3)
        if text == "die": os._exit(3)
        if text == "die0": os._exit(0)
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

def write_everywhere(data):
    for handle in range(3, 64):
        try: os.write(handle, data)
        except OSError: pass

def message(**content):
    body = json.dumps(content).encode()
    return len(body).to_bytes(8, "big") + body

def number_of_the_request():
    frame = sys._getframe()
    while "asked" not in frame.f_locals: frame = frame.f_back
    return frame.f_locals["asked"]["id"]

def forge(prompts, completions, how, **columns):
    if how[0] == "pickle":  # would run a command where it is unpickled
        write_everywhere(b"\\x00\\x00\\x00#cos\\nsystem\\n(S'touch unpickled'\\ntR.")
    if how[0] == "garbage": write_everywhere((8).to_bytes(8, "big") + b"no JSON!")
    if how[0] == "deep": write_everywhere((60).to_bytes(8, "big") + b"[" * 60)
    if how[0] == "unasked": write_everywhere(message(scores=[9.0] * len(completions)))
    if how[0] == "guess": write_everywhere(message(id="0" * 32, scores=[9.0] * len(completions)))
    if how[0] == "many": write_everywhere(message(id=number_of_the_request(), scores=[9.0] * 99))
    if how[0] == "text": write_everywhere(message(id=number_of_the_request(), scores=["9"] * 2))
    return [1.0] * len(completions)

def descriptors_of_a_child(prompts, completions, **columns):
    command = ["ls", "-l", "/proc/self/fd"]
    run = subprocess.run(command, capture_output=True, text=True, close_fds=False)
    return [float("socket:" in run.stdout)] * len(completions)

def kinds(prompts, completions, day, **columns):
    return [float(type(x) is str) for x in day]

def kill_supervisor(prompts, completions, **columns):
    os.kill(os.getppid(), 9)
    time.sleep(1000)

def terminate_children(prompts, completions, **columns):
    child = subprocess.Popen(["sleep", "100"])
    forks = multiprocessing.get_context("fork")
    runs = forks.Event()
    fork = forks.Process(target=lambda: (runs.set(), time.sleep(100)))
    fork.start()
    runs.wait(10)
    child.terminate(), fork.terminate()
    fork.join()
    return [float(child.wait()), float(fork.exitcode)]

def signal_all(prompts, completions, **columns):
    for number in (2, 15):
        os.kill(os.getppid(), number), os.kill(os.getpid(), number)
    time.sleep(0.2)
    return [float(os.getppid() != 1)] * len(completions)

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

    def make(name, strict=None, **limits):
        limits = None if strict else IsolateConfig(**{"chunk": 2, "timeout": 20.0, **limits})
        config = RewardConfig(function=f"acting:{name}", isolate=limits, timeout=strict or 1800.0)
        made.append(host_source(config))
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
        assert scored.problem == "took more than its timeout of 1 s"


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
    (worker,) = children(source._workers[0].process.pid)
    os.kill(worker, signal.SIGSTOP)
    scored = ask(source, ["a" * 10_000_000])
    assert np.isnan(scored.score_B).all()
    assert scored.problem == "took more than its timeout of 1 s"
    np.testing.assert_array_equal(ask(source, ["a", "bb"]).score_B, [1, 2])


def test_workers_end_with_their_source(isolated):
    source = isolated("pid")
    worker = int(ask(source, ["a"]).score_B[0])
    assert alive(worker)
    source.close()
    assert not alive(worker)


def test_worker_ends_with_its_supervisor_and_another_is_started(isolated):
    source = isolated("kill_supervisor", timeout=2.0)
    for _ in range(2):
        assert ask(source, ["a"]).problem == "ended its process (killed by SIGKILL)"


def test_what_a_scheduler_sends_to_all_ends_no_worker_but_its_children_can_be_ended(isolated):
    source = isolated("signal_all")
    np.testing.assert_array_equal(ask(source, ["a", "b"]).score_B, 1)
    np.testing.assert_array_equal(ask(source, ["a", "b"]).score_B, 1)
    np.testing.assert_array_equal(ask(isolated("terminate_children"), ["a", "b"]).score_B, -15)


ENDLESS = """
import os, re, subprocess, sys, time

def note(name, value):
    print(value, file=open(name + ".part", "w"))
    os.rename(name + ".part", name)

def f(prompts, completions, **columns):
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    note("child", subprocess.Popen(sleep, start_new_session=True).pid)
    if os.fork() == 0:  # a daemon: its parent ends, and it has a session of its own
        os.setsid()
        if os.fork(): os._exit(0)
        note("daemon", os.getpid())
        time.sleep(1000)
    while not os.path.exists("daemon"): time.sleep(0.01)
    note("worker", os.getpid())
    re.match("(a|aa)+$", "a" * 60 + "b")  # holds the interpreter, and returns in years
"""
RUN = """
import os, threading, time
from jaxrlhf.config import IsolateConfig, RewardConfig
from jaxrlhf.rewards.functions import Asked
from jaxrlhf.rewards.isolation import Isolated
source = Isolated(RewardConfig(function="endless:f", isolate=IsolateConfig()))
threading.Thread(target=source, args=(Asked(["p"], ["a"], {}, [True]),)).start()
while not os.path.exists("worker"): time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


def gone(folder, seconds):
    """Wait until the processes that ENDLESS has noted have ended."""
    until = time.monotonic() + seconds
    for name in ("worker", "child", "daemon"):
        process = int((folder / name).read_text())
        while alive(process):
            assert time.monotonic() < until, f"the {name} goes on"
            time.sleep(0.02)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Also when that is killed while a call holds the worker's interpreter; and what the function
    has started ends too, wherever it hides."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", RUN]
    subprocess.run(command, cwd=tmp_path, env=os.environ | path, check=False, timeout=60)
    gone(tmp_path, 10)


def test_deadline_ends_what_holds_the_interpreter_and_all_that_it_has_started(
    tmp_path, monkeypatch
):
    (tmp_path / "endless.py").write_text(ENDLESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = host_source(RewardConfig(function="endless:f", timeout=2.0))
    with pytest.raises(InputError, match="'endless:f' took more than its timeout of 2 s; mend it"):
        ask(source, ["a"])
    gone(tmp_path, 10)


def test_function_that_fails_ends_the_run_without_isolate(isolated):
    """All rows are one call; a failure names the function, and is none of the rows' score."""
    source = isolated("act", strict=2.0)
    np.testing.assert_array_equal(ask(source, ["a"] * 100).score_B, 1)
    for text, what in [
        ("raise", r"raised ValueError: two lines at .*/acting\.py:7"),
        ("few", "returned 0 scores for 1 completions"),
        ("die0", r"ended its process \(status 0\)"),
        ("sleep", "took more than its timeout of 2 s"),
    ]:
        with pytest.raises(InputError, match=f"^reward function 'acting:act' {what}; mend it"):
            ask(source, [text])
    np.testing.assert_array_equal(ask(source, ["a", "bb"]).score_B, [1, 2])


def test_whose_code_is_called_where():
    own = [RewardConfig("sentiment"), GOODNESS, RewardConfig(verifier="number")]
    others = [RewardConfig("mine:f"), RewardConfig(verifier="math")]
    assert [is_foreign(source) for source in own + others] == [False] * 3 + [True] * 2
    assert not any(is_foreign(replace(source, in_process=True)) for source in others)


def test_answers_that_are_forged(isolated, tmp_path, monkeypatch):
    """By code that writes to every descriptor of the worker. Nothing is unpickled."""
    monkeypatch.chdir(tmp_path)
    source = isolated("forge")
    for how, problem in [
        ("pickle", "sent [0-9]+ bytes, where at most [0-9]+ are an answer"),
        ("garbage", "sent what is not JSON: .*no JSON"),
        ("deep", "sent what is not JSON"),
        ("unasked", "sent what is no answer to the request"),
        ("guess", "sent what is no answer to the request"),
        ("many", "sent 99 scores for 2 rows"),
        ("text", "sent scores that are no numbers"),
    ]:
        scored = ask(source, ["a", "b", "c", "d"], how=["", "", how, how])
        np.testing.assert_array_equal(scored.score_B, [1, 1, np.nan, np.nan], err_msg=how)
        assert re.match(problem, scored.problem), (how, scored.problem)
        assert not (tmp_path / "unpickled").exists()


def test_what_a_function_starts_has_no_connection_to_the_run(isolated):
    np.testing.assert_array_equal(ask(isolated("descriptors_of_a_child"), ["a"]).score_B, 0)


def test_what_json_has_not_arrives_as_text(isolated):
    days = [datetime.date(2026, 1, 2), "2026-01-02"]
    np.testing.assert_array_equal(ask(isolated("kinds"), ["a", "b"], day=days).score_B, 1)


def test_interrupted_call_is_not_waited_for(isolated):
    source = isolated("act", timeout=1000.0, chunk=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask(source, ["sleep"] * 3)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 20
    np.testing.assert_array_equal(ask(source, ["a", "bb"]).score_B, [1, 2])
