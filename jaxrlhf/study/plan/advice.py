"""What ``jaxrlhf plan`` says: the plan as tables, whether it fits, and what to change if not.

What to change, and which layouts are fast, is found by compiling them.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, get_args

from jaxrlhf.config import AXES, Config, check, check_mesh, is_on_policy, rows_at_once
from jaxrlhf.config.model import Remat
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.chips import CHIPS, GIB
from jaxrlhf.models.load import build
from jaxrlhf.study.plan.calls import decode_copy, resident
from jaxrlhf.study.plan.compiled import (
    KINDS,
    Plan,
    Step,
    as_json,
    outlines,
    plan,
    with_stand_ins,
)
from jaxrlhf.study.plan.topology import Topology

TRIES = 12
"""Most candidates that are compiled."""

TITLES = {"weights_copy": "weights copy", "kv_cache": "KV cache"}


class Candidate(NamedTuple):
    """A config that could be run instead, and its plan."""

    config: Config
    flags: str
    """What to add to the command line."""
    plan: Plan


def run(
    config: Config,
    topology: Topology,
    mean_length: float | None = None,
    memory_gib: float | None = None,
    rank: bool = False,
    as_text: bool = True,
    explain: str = "",
) -> None:
    """Print a run's plan; with ``rank`` also other layouts; as JSON without ``as_text``.

    Args:
      explain: name of a step whose heaviest instructions are shown; no other is compiled.

    Raises:
      InputError: the run does not fit; the message says what to change.
    """
    memory = None if memory_gib is None else memory_gib * GIB
    names = (explain,) if explain else ()
    tell = partial(print, file=sys.stderr)
    found = plan(config, topology, mean_length, memory, names, tell)
    if explain:
        text = f"{table(found)}\n\n{explained(found.steps[0])}"
        print(text if as_text else json.dumps(as_json(found)))
        return
    # at once: what follows compiles for minutes more
    if as_text:
        print(table(found))
    ranked = search(config, topology, found, mean_length) if rank else []
    change = None if found.fits or rank else advise(config, topology, found, mean_length)
    if not as_text:
        whole = as_json(found)
        whole["search"] = [{"flags": x.flags, **as_json(x.plan)} for x in ranked]
        whole["advice"] = change and {"flags": change.flags, **as_json(change.plan)}
        print(json.dumps(whole))
    elif rank:
        print(f"\nlayouts that fit, of those tried\n{ranking(ranked)}")
    if not found.fits:
        raise InputError(verdict(found) + ("" if rank else f"; {advice(change)}"))


def table(plan: Plan) -> str:
    """Everything a plan says, in lines of text."""
    kinds = [kind for kind in KINDS if any(step.bytes.get(kind) for step in plan.steps)]
    memory = [["step", *(TITLES.get(kind, kind) for kind in kinds), "in all"]]
    work = [["step", "calls", "GFLOP", "compute ms", "memory ms", "links ms", "bound", "share"]]
    sent = sorted({kind for step in plan.steps for kind in step.collectives})
    exchanges = [["step", *sent]] if sent else [["none"]]
    through = [["step", "moved", "needed", "moved / needed"]]
    for step in plan.steps:
        cells = [f"{step.bytes.get(kind, 0.0) / GIB:.3f}" for kind in kinds]
        too_large = "!" * (step in plan.too_large)
        memory.append([step.name, *cells, f"{step.peak / GIB:.3f}{too_large}"])
        times = [f"{1e3 * step.seconds[name]:.3g}" for name in ("compute", "memory", "links")]
        bound = max(step.seconds, key=lambda name: step.seconds[name])
        cells = [f"{step.flops / 1e9:.4g}", *times, bound, f"{plan.share(step):.1%}"]
        work.append([step.name, str(step.calls), *cells])
        through += _through(step)
        if sent:
            pairs = [step.collectives.get(kind, (0, 0.0)) for kind in sent]
            cells = [f"{size / 1e6:.4g} in {count}" if count else "-" for count, size in pairs]
            exchanges.append([step.name, *cells])
    axes = " · ".join(f"{name} {size}" for name, size in plan.mesh.items())
    chip = CHIPS[plan.chip]
    lines = [
        f"{plan.topology}: {plan.devices} x {plan.chip}, mesh {axes}",
        f"a device: {plan.memory / GIB:.2f} GiB, {chip.flops / 1e12:g} TFLOP/s, "
        f"{chip.bandwidth / 1e9:g} GB/s memory, {chip.link / 1e9:g} GB/s links ({chip.source})",
        *("", "GiB on a device while a step runs", *columns(memory)),
        *("", "a call on a device, at least", *columns(work)),
        *("", "GiB through a device's memory", *columns(through)),
        *("", "exchanges of a call, MB that each device sends", *columns(exchanges), ""),
        *(f"note: {remark}" for remark in plan.remarks),
    ]
    return "\n".join([*lines, verdict(plan)])


def _through(step: Step) -> list[list[str]]:
    """Rows of what a step moves, and one trip of its decode loop."""
    found = {step.name: (step.moved, step.needed), f"{step.name}: a token": step.token}
    return [
        [name, f"{moved / GIB:.4g}", f"{least / GIB:.4g}", f"{moved / least:.2f}"]
        for name, (moved, least) in found.items()
        if moved and least
    ]


def explained(step: Step) -> str:
    """The instructions of a step that move most, a line each."""
    rows = [["instruction", "GiB a call", "share", "source"]]
    for what, source, size, share in step.heaviest:
        rows.append([what, f"{size / GIB:.4g}", f"{share:.1%}", source or "-"])
    return "\n".join([f"{step.name}: what moves most", *columns(rows)])


def verdict(plan: Plan) -> str:
    """Whether it fits, in a line."""
    if plan.fits:
        spare = (plan.memory - plan.peak) / GIB
        return (
            f"fits: {plan.peak / GIB:.2f} GiB of {plan.memory / GIB:.2f}, {spare:.2f} to spare; "
            f"an iteration takes {plan.time:.3g} s at least"
        )
    needs = [
        f"{step.name} needs {step.peak / GIB:.2f} GiB or more, and its compiler ran out of memory"
        if step.at_least
        else f"{step.name} needs {step.peak / GIB:.2f} GiB, "
        f"{(step.peak - plan.memory) / GIB:.2f} more"
        for step in plan.too_large
    ]
    return f"does not fit {plan.memory / GIB:.2f} GiB: {'; '.join(needs)}"


def advice(found: Candidate | None) -> str:
    """What to change, in a line."""
    if found is None:
        return (
            "no mesh and number of microbatches tried makes it fit: take more devices, or LoRA, "
            "optim.state_dtype: bfloat16, reference.offload"
        )
    peak, memory = found.plan.peak / GIB, found.plan.memory / GIB
    return f"fits with {found.flags}: {peak:.2f} GiB of {memory:.2f}, compiled"


def ranking(found: Sequence[Candidate]) -> str:
    """Layouts that fit, a line each."""
    if not found:
        return "no layout that was tried fits"
    rows = [["rank", *AXES, "microbatches", "GiB", "seconds", "sent, GB"]]
    for rank, (config, _, made) in enumerate(found, 1):
        sizes = (rank, *(made.mesh[name] for name in AXES), config.optim.microbatches)
        sent = sum(step.calls * step.sent for step in made.steps) / 1e9
        cells = f"{made.peak / GIB:.2f}", f"{made.time:.3g}", f"{sent:.2f}"
        rows.append([*map(str, sizes), *cells])
    return "\n".join(columns(rows))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def advise(
    config: Config, topology: Topology, found: Plan, mean_length: float | None = None
) -> Candidate | None:
    """The smallest change tried that makes a run fit, compiled to make sure; None if none does.

    Tried in turn: remat, more microbatches, then the same on meshes that split the weights or the
    rows' tokens further.
    """
    large = tuple(step.name for step in found.too_large)
    rungs = _ladder(config, found)
    return next(_fitting(config, topology, found, mean_length, rungs, large), None)


def search(
    config: Config, topology: Topology, found: Plan, mean_length: float | None = None
) -> list[Candidate]:
    """Meshes and microbatches that fit, the fastest by the roofline first.

    All that divide are thought of; the ``TRIES`` with the fewest pieces along tensor, then with
    the fewest microbatches, whose weights can fit at all, are compiled.
    """
    fits = _fitting(config, topology, found, mean_length, _layouts(config, found))
    return sorted(fits, key=lambda candidate: candidate.plan.time)


def _fitting(
    config: Config,
    topology: Topology,
    found: Plan,
    mean_length: float | None,
    others: Iterator[Config],
    first: tuple[str, ...] = (),
) -> Iterator[Candidate]:
    """Of the first ``TRIES`` that can be laid out and whose weights alone fit, those that fit."""
    possible = (x for x in others if _divides(x, found.devices))
    light = (x for x in possible if _held(x, topology) <= found.memory)
    for other in itertools.islice(light, TRIES):
        compiled = partial(plan, other, topology, mean_length, found.memory)
        # the steps that were too large: most candidates fail there, in a part of the time
        if first and not compiled(names=first).fits:
            continue
        whole = compiled()
        if whole.fits:
            yield Candidate(other, flags(config, other), whole)


def flags(old: Config, new: Config) -> str:
    """The command-line words that turn ``old`` into ``new``."""
    words = []
    for section in ("model", "optim", "mesh"):
        before, after = getattr(old, section), getattr(new, section)
        for field in dataclasses.fields(before):
            value = getattr(after, field.name)
            if value != getattr(before, field.name):
                name = f"--{section}.{field.name}".replace("_", "-")
                words.append(name if value is True else f"{name} {value}")
    return " ".join(words)


def _divides(config: Config, devices: int) -> bool:
    """Whether the config is one that ``setup`` accepts."""
    try:
        check(config)
        given = rows_at_once(config), config.sample.slots
        check_mesh(config.mesh, build(config.model).decoder, devices, *given)
    except InputError:
        return False
    return True


def _held(config: Config, topology: Topology) -> float:
    """Bytes a device that it must have: for all networks, and for the copy that is sampled with."""
    config, _ = with_stand_ins(config)
    _, run = outlines(config, topology)
    return resident(run) + is_on_policy(run.config) * decode_copy(run)


def _ladder(config: Config, found: Plan) -> Iterator[Config]:
    """Configs that need less memory, each a little further from ``config``."""
    # remat and microbatches help an update alone
    updates = all("update" in step.name or step.name == "warmup" for step in found.too_large)
    if updates:
        yield from [x for x in _pieces(config) if _divides(x, found.devices)][1:]
    for sizes in _further(found):
        devices = found.devices // found.mesh["expert"]
        meshes = [_on_mesh(x, devices, *sizes) for x in _pieces(config)]
        there = [x for x in meshes if _divides(x, found.devices)]
        # of each mesh the fastest and the smallest: TRIES must reach the next ones
        yield from [*there[:1], *there[1:][-1:]] if updates else there[:1]


def _further(found: Plan) -> Iterator[tuple[int, int, int]]:
    """fsdp, context and tensor of meshes that split more than the plan's; least tensor first.

    Of context, which splits weights as fsdp does and a row's tokens besides, no more than four
    times the plan's.
    """
    now = tuple(found.mesh[axis] for axis in ("fsdp", "context", "tensor"))
    devices = found.devices // found.mesh["expert"]
    for tensor in _powers(now[2], devices):
        for context in _powers(now[1], devices // tensor):
            if context > 4 * now[1]:
                break
            # weights are split over fsdp·context: together not less than now
            least = max(now[0] * now[1] // context, 1)
            for fsdp in _powers(least, devices // (tensor * context)):
                if (fsdp, context, tensor) != now:
                    yield fsdp, context, tensor


def _pieces(config: Config) -> Iterator[Config]:
    """The config, with stronger remat, and with ever more microbatches."""
    yield config
    policies = get_args(Remat)
    for remat in policies[policies.index(config.model.remat) + 1 :]:
        config = replace(config, model=replace(config.model, remat=remat))
        yield config
    for factor in _powers(2, rows_at_once(config)):
        count = config.optim.microbatches * factor
        yield replace(config, optim=replace(config.optim, microbatches=count))


def _layouts(config: Config, found: Plan) -> Iterator[Config]:
    """Every mesh with the plan's context, and some numbers of microbatches; least tensor first."""
    context, expert = found.mesh["context"], found.mesh["expert"]
    devices = found.devices // expert
    config = replace(config, mesh=replace(config.mesh, expert=expert))
    for tensor in _powers(1, devices // context):
        for pieces in (1, 2, 4, 8):
            rung = replace(config, optim=replace(config.optim, microbatches=pieces))
            for fsdp in reversed(list(_powers(1, devices // context // tensor))):
                yield _on_mesh(rung, devices, fsdp, context, tensor)


def _on_mesh(config: Config, devices: int, fsdp: int, context: int, tensor: int) -> Config:
    """``devices`` of each piece of the expert axis, which stays as it is."""
    data = devices // (fsdp * context * tensor)
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    return replace(config, mesh=replace(config.mesh, **sizes))


def _powers(start: int, end: int) -> Iterator[int]:
    """``start`` times 1, 2, 4, … as long as it divides ``end``."""
    while start <= end and end % start == 0:
        yield start
        start *= 2
