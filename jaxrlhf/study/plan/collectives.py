"""What a compiled program sends between devices, and what must not be in one."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from jaxrlhf.study.plan.hlo import Module, Op, Shape, Visit, visits

SENT = {
    "all-gather": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "ragged-all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
    "collective-broadcast": lambda size, n: size,
}
"""Bytes that each device sends, of an operand of ``size`` bytes among n devices on a ring."""


class Collective(NamedTuple):
    """One exchange between devices, where it is carried out."""

    kind: str
    name: str
    sent: float
    """Bytes that each device sends, each time."""
    result: Shape
    """Its largest result on a device."""
    times: int
    loops: tuple[str, ...]
    """The while loops around it, outermost first."""


def collectives(module: Module, trips: int | None = None) -> list[Collective]:
    """Every exchange of a program; ``trips`` as in ``visits``."""
    found = [x for x in visits(module, trips) if x.op.opcode.removesuffix("-start") in SENT]
    return [_collective(module, visit) for visit in _once(found)]


def _once(found: list[Visit]) -> list[Visit]:
    """One visit of each exchange that a TPU carries out piece by piece beside other work.

    Every piece, a fusion called async_collective_fusion, names the whole exchange again, some of
    them in a loop inside the one that it belongs to: what they share is their channel.
    """
    pieces: dict[str, Visit] = {}
    rest = []
    fused = {_channel(x) for x in found if x.computation.startswith("async_collective_fusion")}
    for visit in found:
        channel = _channel(visit)
        if not channel or channel not in fused:
            rest.append(visit)
        elif channel not in pieces or visit.times < pieces[channel].times:
            pieces[channel] = visit
    return [*rest, *pieces.values()]


def _channel(visit: Visit) -> str:
    number = re.search(r"channel_id=(\d+)", visit.op.text)
    return number[1] if number else ""


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Kind → (how many, bytes that a device sends in all)."""
    out: dict[str, tuple[int, float]] = {}
    for one in found:
        count, sent = out.get(one.kind, (0, 0.0))
        out[one.kind] = (count + one.times, sent + one.sent * one.times)
    return out


def _collective(module: Module, visit: Visit) -> Collective:
    op = visit.op
    kind = op.opcode.removesuffix("-start")
    ops = module.computations[visit.computation]
    given = [shape for name in op.operands if name in ops for shape in ops[name].shapes]
    n = group_size(op, module.devices)
    if "all-reduce-scatter" in visit.computation:  # how TPUs write a reduce-scatter
        kind = "reduce-scatter"
    sent = SENT[kind](sum(shape.bytes for shape in given), n)
    result = max(op.shapes, key=lambda shape: shape.elements)
    return Collective(kind, op.name, sent, result, visit.times, visit.loops)


def group_size(op: Op, devices: int) -> int:
    """How many devices take part in one group of an exchange.

    Raises:
      ValueError: its groups are written in a way that is not known here.
    """
    if op.opcode.startswith("collective-permute"):
        return 2
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", op.text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", op.text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", op.text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])  # of an axis, or a part of it
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if "replica_groups={}" in op.text or "replica_groups=" not in op.text:
        return devices
    raise ValueError(f"{op.name}: replica_groups cannot be read: {op.text:.120}")


def gathered(module: Module, elements: int, trips: int | None = None) -> list[Collective]:
    """All-gathers whose result has at least so many elements on a device."""
    found = collectives(module, trips)
    return [one for one in found if one.kind == "all-gather" and one.result.elements >= elements]


def arrays_with(module: Module, dims: Iterable[int], elements: int) -> list[Op]:
    """Instructions with a result of at least so many elements that has all of these dimensions."""
    wanted = list(dims)
    return [
        op
        for ops in module.computations.values()
        for op in ops.values()
        if any(
            shape.elements >= elements and all(size in shape.dims for size in wanted)
            for shape in op.shapes
        )
    ]


def product_bytes(module: Module, trips: int | None = None) -> float:
    """Bytes of operands and results of all matrix products on one device.

    What they read and write if each passes memory once: a lower bound where products are large,
    and the whole story of decoding, which reads weights and cache for a single token.
    """
    total = 0.0
    for visit in visits(module, trips):
        if visit.op.opcode in ("dot", "convolution"):
            ops = module.computations[visit.computation]
            moved = visit.op.bytes + sum(ops[n].bytes for n in visit.op.operands if n in ops)
            total += moved * visit.times
    return total
