"""Reading a program: loops, exchanges and products in its compiled text, FLOPs in its jaxpr."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxrlhf.core.errors import InputError

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f4e2m1fn": 4,
}  # fmt: skip
"""Size of an element; tokens and the like have none."""

CALLS = ("calls", "to_apply", "called_computations", "branch_computations", "body", "condition",
         "true_computation", "false_computation")  # fmt: skip
CALLERS = ("fusion", "call", "async-start", "conditional", "custom-call")
"""Operations that carry out the computations they name once; a reduction's are not looked into."""

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


NEAR = r"T\(.*S\((?!5\))[1-9]"
"""A layout in a memory on the chip: only TPUs' layouts have tiles, and 5 is the host's memory."""


class Loops(NamedTuple):
    """Trips of the loops whose trips a program does not say: open loops."""

    outer: tuple[int, ...]
    """Of those in no other open loop, one after the other; empty: of each as many as ``inner``."""
    inner: int | None = None
    """Of each within one of those, each time."""


ABOUT = r"about_(\d+)_trips"
"""The name scope of a loop whose trips depend on numbers, and how many they are on average."""

Trips = int | tuple[int, ...] | Loops | None
"""Of open loops; a number if it is one, and several if none is within another."""


class Shape(NamedTuple):
    """One array of a result, as it lies on one device."""

    dtype: str
    dims: tuple[int, ...]
    near: bool = False
    """In a TPU's memory on the chip: reading it moves nothing to or from the device's own."""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        return self.elements * BITS.get(self.dtype, 0) // 8


class Op(NamedTuple):
    """One instruction."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of its result; several for a tuple."""
    operands: tuple[str, ...]
    text: str
    """What stands behind the operands, and for a constant its value."""
    root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


NOTHING = Op("", "", (), (), "", False)


class Module(NamedTuple):
    """A program: computations by name, each with its instructions by name."""

    computations: dict[str, dict[str, Op]]
    entry: str
    devices: int


class Visit(NamedTuple):
    """An instruction where it is carried out, and how often."""

    op: Op
    computation: str
    times: int
    loops: tuple[str, ...]
    """The while loops around it, outermost first."""


class Collective(NamedTuple):
    """One exchange between devices."""

    kind: str
    sent: float
    """Bytes that each device sends, each time."""
    visit: Visit


def parse(text: str) -> Module:
    """The text of a compiled program (``compiled.as_text()``)."""
    computations: dict[str, dict[str, Op]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        # a computation's head stands at the margin, its instructions do not
        if line and not line[0].isspace():
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif (op := _instruction(line)) is not None:
            current[op.name] = op
    # the head of the text states both; a large program's text is not searched to its end
    counts = re.findall(r"num_(?:partitions|replicas)=(\d+)", text[:100_000])
    return Module(computations, entry, math.prod(map(int, counts)))


def _instruction(line: str) -> Op | None:
    """``[ROOT] %name = shapes opcode(operands), text``; None if it is no instruction."""
    # shapes may hold spaces and parentheses, but a word with a parenthesis comes with the opcode
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
    if found is None:
        return None
    root, name, kind, opcode = found.groups()
    depth, stop = 1, found.end()
    while depth and stop < len(line):
        depth += (line[stop] == "(") - (line[stop] == ")")
        stop += 1
    inside, after = line[found.end() : stop - 1], line[stop:]
    shapes = tuple(
        Shape(dtype, tuple(map(int, re.findall(r"\d+", dims))), bool(re.search(NEAR, layout)))
        for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", kind)
        if dtype in BITS
    )
    text = inside if opcode in ("constant", "parameter") else after
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Op(name, opcode, shapes, operands, text, bool(root))


def visits(module: Module, trips: Trips = None) -> Iterator[Visit]:
    """Every instruction that the program carries out, those in loops with their trips.

    Each branch of a conditional counts.

    Args:
      trips: of the loops whose trips the program does not say, such as those that may end early.

    Raises:
      InputError: as ``stated``.
    """
    counts = stated(module, trips)

    def carried_out(name: str, times: int, loops: tuple[str, ...]) -> Iterator[Visit]:
        for op in module.computations.get(name, {}).values():
            yield Visit(op, name, times, loops)
            inside = times, loops
            if op.opcode == "while":
                known = known_trips(module, op, name)
                count = counts[op.name] if known is None else known
                inside = times * count, (*loops, op.name)
            elif op.opcode not in CALLERS:
                continue
            for callee in called(op):
                yield from carried_out(callee, *inside)

    yield from carried_out(module.entry, 1, ())


def called(op: Op) -> list[str]:
    """The computations that an instruction names."""
    names: list[str] = []
    for key, many, one in re.findall(r"(\w+)=(?:\{([^}]*)\}|%?([\w.\-]+))", op.text):
        if key in CALLS:
            names += re.findall(r"%?([\w.\-]+)", many) if many else [one]
    return names


def open_loops(module: Module) -> list[str]:
    """The while loops whose trips the program does not say, but for those within another, in the
    order of the program: of a sampler, the decode loops."""
    return [name for name, within in _open(module, module.entry) if not within]


def _open(module: Module, computation: str, within: bool = False) -> Iterator[tuple[str, bool]]:
    """(each open loop, whether it is within another)."""
    for op in module.computations.get(computation, {}).values():
        is_open = op.opcode == "while" and known_trips(module, op, computation) is None
        if is_open:
            yield op.name, within
        if op.opcode == "while" or op.opcode in CALLERS:
            for callee in called(op):
                yield from _open(module, callee, within or is_open)


def stated(module: Module, trips: Trips) -> dict[str, int]:
    """Name → trips of the open loops.

    Raises:
      InputError: there are others than ``trips`` says.
    """
    outer, inner = _loops(trips)
    found = dict.fromkeys(_open(module, module.entry))
    first = [name for name, within in found if not within]
    nested = [name for name, within in found if within]
    if not outer and inner is not None:
        outer = (inner,) * len(first)
    if first and len(first) != len(outer):
        names = ", ".join(sorted(first))
        kind = f"loop {names}: its" if len(first) == 1 else f"loops {names}: their"
        raise InputError(f"{kind} trips are not known: state as many as there are loops")
    if nested and inner is None:
        raise InputError(f"loop {nested[0]}, within another: its trips are not known: state them")
    return dict(zip(first, outer, strict=False)) | dict.fromkeys(nested, inner or 0)


def _loops(trips: Trips) -> Loops:
    if isinstance(trips, Loops):
        return trips
    return Loops((trips,) if isinstance(trips, int) else trips or ())


def known_trips(module: Module, loop: Op, computation: str) -> int | None:
    """How often a while loop runs, as XLA notes it, as its condition counts, or as it is called
    (``ABOUT``); None if open."""
    if about := re.search(ABOUT, loop.text):
        return int(about[1])
    if found := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.text):
        return int(found[1])
    # not every backend notes it: a fori_loop is while(slot < n), from 0
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    counted = _counts_to(module, condition[1]) if condition else None
    if counted is None:
        return None
    slot, end = counted
    ops = module.computations[computation]
    start = _plain(ops, loop.operands[0])
    first = _plain(ops, start.operands[slot]) if start.opcode == "tuple" else NOTHING
    return end if (first.opcode, first.text) == ("constant", "0") else None


def _counts_to(module: Module, name: str) -> tuple[int, int] | None:
    """(slot, n) of a condition that is ``slot < n`` and nothing else."""
    ops = module.computations.get(name, {})
    root, given = _root(ops), []
    # the CPU compiler fuses the comparison: its parameters are then the fusion's operands
    if root.opcode == "fusion":
        given = [_plain(ops, operand) for operand in root.operands]
        ops = module.computations[called(root)[0]]
        root = _root(ops)
    if root.opcode != "compare" or "direction=LT" not in root.text:
        return None
    sides = [_plain(ops, operand) for operand in root.operands]
    left, right = (given[int(x.text)] if given and x.opcode == "parameter" else x for x in sides)
    slot = re.search(r"index=(\d+)", left.text)
    if slot is None or right.opcode != "constant" or not right.text.isdigit():
        return None
    return int(slot[1]), int(right.text)


def _root(ops: dict[str, Op]) -> Op:
    return next((op for op in ops.values() if op.root), NOTHING)


def _plain(ops: dict[str, Op], name: str) -> Op:
    """The instruction that a value comes from, copies left out."""
    op = ops.get(name, NOTHING)
    while op.opcode in ("copy", "bitcast"):
        op = ops.get(op.operands[0], NOTHING)
    return op


def collectives(module: Module, trips: Trips = None) -> list[Collective]:
    """Every exchange of a program; ``trips`` as in ``visits``."""
    out = []
    for visit in _exchanges(module, trips):
        op, ops = visit.op, module.computations[visit.computation]
        size = sum(ops[name].bytes for name in op.operands if name in ops)
        kind = op.opcode.removesuffix("-start")
        # how TPUs write a reduce-scatter: an all-reduce in a fusion of this name
        if "all-reduce-scatter" in visit.computation:
            kind = "reduce-scatter"
        out.append(Collective(kind, SENT[kind](size, group_size(op, module.devices)), visit))
    return out


def _exchanges(module: Module, trips: Trips) -> list[Visit]:
    """One visit of each exchange, also of one that a TPU carries out in pieces beside other work.

    Every piece, a fusion called async_collective_fusion, names the whole exchange again, some of
    them in a loop inside the one that it belongs to: what they share is their channel.
    """
    found = [x for x in visits(module, trips) if x.op.opcode.removesuffix("-start") in SENT]
    numbers = [re.search(r"channel_id=(\d+)", x.op.text) for x in found]
    channels = [number[1] if number else "" for number in numbers]
    pairs = list(zip(channels, found, strict=True))
    fused = {c for c, x in pairs if c and x.computation.startswith("async_collective_fusion")}
    pieces: dict[str, Visit] = {}
    for channel, visit in pairs:
        # the piece in the fewest loops is the exchange itself
        if channel in fused:
            pieces[channel] = min(pieces.get(channel, visit), visit, key=lambda x: x.times)
    return [*(x for channel, x in pairs if channel not in fused), *pieces.values()]


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Kind → (how many, bytes that a device sends in all)."""
    out: dict[str, tuple[int, float]] = {}
    for kind, size, visit in found:
        count, sent = out.get(kind, (0, 0.0))
        out[kind] = (count + visit.times, sent + size * visit.times)
    return out


def group_size(op: Op, devices: int) -> int:
    """How many devices take part in one group of an exchange.

    Raises:
      ValueError: its groups are written in a way that is not known here.
    """
    if op.opcode.startswith("collective-permute"):
        return 2
    # {{0,2},{1,3}}: each group's devices
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", op.text):
        return len(found[1].split(","))
    # [groups,size]<=[…]: device numbers reshaped
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", op.text):
        return int(found[1])
    # mesh['a'=4,'b'=2] {'a'}: axes of a mesh, or 'a':(1)2, a part of one
    if found := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", op.text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if "replica_groups={}" in op.text or "replica_groups=" not in op.text:
        return devices
    raise ValueError(f"{op.name}: replica_groups cannot be read: {op.text:.120}")


def flops(jaxpr: ClosedJaxpr | Jaxpr, trips: Trips = None) -> float:
    """FLOPs of all matrix products of a jaxpr, over all devices.

    A product [M, K]·[K, N] is 2·M·N·K FLOPs. What a scan repeats counts once a step, the dearest
    branch of a cond counts, the body of a shard_map once a device. Elementwise work is left out.
    XLA's own count has the body of a loop only once.

    Args:
      trips: of each while loop with products: a jaxpr does not say how many there are.

    Raises:
      InputError: there is such a loop, and ``trips`` does not say it.
    """
    outer, inner = _loops(trips)
    return _flops(jaxpr, iter(outer) if outer else itertools.repeat(inner), inner)


def _flops(jaxpr: ClosedJaxpr | Jaxpr, trips: Iterator[int | None], within: int | None) -> float:
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_equation(equation, trips, within) for equation in inner.eqns)


def _equation(equation: Any, trips: Iterator[int | None], within: int | None) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # each output reads the kernel once, but only for its own feature
        kernel, out = equation.invars[1].aval, equation.outvars[0].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / features
    values = (x if isinstance(x, tuple | list) else (x,) for x in params.values())
    bodies = [x for x in itertools.chain(*values) if isinstance(x, ClosedJaxpr | Jaxpr)]
    # in a while loop every other is an inner one
    inside = itertools.repeat(within) if name == "while" else trips
    parts = [_flops(body, inside, within) for body in bodies]
    # a loop without products needs no trips
    if not any(parts):
        return 0.0
    if name == "cond":
        return max(parts)
    repeats = 1
    if name == "scan":
        repeats = params["length"]
    elif name == "while":
        about = re.search(ABOUT, str(equation.source_info.name_stack))
        known = int(about[1]) if about else next(trips, None)
        if known is None:
            raise InputError("a while loop whose trips are not known: state them")
        repeats = known
    elif name == "shard_map":
        # the body is of one device; the parameter's name differs by jax's version
        axes = params.get("newly_manual_axes", params.get("manual_axes", ()))
        repeats = math.prod(params["mesh"].shape[axis] for axis in axes)
    elif name == "pallas_call":
        repeats = math.prod(params["grid_mapping"].grid)
    return sum(parts) * repeats
