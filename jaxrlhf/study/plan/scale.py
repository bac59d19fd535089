"""docs/scale.md: the plans of real sizes, and how an iteration scales, written by a command.

    python -m jaxrlhf.study.plan.scale PLANS > docs/scale.md

``PLANS`` is a folder of plans, one JSON file each, as ``jaxrlhf plan --json`` prints them. A plan
that is not there is made, which takes minutes; with ``--cached`` the document says that it is
missing.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxrlhf.config import load
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.chips import GIB
from jaxrlhf.study.plan.advice import columns, table
from jaxrlhf.study.plan.compiled import Plan, from_json
from jaxrlhf.study.plan.topology import parse

CONFIGS = Path("configs/scale")

WEAK = (
    CONFIGS / "llama31_70b_grpo_v5p512.yaml",
    ("v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x4", "v5p:8x8x8"),
)
"""A config, and the slices that it is planned for with the same rows a chip."""

INTRO = """# Real sizes: what their plans say

Nothing here has been run on the hardware. These are compiled plans, which
[planning.md](planning.md) says how to read, and this file is what

    python -m jaxrlhf.study.plan.scale PLANS > docs/scale.md

writes: it plans every config of `configs/scale/` that has no plan in the folder PLANS yet. Times
are a roofline's: lower bounds, to compare layouts with. Plans for H100 and H200 whose
notes say so are compiled by the CPU compiler: their arguments are exact, the rest is a stand-in."""

SCALING = """## Weak scaling: {title}

The same config with the same rows a chip on ever larger slices: `mesh.fsdp` grows with the chips,
and `data.batch_size` with it. Each row is a plan of its own, all layers in it, compiled for that
many chips. *overlapped* is the roofline's iteration, each step as long as the longest of its
compute, memory and exchanges; *in turn* is the sum of the three, as if nothing overlapped, and the
last column the exchanges' share of that. *efficiency* is the first slice's overlapped time over
this one's. A link is as fast on every slice here, and there is no latency in it: of a real slice
expect less."""


class Job(NamedTuple):
    """One plan of the document."""

    name: str
    """Of its file in the folder of plans."""
    config: Path
    topology: str
    prompts: int
    """Of an iteration."""
    changes: tuple[str, ...] = ()
    """Command-line words after the config."""

    @property
    def words(self) -> str:
        """The command line that prints the plan."""
        more = "".join(f" {word}" for word in self.changes)
        return f"jaxrlhf plan {self.config} --topology {self.topology}{more}"


def job_of(config: Path) -> Job:
    """The plan that a config's header asks for.

    Raises:
      InputError: it names no topology.
    """
    found = re.search(r"^# Plan: .* --topology (\S+)$", config.read_text(encoding="utf-8"), re.M)
    if found is None:
        raise InputError(f"{config}: no line '# Plan: … --topology NAME' in its header: add one")
    return Job(config.stem, config, found[1], load(config).data.batch_size)


def weak_jobs(config: Path, topologies: Sequence[str]) -> list[Job]:
    """A config on other slices with as many rows a chip as on its own."""
    own = job_of(config)
    jobs = []
    for topology in topologies:
        chips = parse(topology).devices
        prompts = own.prompts * chips // parse(own.topology).devices
        changes = ("--mesh.fsdp", "-1", "--data.batch-size", str(prompts))
        other = Job(f"{config.stem}_on_{chips}", config, topology, prompts, changes)
        jobs.append(own if topology == own.topology else other)
    return jobs


def plan_of(job: Job, folder: Path, cached: bool = False) -> Plan | None:
    """A job's plan, from its file in ``folder``, or made and put there; None with ``cached``.

    A plan that does not fit is one too.

    Raises:
      InputError: the command prints no plan.
    """
    path = folder / f"{job.name}.json"
    if not path.is_file():
        if cached:
            return None
        began = time.perf_counter()
        words = ["plan", str(job.config), "--topology", job.topology, "--json", *job.changes]
        # a process of its own: a topology is chosen before jax starts
        command = [sys.executable, "-m", "jaxrlhf", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
        # the status says whether the plan fits, not whether there is one
        if not done.stdout.strip():
            raise InputError(f"{job.words}: ended with status {done.returncode} and no plan")
        print(f"{job.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout, encoding="utf-8")
    return from_json(json.loads(path.read_text(encoding="utf-8")))


def title_of(config: Path) -> str:
    """The first line of a config's header."""
    return config.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").rstrip(".")


def scaling(config: Path, plans: Sequence[tuple[Job, Plan | None]]) -> str:
    """The table of a config on ever larger slices, of those that are planned."""
    rows = [["chips", "mesh", "prompts", "GiB", "overlapped s", "efficiency", "in turn s",
             "sent GB", "exchanges"]]  # fmt: skip
    first = math.nan
    for job, plan in plans:
        if plan is None:
            rows.append([job.topology, "no plan yet", *[""] * 7])
            continue
        first = plan.time if math.isnan(first) else first
        compute, memory, links = (
            sum(s.calls * s.seconds[name] for s in plan.steps)
            for name in ("compute", "memory", "links")
        )
        # as if nothing overlapped; plan.time is as if all did
        in_turn = compute + memory + links
        rows.append([
            str(plan.devices),
            " · ".join(str(size) for size in plan.mesh.values()),
            str(job.prompts),
            f"{plan.peak / GIB:.2f}",
            f"{plan.time:.4g}",
            f"{first / plan.time:.1%}",
            f"{in_turn:.4g}",
            f"{sum(s.calls * s.sent for s in plan.steps) / 1e9:.4g}",
            f"{links / in_turn:.1%}",
        ])  # fmt: skip
    title = title_of(config).split(":")[0]
    commands = "\n".join(f"    {job.words}" for job, _ in plans)
    text = "\n".join(columns(rows))
    return f"{SCALING.format(title=title)}\n\n{commands}\n\n```\n{text}\n```"


def document(folder: Path, cached: bool = False) -> str:
    """The whole of docs/scale.md."""
    parts = [INTRO]
    for job in map(job_of, sorted(CONFIGS.glob("*.yaml"))):
        plan = plan_of(job, folder, cached)
        body = f"```\n{table(plan)}\n```" if plan else "No plan of it has been made yet."
        parts.append(f"## {title_of(job.config)}\n\n    {job.words}\n\n{body}")
    weak = [(job, plan_of(job, folder, cached)) for job in weak_jobs(*WEAK)]
    return "\n\n".join([*parts, scaling(WEAK[0], weak)]) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Print the document; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrlhf.study.plan.scale",
        description="Print docs/scale.md from the plans of configs/scale/; run it above configs/.",
    )
    parser.add_argument("plans", type=Path, help="folder of plans, NAME.json each")
    parser.add_argument("--cached", action="store_true", help="make no plan that is not there")
    given = parser.parse_args(words)
    try:
        print(document(given.plans, given.cached), end="")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
