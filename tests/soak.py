"""Tiny runs under random faults, over and over; each must end as the run that nothing disturbed.

    make soak     (python tests/soak.py --help lists what can be chosen)
    make kills    two hundred kills alone, of every algorithm, the pipeline, one process and two

A target is first carried out undisturbed. Then it is carried out anew while faults strike its
process, most of them after the launch has saved a step: SIGKILL at any instant, or just before a
change to a file of checkpoints, SIGSTOP for some seconds, SIGTERM, Ctrl-C, a full disk, a clock
that jumps; between two launches a bit flips in its newest checkpoint. Rewards come from a service
that fails every third request once. Of two processes one is struck, and the other has to end by
itself. After each launch it is seen that no step on disk and no line of metrics before it was lost,
and that the run went on from the newest. In the end arrays (by their digests), host's numbers,
metrics, samples and pairs are compared with the undisturbed ones, bit for bit but for the clock.
Status 1 if anything differs, a launch hangs, prints a traceback, or begins again in silence.

The disk is a small tmpfs where the process may mount one, else a limit on the size of files.
"""

import argparse
import collections
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import servers
from targets import (
    ALGORITHMS,
    Target,
    Unreliable,
    contents,
    is_done,
    last_line,
    on_disk,
    pipeline,
    run,
)

LONG, PATIENCE = 600, 60
"""Seconds after which a launch counts as hung, and which the end may take after a signal."""

DISK = 48
"""MiB of the disk."""

FAULTS = {
    "kill": 5, "kill at a save": 3, "stop": 2, "term": 3, "interrupt": 1, "disk": 3, "clock": 1,
    "flip": 3,
}  # fmt: skip
"""What strikes, and how often among the others."""

KILLS = {"kill": 3, "kill at a save": 1}
AIMED = {"kill": 1, "kill at a save": 1}

TARGETS = (*ALGORITHMS, "pipeline", "ppo2", "sft2")
"""What is carried out: on two processes, if its name ends in 2."""

MIXED = ("pipeline", "ppo", "reward_model", "ppo2")
"""Of them, those that the faults other than kills are tried on."""

MOST_CHANGES = 80
"""Changes to files of checkpoints among which is the one that a kill comes before."""


class Tally(collections.Counter):
    """What has happened, and what should not have."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.slowest = 0.0

    def complain(self, what: str) -> None:
        self.wrong.append(what)
        print(f"WRONG: {what}", flush=True)


@dataclass(frozen=True)
class Before:
    """What there was when a launch began.

    Attributes:
      steps: on disk, of every run by its name.
      going: those that had begun and were not done.
      said: bytes of the log.
      flipped: the run whose newest step is damaged; "" for none.
    """

    steps: dict[str, list[int]]
    going: list[str]
    said: int
    flipped: str = ""


@dataclass
class Soak:
    """What is the same for all rounds.

    Attributes:
      faults: what strikes, and how often among the others.
      small: whether the folder is on a disk that may be filled.
    """

    chance: random.Random
    faults: Mapping[str, int]
    small: bool = False
    tally: Tally = field(default_factory=Tally)


# Faults


def fill(out: Path, until: float) -> None:
    """No room on the disk until then."""
    ballast = out.parent / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    time.sleep(max(0.0, until - time.monotonic()))
    ballast.unlink(missing_ok=True)


def limit(process: Any, until: float) -> None:
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
    going = [x for x in steps if not is_done(out / x) and len(steps[x]) > 1]
    if not going:
        return ""
    name = chance.choice(going)
    folder = out / name / "checkpoints" / str(steps[name][-1])
    path = chance.choice(sorted(x for x in folder.rglob("*") if x.is_file() and x.stat().st_size))
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)
    return name


def strike(fault: str, struck: Any, out: Path, small: bool, seconds: float) -> None:
    """Do to a process what the fault is; it may have ended."""
    if fault == "disk" and small:
        return fill(out, time.monotonic() + seconds)
    if fault == "disk":
        return limit(struck, time.monotonic() + seconds)
    kinds = {
        "kill": signal.SIGKILL,
        "term": signal.SIGTERM,
        "interrupt": signal.SIGINT,
        "stop": signal.SIGSTOP,
    }
    with suppress(ProcessLookupError):
        os.kill(struck.pid, kinds[fault])
        if fault == "stop":
            time.sleep(seconds)
            os.kill(struck.pid, signal.SIGCONT)


def newest(steps: dict[str, list[int]]) -> dict[str, int]:
    return {name: found[-1] for name, found in steps.items()}


def await_step(started: Sequence[Any], out: Path, before: Before) -> None:
    """Wait until a launch has a step on disk that was not there, or has ended."""
    until = time.monotonic() + LONG
    while all(x.exitcode is None for x in started) and time.monotonic() < until:
        with suppress(OSError):  # a folder that is going away
            if newest(on_disk(out)) != newest(before.steps):
                return
        time.sleep(0.005)


# A round


def look(out: Path, flipped: str) -> Before:
    steps, log = on_disk(out), Path(f"{out}.log")
    said = log.stat().st_size if log.exists() else 0
    return Before(steps, [x for x in steps if not is_done(out / x)], said, flipped)


def wait(started: Sequence[Any], tally: Tally, what: str) -> None:
    """Wait for the end of all; those that hang are killed and complained of."""
    began = time.monotonic()
    for index, process in enumerate(started):
        process.join(max(0.1, began + LONG - time.monotonic()))
        if process.exitcode is None:
            tally.complain(f"{what}: process {index} hangs")
            process.kill()
            process.join()


def launch(target: Target, out: Path, fault: str, before: Before, soak: Soak) -> tuple[str, bool]:
    """Carry a target on until it ends, by itself or by a fault.

    Returns:
      What has struck, and whether the target says that all is done.
    """
    chance = soak.chance
    variables = {
        "clock": {"CLOCK": str(chance.randrange(2**31))},
        "kill at a save": {"KILL": str(chance.randint(1, MOST_CHANGES))},
    }
    started = target.launch(out, **variables.get(fault, {}))
    struck = chance.choice(started)
    if fault in ("kill", "stop", "term", "interrupt", "disk"):
        # Now and then before it has got anywhere, else with something to lose.
        if chance.random() < 0.8:
            await_step(started, out, before)
        time.sleep(chance.uniform(0.0, 0.6))
        if struck.exitcode is None:
            strike(fault, struck, out, soak.small, chance.uniform(0.5, 3))
        else:
            fault = ""
    if fault in ("kill", "term", "interrupt"):
        # Its own end alone: one that has not joined the others yet is waited for, for 300 s.
        began = time.monotonic()
        struck.join(LONG)
        took = time.monotonic() - began
        soak.tally.slowest = max(soak.tally.slowest, took)
        if took > PATIENCE:
            soak.tally.complain(f"{target.name}: {took:.0f} s from {fault} to the end")
    wait(started, soak.tally, f"{target.name} after {fault or 'nothing'}")
    if fault == "kill at a save" and all(x.exitcode != -signal.SIGKILL for x in started):
        fault = ""
    return fault, is_done(out) and not any(x.exitcode for x in started)


def disturbed(target: Target, out: Path, soak: Soak, plan: Sequence[str]) -> None:
    """Carry a target out, by a launch for each fault, and then undisturbed."""
    tally, done, faults = soak.tally, False, iter(plan)
    while not done:
        planned = next(faults, "")
        before = look(out, flip(out, soak.chance) if planned == "flip" else "")
        fault, done = launch(target, out, planned, before, soak)
        fault = "" if fault == "flip" and not before.flipped else fault
        tally["launches"] += 1
        if fault:
            tally[fault] += 1
        told = Path(f"{out}.log").read_bytes()[before.said :].decode(errors="replace")
        check(out, told, before, fault, tally, f"{target.name}, {fault or 'undisturbed'}")
        if not planned and not done:
            tally.complain(f"{target.name}: undisturbed, and not done: {told[-500:]}")
            return


RESUMED = "resumed after iteration "


def check(out: Path, told: str, before: Before, fault: str, tally: Tally, what: str) -> None:
    """See that a launch went on from what was on disk, lost none, and gave no traceback.

    Args:
      told: what it has said.
    """
    if "Traceback" in told:
        tally["tracebacks"] += 1
        tally.complain(f"{what}: a traceback: {told[told.index('Traceback') :][:3000]}")
    resumed = [int(x.split()[0]) for x in told.split(RESUMED)[1:]]
    tally["resumed"] += len(resumed)
    after = on_disk(out)
    for name, steps in before.steps.items():
        had = f"{what}: {name} had step {steps[-1]} on disk"
        # Of a damaged step nothing is promised but that the one before is taken.
        good = steps[-2:] if name == before.flipped else steps[-1:]
        kept = after.get(name, [-1])[-1]
        if kept < good[0]:
            tally["lost"] += 1
            tally.complain(f"{had}, and has {kept}")
        if name in before.going and resumed and resumed[0] not in good:
            tally["lost"] += 1
            tally.complain(f"{had}, and went on from {resumed[0]}")
        if kept > steps[-1] and not resumed:
            tally["silent restarts"] += 1
            tally.complain(f"{had}, and begins again: {told[:1000]}")
    for name, steps in after.items():
        # With a full disk, lines wait in memory.
        if fault != "disk" and last_line(out / name) < steps[-1]:
            tally["lost"] += 1
            tally.complain(f"{what}: {name} has step {steps[-1]} on disk, and not its metrics")


def compare(wanted: dict, found: dict, tally: Tally, what: str) -> None:
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            tally.complain(f"{what}: {name} differs")


def undisturbed(target: Target, folder: Path, tally: Tally) -> dict[str, object]:
    """What a target comes to that nothing disturbs."""
    out = folder / f"{target.name}_whole"
    wait(target.launch(out), tally, target.name)
    told = Path(f"{out}.log").read_text(encoding="utf-8")
    assert is_done(out), told[-2000:]
    return contents(out)


def carry_on(
    folder: Path, soak: Soak, targets: Sequence[Target], most: int, seconds: float, strikes: int = 0
) -> Tally:
    """Carry targets out, undisturbed and then disturbed, in turn.

    Args:
      folder: where all is written to.
      most: faults of one round.
      seconds: after which no round begins; one a target does in any case.
      strikes: or, if more than 0, as many of them.
    """
    tally = soak.tally
    wanted: dict[str, dict] = {}
    until, rounds = time.monotonic() + seconds, 0
    while rounds < len(targets) or (
        sum(tally[x] for x in soak.faults) < strikes if strikes else time.monotonic() < until
    ):
        target = targets[rounds % len(targets)]
        rounds += 1
        if target.name not in wanted:
            wanted[target.name] = undisturbed(target, folder, tally)
        out = folder / f"{target.name}_{rounds}"
        kinds, weights = list(soak.faults), list(soak.faults.values())
        disturbed(target, out, soak, soak.chance.choices(kinds, weights, k=most))
        compare(wanted[target.name], contents(out), tally, f"{target.name}, round {rounds}")
        tally["rounds"] += 1
        print(f"round {rounds}, {target.name}: {told_of(tally)}", flush=True)
        if not tally.wrong:
            shutil.rmtree(out)
            Path(f"{out}.log").unlink()
    return tally


def told_of(tally: Tally) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in sorted(tally.items()))
    return f"{counts}; slowest end {tally.slowest:.1f} s; wrong {len(tally.wrong)}"


def targets_of(names: Sequence[str], folder: Path, steps: int, url: str) -> list[Target]:
    """Targets by their names, as in TARGETS; the service gives PPO's rewards on one process."""
    made = []
    for name in names:
        single = name.removesuffix("2")
        asked = url if name == "ppo" else ""
        made.append(
            pipeline(folder)
            if name == "pipeline"
            else run(single, folder, steps, asked, processes=1 + (single != name))
        )
    return made


def mounted(small: bool) -> tuple[Path, bool]:
    """A folder of one's own, and whether it is on a small disk."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    options = ["-t", "tmpfs", "-o", f"size={DISK}m", "none", str(folder)]
    return folder, small and not subprocess.run(["mount", *options], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--steps", type=int, default=120, help="of a run")
    parser.add_argument("--most", type=int, default=12, help="faults of one round")
    parser.add_argument("--kills", type=int, default=0, help="so many kills, and nothing else")
    parser.add_argument("--aimed", action="store_true", help="half of the kills at saves")
    parser.add_argument("--mounted", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    # In a mount namespace of its own, which ends with it, a small disk is nobody else's.
    if not given.mounted and not given.kills:
        mount = ["unshare", "--mount", "--map-root-user"]
        if shutil.which("unshare") and not subprocess.run([*mount, "true"], check=False).returncode:
            os.execvp("unshare", [*mount, sys.executable, *sys.argv, "--mounted"])
    folder, small = mounted(given.mounted)
    # Kills may cut what is written there too.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}-compiled")
    names = given.target or (TARGETS if given.kills else MIXED)
    unreliable = Unreliable(given.seed)
    kills = AIMED if given.aimed else KILLS
    soak = Soak(random.Random(given.seed), kills if given.kills else FAULTS, small)
    try:
        with servers.service(unreliable) as server:
            targets = targets_of(names, folder, given.steps, server.url)
            tally = carry_on(folder, soak, targets, given.most, given.seconds, given.kills)
    finally:
        if small:
            subprocess.run(["umount", "-l", str(folder)], check=False)
        shutil.rmtree(f"{folder}-compiled", ignore_errors=True)
    answers = ", ".join(f"{kind} {count}" for kind, count in unreliable.bad.items())
    print(f"small disk: {small}; the service answered: {answers}")
    print(f"seed {given.seed}: {told_of(tally)}")
    print("\n".join(tally.wrong))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
