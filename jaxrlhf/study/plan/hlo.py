"""Reading a compiled program's text: its loops, what crosses between devices, what is how large."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


class Shape(NamedTuple):
    """One array of a result, as it lies on one device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.dims:
            count *= size
        return count

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
        """Size of the result."""
        return sum(shape.bytes for shape in self.shapes)


@dataclass(frozen=True)
class Module:
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


def parse(text: str) -> Module:
    """The text of a compiled program (``compiled.as_text()``)."""
    computations: dict[str, dict[str, Op]] = {}
    entry, current = "", {}
    counts = [int(n) for n in re.findall(r"num_(?:partitions|replicas)=(\d+)", text[:100_000])]
    for line in text.splitlines():
        if line and not line[0].isspace():
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif (op := _instruction(line)) is not None:
            current[op.name] = op
    devices = 1
    for n in counts:
        devices *= n
    return Module(computations, entry, devices)


def _instruction(line: str) -> Op | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if found is None:
        return None
    rest = line[found.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    stop = start + _closing(rest[start:])
    inside, after = rest[start + 1 : stop - 1], rest[stop:]
    shapes = tuple(
        Shape(dtype, tuple(int(n) for n in re.findall(r"\d+", dims)))
        for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", kind)
        if dtype in BITS
    )
    opcode = rest[:start]
    text = inside if opcode in ("constant", "parameter") else after
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Op(found[2], opcode, shapes, operands, text, bool(found[1]))


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the one ``text`` starts with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def visits(module: Module, trips: int | None = None) -> Iterator[Visit]:
    """Every instruction that the program carries out, those in loops with their trips.

    Each branch of a conditional counts.

    Args:
      trips: of the loop whose trips the program does not say, such as one that may end early.

    Raises:
      InputError: there is such a loop, and ``trips`` is not given, or there are several.
    """
    unknown = sorted(open_loops(module))
    if len(unknown) > 1:
        raise InputError(f"loops {', '.join(unknown)}: trips of more than one are not known")
    yield from _visits(module, module.entry, 1, (), trips)


def _visits(
    module: Module, name: str, times: int, loops: tuple[str, ...], trips: int | None
) -> Iterator[Visit]:
    for op in module.computations.get(name, {}).values():
        yield Visit(op, name, times, loops)
        if op.opcode == "while":
            count = known_trips(module, op, name)
            if count is None and trips is None:
                raise InputError(f"loop {op.name}: its trips are not known: state them")
            count = trips if count is None else count
            assert count is not None
            for callee in called(op):
                yield from _visits(module, callee, times * count, (*loops, op.name), trips)
        elif op.opcode in CALLERS:
            for callee in called(op):
                yield from _visits(module, callee, times, loops, trips)


def called(op: Op) -> list[str]:
    """The computations that an instruction names."""
    names: list[str] = []
    for key, many, one in re.findall(r"(\w+)=(?:\{([^}]*)\}|%?([\w.\-]+))", op.text):
        if key in CALLS:
            names += re.findall(r"%?([\w.\-]+)", many) if many else [one]
    return names


def open_loops(module: Module) -> set[str]:
    """The while loops whose trips the program does not say: of a sampler, the decode loop."""
    return {
        op.name
        for name, ops in module.computations.items()
        for op in ops.values()
        if op.opcode == "while" and known_trips(module, op, name) is None
    }


def known_trips(module: Module, loop: Op, computation: str) -> int | None:
    """How often a while loop runs, as XLA notes it or as its condition counts; None if open."""
    if found := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.text):
        return int(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    counted = _counts_to(module, condition[1]) if condition else None
    if counted is None:
        return None
    slot, end = counted
    ops = module.computations[computation]
    start = _plain(ops, loop.operands[0])
    if start is None or start.opcode != "tuple":
        return None
    first = _plain(ops, start.operands[slot])
    return end if first is not None and (first.opcode, first.text) == ("constant", "0") else None


def _counts_to(module: Module, name: str) -> tuple[int, int] | None:
    """(slot, n) of a condition that is ``slot < n`` and nothing else."""
    ops = module.computations.get(name, {})
    root = next((op for op in ops.values() if op.root), None)
    given: list[Op | None] = []
    if root is not None and root.opcode == "fusion":
        given = [_plain(ops, operand) for operand in root.operands]
        ops = module.computations[called(root)[0]]
        root = next((op for op in ops.values() if op.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.text:
        return None
    left, right = (_plain(ops, operand) for operand in root.operands)
    if left is not None and left.opcode == "parameter" and given:
        left = given[int(left.text)]
    if right is not None and right.opcode == "parameter" and given:
        right = given[int(right.text)]
    if left is None or right is None or right.opcode != "constant":
        return None
    slot = re.search(r"index=(\d+)", left.text)
    return (int(slot[1]), int(right.text)) if slot and right.text.isdigit() else None


def _plain(ops: dict[str, Op], name: str) -> Op | None:
    """The instruction that a value comes from, copies left out."""
    op = ops.get(name)
    while op is not None and op.opcode in ("copy", "bitcast"):
        op = ops.get(op.operands[0])
    return op
