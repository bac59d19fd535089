"""Tiny runs under random faults, over and over; each must end as the run that nothing disturbed.

    make soak     (python tests/soak.py --help lists what can be chosen)

A target is first carried out undisturbed. Then, until the time is over, it is carried out anew
while faults strike its process: SIGKILL, SIGSTOP for some seconds, SIGTERM, Ctrl-C, a full disk, a
clock that jumps; between two launches a bit flips in its newest checkpoint. Rewards come from a
service that fails every third request once. Of two processes one is struck, and the other has to
end by itself. In the end arrays (by their digests), host's numbers, metrics, samples and pairs are
compared with the undisturbed ones, bit for bit but for the clock. Status 1 if anything differs, a
launch hangs, prints a traceback, or resumes from before a step that was on disk.

The disk is a small tmpfs where the process may mount one, else a limit on the size of files.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import runs
import servers
import yaml
from loopback import free_port

from jaxrlhf.config import CheckpointConfig, EvalConfig, MeshConfig, RewardConfig, save
from jaxrlhf.config.rewards import ServiceConfig
from jaxrlhf.run.speed import TIMED

ROOT = Path(__file__).resolve().parents[1]

MAIN = """
import os, random, sys, time

if jumps := os.environ.get("SOAK_CLOCK"):
    true, chance = time.time, random.Random(int(jumps))
    time.time = lambda: true() + chance.choice([-1e7, -60.0, 0.0, 0.0, 60.0, 1e7])
from jaxrlhf.apps.cli import main
sys.exit(main())
"""
"""The command; with SOAK_CLOCK, under a clock that jumps by up to four months."""

LONG = 300
"""Seconds after which a launch counts as hung."""

DISK = 48
"""MiB of the disk."""

FAULTS = {"kill": 6, "stop": 2, "term": 3, "interrupt": 1, "disk": 3, "clock": 1, "flip": 2}
"""What strikes, and how often among the others."""

CLOCKS = {*TIMED, "stage_seconds", "peak_memory_gib", "failed_saves", "minutes"}
"""What two runs need not share."""


@dataclass
class Target:
    """Something to carry out, and where it ends up."""

    name: str
    words: Callable[[Path], list[str]]
    """The command's words, by the folder that it writes to."""
    processes: int = 1

    def launch(self, out: Path, **variables: str) -> list[subprocess.Popen]:
        """Its processes; what they say is added to out.log."""
        port, flags = free_port(), []
        if self.processes > 1:
            flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(self.processes)]
            flags += ["--distributed.heartbeat", "10", "--distributed.watchdog", "60"]
        kept = {x: y for x, y in os.environ.items() if x not in ("XLA_FLAGS", "JAX_PROCESS_ID")}
        environment = {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
        started = []
        for index in range(self.processes):
            own = [*flags, "--process", str(index)] if flags else []
            with open(f"{out}.log", "a", encoding="utf-8") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-c", MAIN, *self.words(out), *own],
                        env=environment,
                        stdout=log,
                        stderr=log,
                    )
                )
        return started


class Tally(collections.Counter):
    """What has happened, and what should not have."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []

    def complain(self, what: str) -> None:
        self.wrong.append(what)
        print(f"WRONG: {what}", flush=True)


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


def ppo(folder: Path, url: str = "", processes: int = 1) -> Target:
    """PPO on one process whose rewards a service gives, or on two."""
    (folder / "rows").mkdir(exist_ok=True)
    rewards = (RewardConfig(service=ServiceConfig(url, backoff=0.05)),) if url else (runs.GOODNESS,)
    config = runs.ppo(
        folder / "rows", steps=40, rewards=rewards, checkpoint=CheckpointConfig(every=2, keep=3)
    )
    data = replace(config.data, eval=config.data.train)
    config = replace(config, data=data, eval=EvalConfig(every=10, n=1))
    config = replace(config, mesh=MeshConfig(data=processes))
    path = folder / f"ppo_{processes}.yaml"
    save(config, path)
    name = "two" if processes > 1 else "ppo"
    return Target(name, lambda out: ["train", str(path), "--output", str(out)], processes)


def unreliable(handler: object, request: dict) -> None:
    """A reward service: every third request fails, and comes through when it is asked again."""
    failed, number = unreliable.failed, len(unreliable.failed)  # type: ignore[attr-defined]
    fails = hash(request["id"]) % 3 == 0 and request["id"] not in failed
    if fails:
        failed.add(request["id"])
    if fails and number % 2:
        servers.say(handler, b"{", status=200)
    elif fails:
        servers.fails(handler, request)
    else:
        servers.honest(handler, request)


unreliable.failed = set()  # type: ignore[attr-defined]


# What is there


def on_disk(out: Path) -> dict[str, int]:
    """The newest step of every run below ``out``."""
    return {
        str(folder.relative_to(out)): max(steps)
        for folder in sorted(out.rglob("checkpoints"))
        if (steps := [int(x.name) for x in folder.iterdir() if x.name.isdigit()])
    }


def untimed(value: object) -> object:
    """``value`` without what a clock has said."""
    if isinstance(value, dict):
        return {key: untimed(x) for key, x in value.items() if key not in CLOCKS}
    return [untimed(x) for x in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, object]:
    """All that a run, or a pipeline, has come to, by the name of the file."""
    found: dict[str, object] = {}
    for run, step in on_disk(out).items():
        path = out / run / str(step) / "host" / "metadata"
        note = json.loads(path.read_text(encoding="utf-8"))["note"]
        note["host"].pop("fingerprint")
        found[f"{run}/{step}"] = untimed({x: note[x] for x in ("leaves", "host")})
    for path in sorted(out.rglob("*.json*")):
        if "checkpoints" in path.parts or path.name == "stage.json":
            continue
        text = path.read_text(encoding="utf-8")
        rows = text.splitlines() if path.suffix == ".jsonl" else [text]
        found[str(path.relative_to(out))] = [untimed(json.loads(row)) for row in rows]
    # Names of folders are those of the run, wherever it lies.
    return json.loads(json.dumps(found).replace(str(out), "OUT"))


def is_done(out: Path) -> bool:
    return (out / "summary.json").is_file()


# Faults


def fill(out: Path, until: float) -> None:
    """No room on the disk until then."""
    ballast = out.parent / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    time.sleep(max(0.0, until - time.monotonic()))
    ballast.unlink(missing_ok=True)


def limit(process: subprocess.Popen, until: float) -> None:
    """No file can grow beyond some kB until then: where no small disk can be mounted."""
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, hard))
        time.sleep(max(0.0, until - time.monotonic()))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))


def flip(out: Path, chance: random.Random) -> str:
    """Flip a bit of the newest checkpoint of the run in progress; which run, if there is one.

    Of a run that is done the last step is what others start from: see docs/reliability.md.
    """
    steps = on_disk(out)
    going = [x for x in steps if not (out / x).with_name("summary.json").exists()]
    going = [x for x in going if len([y for y in (out / x).iterdir() if y.name.isdigit()]) > 1]
    if not going:
        return ""
    run = chance.choice(going)
    files = [x for x in (out / run / str(steps[run])).rglob("*") if x.is_file()]
    path = chance.choice(sorted(x for x in files if x.stat().st_size))
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)
    return run


def strike(fault: str, struck: subprocess.Popen, out: Path, small: bool, seconds: float) -> None:
    """Do to a process what the fault is; it may have ended."""
    if fault == "stop":
        struck.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        struck.send_signal(signal.SIGCONT)
    elif fault == "disk" and small:
        fill(out, time.monotonic() + seconds)
    elif fault == "disk":
        limit(struck, time.monotonic() + seconds)
    else:
        kinds = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
        struck.send_signal(kinds[fault])


def wait(started: Sequence[subprocess.Popen], tally: Tally, what: str) -> None:
    """Wait for the end of all; those that hang are killed and complained of."""
    until = time.monotonic() + LONG
    for process in started:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            tally.complain(f"{what}: process {started.index(process)} hangs")
            process.kill()
            process.wait()


def disturbed(
    target: Target, out: Path, chance: random.Random, whole: float, small: bool, tally: Tally,
    most: int,
) -> None:  # fmt: skip
    """Carry a target out under up to ``most`` faults; ``whole`` seconds are what it takes alone."""
    log, strikes = Path(f"{out}.log"), 0
    while not is_done(out) and tally["launches"] < 10_000:
        fault = chance.choices(list(FAULTS), list(FAULTS.values()))[0] if strikes < most else ""
        flipped = flip(out, chance) if fault == "flip" else ""
        before = on_disk(out)
        said = log.stat().st_size if log.exists() else 0
        clock = {"SOAK_CLOCK": str(chance.randrange(2**31))} if fault == "clock" else {}
        started = target.launch(out, **clock)
        tally["launches"] += 1
        struck = chance.choice(started)
        if fault not in ("", "clock", "flip"):
            with suppress(subprocess.TimeoutExpired):
                started[0].wait(chance.uniform(0.1, 1.2) * whole)
        if fault and (fault in ("clock", "flip") or started[0].poll() is None):
            strikes += 1
            tally[fault if fault != "flip" or flipped else "no step to flip"] += 1
            if fault not in ("clock", "flip"):
                strike(fault, struck, out, small, chance.uniform(1, 5))
        wait(started, tally, f"{target.name} after {fault or 'nothing'}")
        with open(log, encoding="utf-8") as file:
            file.seek(said)
            told = file.read()
        check(told, before, flipped, tally, f"{target.name}, {fault or 'undisturbed'}")
        if not fault and not is_done(out):
            tally.complain(f"{target.name}: undisturbed, and not done: {told[-300:]}")
            return


def check(told: str, before: dict[str, int], flipped: str, tally: Tally, what: str) -> None:
    """See that a launch went on from what was on disk, and ended in words, not in a traceback."""
    if "Traceback" in told:
        tally["tracebacks"] += 1
        tally.complain(f"{what}: a traceback: {told[told.index('Traceback') :][:2000]}")
    resumed = [int(x.split()[0]) for x in told.split("resumed after iteration ")[1:]]
    tally["resumed"] += len(resumed)
    # The run that goes on is the last that had begun; those before it are done.
    newest = list(before.values())
    if resumed and newest and resumed[0] not in newest and not flipped:
        tally["lost"] += 1
        tally.complain(f"{what}: resumed after iteration {resumed[0]}, and on disk was {before}")


def compare(wanted: dict, found: dict, tally: Tally, what: str) -> None:
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            tally.complain(f"{what}: {name} differs")


def soak(
    folder: Path, seconds: float, seed: int, names: Sequence[str], most: int, small: bool = False
) -> Tally:
    """Carry targets out, undisturbed and then disturbed, in turn until the time is over.

    Args:
      folder: where all is written to.
      names: the targets.
      most: faults of one round.
      small: whether ``folder`` is on a disk that may be filled.
    """
    tally, chance = Tally(), random.Random(seed)
    with servers.service(unreliable) as server:
        made = {
            "pipeline": lambda: pipeline(folder),
            "ppo": lambda: ppo(folder, server.url),
            "two": lambda: ppo(folder, processes=2),
        }
        targets, wanted, whole = [made[name]() for name in names], {}, {}
        for target in targets:
            out = folder / f"{target.name}_whole"
            # Twice: the first compiles.
            for _ in range(2):
                shutil.rmtree(out, ignore_errors=True)
                began = time.monotonic()
                wait(target.launch(out), tally, target.name)
                whole[target.name] = time.monotonic() - began
            assert is_done(out), Path(f"{out}.log").read_text(encoding="utf-8")[-2000:]
            wanted[target.name] = contents(out)
        until, rounds = time.monotonic() + seconds, 0
        while rounds == 0 or time.monotonic() < until:
            target = targets[rounds % len(targets)]
            rounds += 1
            out = folder / f"{target.name}_{rounds}"
            disturbed(target, out, chance, whole[target.name], small, tally, most)
            compare(wanted[target.name], contents(out), tally, f"{target.name}, round {rounds}")
            tally["rounds"] += 1
            print(f"round {rounds}, {target.name}: {dict(tally)}", flush=True)
            if not tally.wrong:
                shutil.rmtree(out)
                Path(f"{out}.log").unlink()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=["pipeline", "ppo", "two"])
    parser.add_argument("--most", type=int, default=8, help="faults of one round")
    parser.add_argument("--mounted", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    # In a mount namespace of its own, which ends with it, a small disk is nobody else's.
    if not given.mounted:
        mount = ["unshare", "--mount", "--map-root-user"]
        if shutil.which("unshare") and not subprocess.run([*mount, "true"], check=False).returncode:
            os.execvp("unshare", [*mount, sys.executable, *sys.argv, "--mounted"])
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    options = ["-t", "tmpfs", "-o", f"size={DISK}m", "none", str(folder)]
    small = given.mounted and not subprocess.run(["mount", *options], check=False).returncode
    names = given.target or ["pipeline", "ppo", "two"]
    try:
        tally = soak(folder, given.seconds, given.seed, names, given.most, small)
    finally:
        if small:
            subprocess.run(["umount", "-l", str(folder)], check=False)
    print(f"small disk: {small}; {dict(tally)}; wrong: {len(tally.wrong)}")
    print("\n".join(tally.wrong))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
