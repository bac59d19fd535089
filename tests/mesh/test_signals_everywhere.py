"""The table of phases: SIGTERM and Ctrl-C in each, on one process and two, by `make signals`.

Each row starts the command, waits until the run is in the phase, sends the signal, and starts it
again: the run that was stopped ends as the one that was not.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import servers
from loopback import free_port, told

from jaxrlhf.config import (
    EvalConfig,
    IsolateConfig,
    RewardConfig,
    SampleConfig,
    ServiceConfig,
    save,
)
from jaxrlhf.run.speed import TIMED

pytestmark = pytest.mark.signals

HELD = "HELD"
"""Variable: folder of ``here``, which says that a run is held, and ``go``, which lets it pass."""

LIMIT = 10.0
"""Seconds from the signal to the end of the process."""

MAIN = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests
import orbax.checkpoint as ocp

begin = ocp.CheckpointManager.save

def slow(self, step, *args, **kwargs):
    folder = Path(os.environ["HELD"])
    saved = begin(self, step, *args, **kwargs)
    if os.environ.get("SAVE") and step == 2 and not (folder / "go").exists():
        (folder / "here").touch()
        time.sleep(3)
    return saved

ocp.CheckpointManager.save = slow
from jaxrlhf.apps.cli import main
sys.exit(main())
"""


def pay(completions):
    good = runs.WORDS.split()[:6]
    return [float(sum(word in good for word in text.split())) for text in completions]


def hold(which):
    """Wait, at the call that HOLD names: "proxy 3" is the third of the reward's."""
    folder = Path(os.environ[HELD])
    calls = folder / f"{which}-{os.environ.get('JAX_PROCESS_ID', '')}"
    with open(calls, "a", encoding="utf-8") as file:
        file.write(".")
    wanted, _, number = os.environ.get("HOLD", "").partition(" ")
    at = wanted == which and calls.stat().st_size == int(number)
    if at and os.environ.get("JAX_PROCESS_ID", "1") == "1" and not (folder / "go").exists():
        (folder / "here").touch()
        time.sleep(60)


def proxy(prompts, completions, **columns):
    hold("proxy")
    return pay(completions)


def gold(prompts, completions, **columns):
    hold("gold")
    return pay(completions)


def asked(handler, request):
    """The same from a service."""
    rows = request["rows"]
    scores = pay([row["completion"] for row in rows])
    rewards = [{"id": row["id"], "reward": x} for row, x in zip(rows, scores, strict=True)]
    servers.say(handler, {"id": request["id"], "rewards": rewards})


def config_of(folder, reward=None, **changes):
    folder.mkdir()
    config = runs.ppo(folder)
    return replace(
        config,
        rewards=(
            reward or RewardConfig(function="test_signals_everywhere:proxy", in_process=True),
        ),
        data=replace(config.data, eval=config.data.train),
        eval=EvalConfig(
            every=2, n=1, gold=(RewardConfig(function=f"{__name__}:gold", in_process=True),)
        ),
        **changes,
    )


STARTED = []
"""Processes of the test at hand."""


@pytest.fixture(autouse=True)
def ended():
    """What a test that fails has left behind is killed."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()
        process.stdout.close()


def launch(config, folder, *words, **variables):
    path = folder / "config.yaml"
    save(config, path)
    places = (Path(__file__).parents[level] for level in range(3))
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "train", str(path), *words],
        env={
            **os.environ,
            "PYTHONPATH": ":".join(map(str, places)),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            HELD: str(folder),
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    STARTED.append(process)
    return process


def await_file(path, *processes):
    until = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < until
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def stopped(process, number, seconds=LIMIT):
    """Output, and how long it took after a signal."""
    began = time.monotonic()
    process.send_signal(number)
    out = process.communicate(timeout=seconds + 60)[0]
    took = time.monotonic() - began
    print(f"{took:.1f} s, status {process.returncode}")
    assert process.returncode == 0, out
    assert "goes on from there" in out, out
    assert took < seconds, out
    return out


def logged(config):
    """What a run has logged, but for its clock."""
    output = Path(config.output)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    return rows, (output / "samples.jsonl").read_text()


def finish(config, folder, *others):
    """The next launch, which nothing holds, and what the run has logged."""
    (folder / "go").touch()
    process = launch(config, folder)
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out
    assert (Path(config.output) / "summary.json").exists()
    return logged(config)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals") / "run"
    return finish(config_of(folder), folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["proxy 1", "proxy 2", "proxy 3", "gold 1", "gold 2", "gold 3"])
def test_in_a_function(place, number, undisturbed, tmp_path):
    """A reward that sleeps, and the evaluations before (1), between (2) and at the end (3)."""
    folder = tmp_path / "run"
    config = config_of(folder)
    process = launch(config, folder, HOLD=place)
    await_file(folder / "here", process)
    stopped(process, number)
    assert finish(config, folder) == undisturbed


@pytest.mark.parametrize("place", ["proxy 1", "proxy 3"])
def test_in_an_isolated_function(place, undisturbed, tmp_path):
    folder = tmp_path / "run"
    isolate = IsolateConfig(timeout=100)
    reward = RewardConfig(function="test_signals_everywhere:proxy", isolate=isolate)
    config = config_of(folder, reward)
    process = launch(config, folder, HOLD=place)
    await_file(folder / "here", process)
    stopped(process, signal.SIGTERM)
    assert finish(config, folder) == undisturbed


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_in_a_service(how, undisturbed, tmp_path):
    folder = tmp_path / "run"

    def behave(handler, request):
        if (folder / "go").exists() or len(server.seen) < 3:
            return asked(handler, request)
        (folder / "here").touch()
        if how == "fails":
            return servers.fails(handler, request)
        return time.sleep(60)

    with servers.service(behave) as server:
        url = ServiceConfig(url=server.url, timeout=60, retries=20, batch_size=100)
        config = config_of(folder, RewardConfig(service=url))
        process = launch(config, folder)
        await_file(folder / "here", process)
        stopped(process, signal.SIGTERM)
        # Metrics bear the name of their source; samples, with their rewards, do not.
        assert finish(config, folder)[1] == undisturbed[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("name", "seconds"),
    [*(("ppo", x) for x in (0.0, 1.0, 3.0, 5.0)), *(("sft", x) for x in (0.0, 1.0, 3.0))],
)
def test_while_it_compiles(name, seconds, number, undisturbed, tmp_path):
    """Without programs compiled before, some seconds after the run has begun."""
    folder = tmp_path / "run"
    config = config_of(folder)
    if name == "sft":
        config = runs.sft(folder)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    process = launch(config, folder, **cache)
    await_file(Path(config.output) / ".lock", process)
    time.sleep(seconds)
    stopped(process, number)
    rows = finish(config, folder)
    assert name == "sft" or rows == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_it_samples(number, tmp_path):
    folder = tmp_path / "run"
    config = config_of(
        folder,
        sample=SampleConfig(max_new_tokens=6000, n=2, stop=(15,)),
        model=runs.ModelConfig(
            decoder=replace(runs.DECODER, context=6100), tokenizer=f"words:{runs.WORDS}"
        ),
    )
    config = replace(config, eval=EvalConfig(), data=replace(config.data, eval=""))
    process = launch(config, folder)
    metrics = Path(config.output) / "metrics.jsonl"
    await_file(metrics, process)
    while not metrics.stat().st_size:
        time.sleep(0.05)
    time.sleep(0.3)
    stopped(process, number)


def test_while_it_saves(undisturbed, tmp_path):
    folder = tmp_path / "run"
    config = config_of(folder)
    process = launch(config, folder, SAVE="1")
    await_file(folder / "here", process)
    out = stopped(process, signal.SIGTERM)
    assert "after iteration 2, which is saved" in out
    assert finish(config, folder) == undisturbed


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)]
)
def test_again_while_it_saves(numbers, undisturbed, tmp_path):
    folder = tmp_path / "run"
    config = config_of(folder)
    process = launch(config, folder, SAVE="1")
    await_file(folder / "here", process)
    process.send_signal(numbers[0])
    time.sleep(1.5)
    began = time.monotonic()
    process.send_signal(numbers[1])
    out = process.communicate(timeout=20)[0]
    print(f"{time.monotonic() - began:.1f} s, status {process.returncode}")
    assert process.returncode == 128 + numbers[1], out
    assert time.monotonic() - began < 2
    assert finish(config, folder) == undisturbed


@pytest.mark.parametrize("place", ["proxy 1", "proxy 3", "gold 1", "gold 2", "gold 3"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two(place, which, tmp_path):
    """The second process waits in a function; either of the two gets the signal."""
    folder = tmp_path / "run"
    config = config_of(folder)

    def both(**variables):
        port = free_port()
        words = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
        return [
            launch(
                config,
                folder,
                *words,
                str(i),
                JAX_PROCESS_ID=str(i),
                JAX_COORDINATOR_ADDRESS="",
                **variables,
            )
            for i in range(2)
        ]

    processes = both(HOLD=place)
    await_file(folder / "here", *processes)
    began = time.monotonic()
    processes[which].send_signal(signal.SIGTERM)
    outs = [out for out, _ in told(processes, 90)]
    took = time.monotonic() - began
    print(f"{took:.1f} s, status {[process.returncode for process in processes]}")
    assert [process.returncode for process in processes] == [0, 0], outs
    assert took < LIMIT
    assert "goes on from there" in outs[0]
    (folder / "go").touch()
    processes = both()
    outs = [out for out, _ in told(processes, 200)]
    assert [process.returncode for process in processes] == [0, 0], outs
    steps = [row["step"] for row in logged(config)[0] if "loss" in row]
    assert steps == [1, 2, 3, 4]
    held_out = [row["step"] for row in logged(config)[0] if "eval/gold" in row]
    assert held_out == [0, 2, 4]
