"""Tiny runs and pipelines that are carried out, struck and compared (``soak``).

A launch is the command in a process of its own. It is forked from one that has imported everything
and used nothing of JAX yet, so that it costs what a run costs, and not three seconds of imports.
"""

import atexit
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import runs
import servers
import yaml
from loopback import free_port

from jaxrlhf.apps import cli, shell
from jaxrlhf.config import CheckpointConfig, Config, EvalConfig, MeshConfig, RewardConfig, save
from jaxrlhf.config.rewards import ServiceConfig
from jaxrlhf.run.speed import TIMED

ROOT = Path(__file__).resolve().parents[1]

NEEDED = ("jaxrlhf.run.loop", "jaxrlhf.apps.pipeline", "jaxrlhf.apps.cli", "targets")
"""What launches are to find imported."""

ALGORITHMS = ("ppo", "grpo", "dpo", "sft", "reward_model")

CLOCKS = {*TIMED, "stage_seconds", "peak_memory_gib", "failed_saves", "minutes"}
"""What two runs need not share."""


@dataclass(frozen=True)
class Target:
    """Something to carry out, on one process or several.

    Attributes:
      words: of the command, by the folder that it writes to.
    """

    name: str
    words: Callable[[Path], list[str]]
    processes: int = 1

    def launch(self, out: Path, **variables: str) -> list[Any]:
        """Its processes, begun; what they say is added to out.log."""
        # A test's, so that its programs are found, but one device; else those that compile quickly.
        xla = [x for x in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in x]
        variables["XLA_FLAGS"] = " ".join(xla) or "--xla_backend_optimization_level=0"
        flags = []
        if self.processes > 1:
            flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes"]
            flags += [str(self.processes), "--distributed.heartbeat", "10"]
            flags += ["--distributed.watchdog", "60", "--process"]
        started = []
        for index in range(self.processes):
            words = [*self.words(out), *flags, *([str(index)] if flags else [])]
            arguments = (words, f"{out}.log", variables)
            started.append(nursery().Process(target=carry_out, args=arguments))
            started[-1].start()
        return started


@cache
def nursery() -> Any:
    """Where processes are forked; what JAX reads as it is imported is set before that begins."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    shell.prepare_jax()
    places = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = ":".join(places)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(NEEDED))
    return context


def carry_out(words: list[str], log: str, variables: dict[str, str]) -> None:
    """The command, in a process of its own.

    Args:
      variables: XLA_FLAGS. CLOCK: a seed; the clock jumps by up to four months. KILL: the process
        kills itself at the change of that number to a file of checkpoints.
    """
    # As the command's own, it is heard from the command's first line to its last.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ["XLA_FLAGS"] = variables["XLA_FLAGS"]
    if jumps := variables.get("CLOCK"):
        true, chance = time.time, random.Random(int(jumps))
        time.time = lambda: true() + chance.choice([-1e7, -60.0, 0.0, 0.0, 60.0, 1e7])
    if number := variables.get("KILL"):
        die_at(int(number))
    sys.argv = ["jaxrlhf", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = cli.main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit._run_exitfuncs()
    sys.exit(status)


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open")
"""Audit events of what changes files."""


def die_at(number: int) -> None:
    """Kill this process just before the change of that number to what is below ``checkpoints``."""
    count = itertools.count(1)

    def seen(event: str, given: tuple) -> None:
        if event not in CHANGES or "checkpoints" not in str(given[0]):
            return
        if event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen)


# What is carried out


def pipeline(folder: Path) -> Target:
    """The tiny pipeline, its runs shortened."""
    source = ROOT / "configs" / "pipelines" / "demo_tiny.yaml"
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    short = {"steps": 12, "checkpoint.every": 2, "checkpoint.keep": 3}
    for stage in content["stages"]:
        if "train" in stage:
            stage["train"] = str((source.parent / stage["train"]).resolve())
            stage["set"] |= short
        if "preferences" in stage:
            stage["preferences"] |= {"train_rounds": 1, "eval_rounds": 1}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return Target("pipeline", lambda out: ["pipeline", str(path), "--output", str(out)])


def run(name: str, folder: Path, steps: int, url: str = "", processes: int = 1) -> Target:
    """A run of an algorithm.

    Args:
      url: of a service that gives the rewards, if it has any.
    """
    rows = folder / f"rows_{name}"
    rows.mkdir(exist_ok=True)
    config = runs.of(name, rows, steps=steps, checkpoint=CheckpointConfig(every=2, keep=3))
    if config.rewards:
        data = replace(config.data, eval=config.data.train)
        rewards = RewardConfig(service=ServiceConfig(url, backoff=0.05)) if url else runs.GOODNESS
        config = replace(config, data=data, rewards=(rewards,))
    config = replace(config, mesh=MeshConfig(data=processes))
    if config.data.eval:
        config = replace(config, eval=EvalConfig(every=20, **({"n": 1} if config.rewards else {})))
    return target(config, folder, f"{name}{processes if processes > 1 else ''}")


def target(config: Config, folder: Path, name: str) -> Target:
    path = folder / f"{name}.yaml"
    save(config, path)
    words = ["train", str(path), "--output"]
    return Target(name, lambda out: [*words, str(out)], config.mesh.data)


BAD = {
    "an error": lambda handler, request: servers.say(handler, b"", status=503),
    "no JSON": lambda handler, request: servers.say(handler, b"{"),
    "no list": lambda handler, request: servers.say(handler, {"id": request["id"], "rewards": 5}),
    "cut": lambda handler, request: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "gone": lambda handler, request: None,
}
"""What a service answers that is no reward."""


class Unreliable:
    """A reward service: of its requests every third fails, one way or another, and comes through
    when it is asked again.

    Attributes:
      bad: how often it has failed, by the way.
    """

    def __init__(self, seed: int):
        self.bad = dict.fromkeys(BAD, 0)
        self._chance = random.Random(seed)
        self._failed: set[str] = set()

    def __call__(self, handler: Any, request: dict) -> None:
        if request["id"] in self._failed or self._chance.random() > 1 / 3:
            return servers.honest(handler, request)
        self._failed.add(request["id"])
        kind = self._chance.choice(list(BAD))
        self.bad[kind] += 1
        handler.close_connection = kind in ("cut", "gone")
        return BAD[kind](handler, request)


# What there is


def on_disk(out: Path) -> dict[str, list[int]]:
    """The steps of every run below ``out``, by its folder; the newest is the last."""
    return {
        str(folder.parent.relative_to(out)): steps
        for folder in sorted(out.rglob("checkpoints"))
        if (steps := sorted(int(x.name) for x in folder.iterdir() if x.name.isdigit()))
    }


def is_done(out: Path) -> bool:
    """Whether a run, a stage or a pipeline has come to its end."""
    return (out / "summary.json").is_file()


def untimed(value: object) -> object:
    """``value`` without what a clock has said."""
    if isinstance(value, dict):
        return {key: untimed(x) for key, x in value.items() if key not in CLOCKS}
    return [untimed(x) for x in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, object]:
    """All that a run, or a pipeline, has come to, by the name of the file."""
    found: dict[str, object] = {}
    for run, steps in on_disk(out).items():
        path = out / run / "checkpoints" / str(steps[-1]) / "host" / "metadata"
        note = json.loads(path.read_text(encoding="utf-8"))["note"]
        note["host"].pop("fingerprint")
        found[f"{run}/{steps[-1]}"] = untimed({x: note[x] for x in ("leaves", "host")})
    for path in sorted(out.rglob("*.json*")):
        if "checkpoints" in path.parts or path.name == "stage.json":
            continue
        text = path.read_text(encoding="utf-8")
        rows = text.splitlines() if path.suffix == ".jsonl" else [text]
        found[str(path.relative_to(out))] = [untimed(json.loads(row)) for row in rows]
    # Names of folders are those of the run, wherever it lies.
    return json.loads(json.dumps(found).replace(str(out), "OUT"))


def last_line(run: Path) -> int:
    """The step of the last line of metrics that is whole; -1 where there is none."""
    path = run / "metrics.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else -1
