"""One process that fails, stalls or disappears ends the others."""

import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest
from loopback import by_flags, ended, free_port, results, started

from jaxrlhf.config import DistributedConfig
from jaxrlhf.mesh import watchdog
from jaxrlhf.mesh.processes import WATCHDOG, limit
from jaxrlhf.mesh.watchdog import FAILED, QUICK, Watchdog, guarded

WORDS = ["--distributed.heartbeat", "5", "--distributed.watchdog", "6"]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_alone_neither_does_anything():
    Watchdog(0).feed()
    with pytest.raises(ZeroDivisionError), Watchdog(0), guarded():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("mode", "status", "messages"),
    [
        (
            "raise",
            FAILED,
            ("ZeroDivisionError: on purpose", "process 1 of 2: failed; all processes end"),
        ),
        pytest.param("kill", -signal.SIGKILL, (), marks=pytest.mark.slow),
        ("term", -signal.SIGTERM, ()),
        pytest.param("leave", None, (), marks=pytest.mark.slow),
        pytest.param(
            "sleep",
            FAILED,
            (
                "process 1 of 2: no progress for 6 s (distributed.watchdog)",
                'File "<string>"',  # the stacks
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_that_fails_ends_both(mode, status, messages):
    (first, _, errors), (second, _, own) = results(mode, *by_flags(free_port()), words=WORDS)
    assert first not in (0, None), errors
    assert second == status or (status is None and second not in (0, None)), own
    assert all(message in own for message in messages), own


@pytest.mark.slow
def test_one_that_is_stopped_ends_both():
    with started("stop", *by_flags(free_port()), words=WORDS) as (first, second):
        [(status, _, errors)] = ended([first])
        assert status != 0, errors
        second.send_signal(signal.SIGCONT)
        [(status, _, errors)] = ended([second], 20)
        assert status != 0, errors


def test_a_lost_process_is_said_in_a_line(monkeypatch, capsys):
    """Whose survivor has done nothing wrong."""
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(watchdog.os, "_exit", sys.exit)
    gone, other = "UNKNOWN: Gloo all-reduce\nfailed", "RESOURCE_EXHAUSTED"
    for error, lost in (
        (jax.errors.JaxRuntimeError(gone), True),
        (ValueError(gone), True),
        (jax.errors.JaxRuntimeError(other), False),
        (ValueError("shapes"), False),
    ):
        with pytest.raises(SystemExit, match="13"), guarded():
            raise error
        said = capsys.readouterr().err
        assert ("Traceback" in said) != lost
        assert (said.count("\n") == 1) == lost
        assert ("process 0 of 1: another process has gone or is late (UNKNOWN: " in said) == lost


def test_what_another_process_says_of_its_failure_is_said_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(watchdog.os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="13"), guarded():
        raise watchdog.ElsewhereError("another process has failed: process 0: no such file")
    said = "process 0 of 1: another process has failed: process 0: no such file\n"
    assert capsys.readouterr().err == said


def test_watchdog_ends_what_holds_the_interpreter():
    done = python(
        "import re\n"
        "from jaxrlhf.mesh.watchdog import Watchdog\n"
        "with Watchdog(0.5):\n"
        "    re.match(r'(a|aa)+$', 'a' * 60 + 'b')\n"
    )
    assert done.returncode == 1
    assert "Timeout (0:00:05.500000)!" in done.stderr
    assert "/re/" in done.stderr


def test_watchdog_of_one_process_watches_if_asked_for():
    done = python(
        "import time\n"
        "from jaxrlhf.config import DistributedConfig\n"
        "from jaxrlhf.mesh.processes import together\n"
        "with together(DistributedConfig(watchdog=1.0)):\n"
        "    time.sleep(10)\n"
    )
    assert done.returncode == FAILED
    assert "process 0 of 1: no progress for 1 s" in done.stderr


def test_limit_of_the_watchdog_where_it_is_left_open():
    open_, none = DistributedConfig(), DistributedConfig(watchdog=0.0)
    assert (limit(open_, 1), limit(open_, 2)) == (0, WATCHDOG)
    assert (limit(none, 1), limit(none, 2)) == (0, 0)


def test_limit_is_learnt_from_the_phases_without_a_name(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(300, learns=True)

    def phase(seconds, then=""):
        now[0] += seconds
        dog.feed(then)

    with monkeypatch.context() as patch:
        patch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
        phase(0, "setting up")
        assert dog.limit() == 1800
        phase(100)
        for seconds in (1, 2, 3, 4, 9, 6, 7):
            assert dog.limit() == 300
            phase(seconds)
        assert dog.limit() == 45  # 5 × 9
        assert dog.most() == 300  # of one that compiles
        phase(1, "evaluation")
        assert dog.limit() == 1800
        phase(400)
        assert dog.limit() == 45
        for _ in range(64):
            phase(0.1)
        assert dog.limit() == QUICK
        told = Watchdog(300)
        told._usual.extend([1.0] * 64)
        assert told.limit() == 300


def test_a_program_that_is_made_is_seen_in_the_stack():
    x = jnp.ones((64, 64))
    seen, over = [], threading.Event()
    main = threading.get_ident()

    def look():
        while not over.wait(0.001):
            seen.append(watchdog._makes_a_program(main))

    looks = threading.Thread(target=look)
    looks.start()
    time.sleep(0.2)
    before = sum(seen)
    new = jax.jit(lambda x: jnp.sort(jnp.linalg.qr(x @ x)[0]).sum() + uuid.uuid4().int % 1000)
    jax.block_until_ready(new(x))
    while_made = sum(seen)
    for _ in range(200):
        jax.block_until_ready(new(x))
    over.set()
    looks.join()
    assert (before, sum(seen) - while_made) == (0, 0)
    assert while_made > 0


@pytest.mark.parametrize(
    ("said", "phase", "waited", "ends"),
    [
        ({}, "", 39, False),
        ({}, "", 41, True),
        ({"compiling": [1]}, "", 41, False),
        ({"compiling": [1]}, "", 301, True),
        ({"left": [1]}, "", 29, False),
        ({"left": [1]}, "", 31, True),
        ({"left": [1]}, "the end of the run", 31, False),
        ({}, "evaluation", 1801, True),
    ],
)
def test_what_the_others_say_counts(said, phase, waited, ends, monkeypatch, capsys):
    dog = Watchdog(300, learns=True)
    dog._usual.extend([1.0] * 8)
    dog._fed, dog._phase = time.monotonic() - waited, phase
    monkeypatch.setattr(dog, "_said", lambda topic: said.get(topic, ()))
    looks = iter([False, True])
    monkeypatch.setattr(dog._stop, "wait", lambda _: next(looks))
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    monkeypatch.setattr(watchdog.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) if ends else nullcontext():
        dog._watch()
    errors = capsys.readouterr().err
    assert ("process 1 has left" in errors) == (ends and "left" in said)
    assert ("no progress for 1800 s in evaluation" in errors) == (phase == "evaluation")


def test_watchdog_sleeps_while_fed():
    done = python(
        "import time\n"
        "from jaxrlhf.mesh.watchdog import Watchdog\n"
        "with Watchdog(3.0) as watchdog:\n"
        "    for _ in range(8):\n"
        "        time.sleep(0.5)\n"
        "        watchdog.feed()\n"
        "time.sleep(4)\n"
        "print('alive')\n"
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")
