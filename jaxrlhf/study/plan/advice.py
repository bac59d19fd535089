"""What to change so that a run fits, and which layouts of it are fast: found by compiling them."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, get_args

from jaxrlhf.config import Config, check, check_mesh, rows_at_once
from jaxrlhf.config.model import Remat
from jaxrlhf.core.errors import InputError
from jaxrlhf.models.load import build
from jaxrlhf.run.setup import outline
from jaxrlhf.study.plan.compiling import plan, with_stand_ins
from jaxrlhf.study.plan.devices import mesh_of
from jaxrlhf.study.plan.memory import decode_copy, resident
from jaxrlhf.study.plan.planned import Plan
from jaxrlhf.study.plan.topology import Topology

TRIES = 12
"""Most candidates that are compiled."""


class Candidate(NamedTuple):
    """A config that could be run instead, and its plan."""

    config: Config
    flags: str
    """What to add to the command line."""
    plan: Plan


def advise(
    config: Config, topology: Topology, found: Plan, mean_length: float | None = None
) -> Candidate | None:
    """The smallest change tried that makes a run fit, compiled to make sure; None if none does.

    Tried in turn: remat, more microbatches, then the same on meshes that split the weights or the
    rows' tokens further.
    """
    large = tuple(step.name for step in found.too_large)
    for other in _worth_compiling(_ladder(config, found), topology, found):
        first = plan(other, topology, mean_length, found.memory, names=large)
        if not first.fits:
            continue
        whole = plan(other, topology, mean_length, found.memory)
        if whole.fits:
            return Candidate(other, flags(config, other), whole)
    return None


def search(
    config: Config, topology: Topology, found: Plan, mean_length: float | None = None
) -> list[Candidate]:
    """Meshes and microbatches that fit, the fastest by the roofline first.

    All that divide are thought of; the ``TRIES`` with the fewest pieces along tensor, then with
    the fewest microbatches, whose weights can fit at all, are compiled.
    """
    fits = []
    for other in _worth_compiling(_layouts(config, found), topology, found):
        whole = plan(other, topology, mean_length, found.memory)
        if whole.fits:
            fits.append(Candidate(other, flags(config, other), whole))
    return sorted(fits, key=lambda candidate: candidate.plan.time)


def _worth_compiling(
    configs: Iterator[Config], topology: Topology, found: Plan
) -> Iterator[Config]:
    """The first ``TRIES`` of those that can be laid out, and whose weights alone fit."""
    possible = (x for x in configs if _divides(x, found.devices))
    light = (x for x in possible if _held(x, topology) <= found.memory)
    return itertools.islice(light, TRIES)


def flags(old: Config, new: Config) -> str:
    """The command-line words that turn ``old`` into ``new``."""
    words = []
    for section in ("model", "optim", "mesh"):
        before, after = getattr(old, section), getattr(new, section)
        for field in dataclasses.fields(before):
            value = getattr(after, field.name)
            if value == getattr(before, field.name):
                continue
            name = f"{section}.{field.name}".replace("_", "-")
            words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words)


def _ladder(config: Config, found: Plan) -> Iterator[Config]:
    """Configs that need less memory, each a little further from ``config``."""
    rungs = [x for x in _pieces(config) if _divides(x, found.devices)]
    updates = all("update" in step.name or step.name == "warmup" for step in found.too_large)
    if updates:
        yield from rungs[1:]
    for fsdp, context, tensor in _further(found):
        meshes = [_on_mesh(x, found.devices, fsdp, context, tensor) for x in _pieces(config)]
        there = [x for x in meshes if _divides(x, found.devices)]
        yield from [*there[:1], *there[1:][-1:]] if updates else there[:1]


def _further(found: Plan) -> Iterator[tuple[int, int, int]]:
    """fsdp, context and tensor of meshes that split more than the plan's; least tensor first.

    Of context, which splits weights as fsdp does and a row's tokens besides, no more than four
    times the plan's.
    """
    now = tuple(found.mesh[axis] for axis in ("fsdp", "context", "tensor"))
    for tensor in _powers(now[2], found.devices):
        for context in itertools.takewhile(
            lambda size: size <= 4 * now[1], _powers(now[1], found.devices // tensor)
        ):
            least = max(now[0] * now[1] // context, 1)
            for fsdp in _powers(least, found.devices // (tensor * context)):
                if (fsdp, context, tensor) != now:
                    yield fsdp, context, tensor


def _pieces(config: Config) -> Iterator[Config]:
    """The config, with stronger remat, and with ever more microbatches."""
    yield config
    policies = get_args(Remat)
    for remat in policies[policies.index(config.model.remat) + 1 :]:
        yield replace(config, model=replace(config.model, remat=remat))
    with_remat = replace(config, model=replace(config.model, remat=policies[-1]))
    rows = rows_at_once(config)
    for factor in _powers(2, rows):
        count = config.optim.microbatches * factor
        yield replace(with_remat, optim=replace(config.optim, microbatches=count))


def _layouts(config: Config, found: Plan) -> Iterator[Config]:
    """Every mesh with the plan's context, and some numbers of microbatches; least tensor first."""
    context = found.mesh["context"]
    for tensor in _powers(1, found.devices // context):
        for pieces in (1, 2, 4, 8):
            rung = replace(config, optim=replace(config.optim, microbatches=pieces))
            for fsdp in reversed(list(_powers(1, found.devices // context // tensor))):
                yield _on_mesh(rung, found.devices, fsdp, context, tensor)


def _on_mesh(config: Config, devices: int, fsdp: int, context: int, tensor: int) -> Config:
    """The config on another mesh."""
    data = devices // (fsdp * context * tensor)
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    return replace(config, mesh=replace(config.mesh, **sizes))


def _divides(config: Config, devices: int) -> bool:
    """Whether the config is one that ``setup`` accepts."""
    try:
        check(config)
        check_mesh(config.mesh, build(config.model).decoder, devices, rows_at_once(config))
    except InputError:
        return False
    return True


def _powers(start: int, end: int) -> Iterator[int]:
    """``start`` times 1, 2, 4, … as long as it divides ``end``."""
    while start <= end and end % start == 0:
        yield start
        start *= 2


def _held(config: Config, topology: Topology) -> float:
    """Bytes a device that it must have: for all networks, and for the copy that is sampled with."""
    config, _ = with_stand_ins(config)
    run = outline(config, mesh_of(config.mesh, topology))
    return resident(run) + ("sample" in run.programs) * decode_copy(run, run.model)
