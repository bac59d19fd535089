"""One process that fails, stalls or disappears ends the others."""

import signal
import subprocess
import sys

import pytest
from loopback import by_flags, ended, free_port, results, started

from jaxrlhf.mesh.watchdog import FAILED, Watchdog, guarded

WORDS = ["--distributed.heartbeat", "5", "--distributed.watchdog", "6"]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_guarded_lets_a_lone_process_raise():
    with pytest.raises(ZeroDivisionError), guarded():
        raise ZeroDivisionError


def test_guarded_one_raises():
    (first, _, errors), (second, _, own) = results("raise", *by_flags(free_port()), words=WORDS)
    assert first not in (0, None), errors
    assert second == FAILED
    assert "ZeroDivisionError: on purpose" in own
    assert "process 1 of 2: failed; all processes end" in own


@pytest.mark.slow
def test_guarded_one_is_killed():
    (first, _, errors), (second, *_) = results("kill", *by_flags(free_port()), words=WORDS)
    assert first not in (0, None), errors
    assert second == -signal.SIGKILL


@pytest.mark.slow
def test_guarded_one_leaves_early():
    (first, _, errors), (second, _, own) = results("leave", *by_flags(free_port()), words=WORDS)
    assert first not in (0, None), errors
    assert second not in (0, None), own


@pytest.mark.slow
def test_guarded_one_is_stopped():
    with started("stop", *by_flags(free_port()), words=WORDS) as (first, second):
        [(status, _, errors)] = ended([first])
        assert status != 0, errors
        second.send_signal(signal.SIGCONT)
        [(status, _, errors)] = ended([second], 20)
        assert status != 0, errors


@pytest.mark.slow
def test_watchdog_one_stalls():
    (first, _, errors), (second, _, own) = results("sleep", *by_flags(free_port()), words=WORDS)
    assert first not in (0, None), errors
    assert second == FAILED
    assert "process 1 of 2: no progress for 6 s (distributed.watchdog)" in own
    assert 'File "<string>"' in own  # the stacks


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


def test_watchdog_of_zero_seconds_does_nothing():
    with Watchdog(0) as watchdog:
        watchdog.feed()
