"""Bytes that a compiled program moves to and from memory, instruction by instruction.

What is scheduled reads its operands and writes its results: fusions, products, copies, exchanges.
A slice reads what it takes, an update in place writes what is new, in a fusion too; what only names
memory anew (tuples, bitcasts, parameters) moves nothing, nor does what lies on a TPU's chip.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxrlhf.study.plan.hlo import (
    NOTHING,
    Module,
    Op,
    Shape,
    Trips,
    called,
    known_trips,
    stated,
)

FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all",
        "opt-barrier", "partition-id", "replica-id"}  # fmt: skip
"""They name memory, or read no array."""
NAMES = ("AllocateBuffer", "ConcatBitcast")
"""Custom calls of TPUs that do so too."""
SLICES = {"slice", "dynamic-slice", "gather"}
POINTWISE = {"bitcast", "reshape", "transpose", "copy", "convert", "negate", "multiply", "add",
             "subtract", "divide", "select", "maximum", "minimum", "broadcast"}  # fmt: skip
"""In a fusion they compute only what is asked of them."""
UNDER = ("while", "call", "async-start", "conditional")
"""They move what the computations that they name move."""


class Move(NamedTuple):
    """What an instruction moves, each time, and how often."""

    op: Op
    bytes: float
    times: int
    loops: tuple[str, ...]
    """The while loops around it, outermost first."""

    @property
    def total(self) -> float:
        """Bytes of all its times."""
        return self.bytes * self.times


def moves(module: Module, trips: Trips = None) -> list[Move]:
    """Every instruction that moves something; of a conditional those of its dearest branch.

    Args:
      trips: of the loops whose trips the program does not say.

    Raises:
      InputError: as ``stated``.
    """
    return _of(module, module.entry, stated(module, trips), 1, ())


def _of(
    module: Module, name: str, trips: Mapping[str, int], times: int, loops: tuple[str, ...]
) -> list[Move]:
    ops, out = module.computations.get(name, {}), []
    for op in ops.values():
        count, around = times, loops
        if op.opcode == "while":
            known = known_trips(module, op, name)
            count = times * (trips[op.name] if known is None else known)
            around = (*loops, op.name)
        if op.opcode in UNDER:
            inside = [
                _of(module, callee, trips, count, around)
                for callee in called(op)
                # a condition is a comparison of scalars
                if op.opcode != "while" or f"body=%{callee}" in op.text
            ]
            out += max(inside, key=total, default=[])
        elif moved := bytes_of(module, ops, op):
            out.append(Move(op, moved, times, loops))
    return out


def total(found: Iterable[Move]) -> float:
    """Bytes that these move in all."""
    return sum(move.total for move in found)


def bytes_of(module: Module, ops: dict[str, Op], op: Op) -> float:
    """Bytes that an instruction reads and writes in the device's memory, once."""
    kind = op.opcode
    # what an exchange or copy moves is counted where it starts
    if kind in FREE or kind.endswith("-done") or any(f'"{name}"' in op.text for name in NAMES):
        return 0.0
    given = [ops.get(name, NOTHING) for name in op.operands]
    if kind == "fusion":
        return _fusion(module, op, given)
    if kind == "slice-start":
        # ((whole), slice, …): the slice is read where the whole lies
        piece = op.shapes[len(given[0].shapes)]
        return _far(given[0].shapes[0], piece.bytes) + _far(piece, piece.bytes)
    if kind == "copy-start":
        return _far(op.shapes[0], op.shapes[0].bytes) + _far(op.shapes[1], op.shapes[1].bytes)
    if kind in SLICES:
        index = sum(map(_size, given[1:])) if kind == "gather" else 0.0
        return _far(given[0].shapes[0], op.bytes) + index + _size(op)
    if kind == "dynamic-update-slice":
        return _size(given[1]) + _far(op.shapes[0], given[1].bytes)
    if kind == "scatter":
        # targets, indices, updates: a target is read and written where it is updated
        count = (len(given) - 1) // 2
        return sum(map(_size, given[count:])) + 2 * sum(map(_size, given[count + 1 :]))
    written = op.shapes
    # of what starts an exchange all but an all-reduce names its operands among its results
    if kind.endswith("-start") and kind != "all-reduce-start":
        written = written[sum(len(x.shapes) for x in given) :]
    return sum(map(_size, given)) + sum(_far(x, x.bytes) for x in written)


def _far(where: Shape, size: float) -> float:
    """``size`` bytes, if they lie in the device's memory."""
    return 0.0 if where.near else float(size)


def _size(op: Op) -> float:
    return sum(_far(shape, shape.bytes) for shape in op.shapes)


def _fusion(module: Module, op: Op, given: list[Op]) -> float:
    """What a fusion reads of its operands, and what it writes."""
    name = called(op)[0]
    body, handed = module.computations[name], dict[int, int]()
    # A piece of an exchange, which goes on beside other work: what it has in hand is handed on.
    if name.startswith("async_collective_fusion"):
        handed = {int(x): int(of) for x, of in re.findall(r"\{(\d+)\}: \((\d+), \{\}", op.text)}
    parts = _parts(module, body)
    read = {int(x.text): parts[x.name] for x in body.values() if x.opcode == "parameter"}
    own = (i for i in range(len(given)) if i not in handed.values())
    total = sum(read.get(i, 0.0) * _size(given[i]) for i in own)
    root = next((x for x in body.values() if x.root), NOTHING)
    results = [body.get(x, NOTHING) for x in root.operands] if root.opcode == "tuple" else [root]
    for place, (result, shape) in enumerate(zip(results, op.shapes, strict=False)):
        if place not in handed:
            total += _far(shape, _written(module, body, result, shape.bytes))
    return total


def _written(module: Module, body: dict[str, Op], op: Op, whole: int) -> float:
    """Bytes of a fusion's result that are new: all, but for an update in place."""
    while op.opcode == "bitcast":
        op = body.get(op.operands[0], NOTHING)
    if op.opcode == "dynamic-update-slice":
        return body[op.operands[1]].bytes
    if op.opcode == "scatter":
        # read as well
        return 2 * sum(body[x].bytes for x in op.operands[(len(op.operands) - 1) // 2 + 1 :])
    if op.opcode == "fusion":
        inner = module.computations[called(op)[0]]
        root = next((x for x in inner.values() if x.root), NOTHING)
        return _written(module, inner, root, whole) if root.opcode != "tuple" else whole
    return whole


def _parts(module: Module, body: dict[str, Op]) -> dict[str, float]:
    """The part of each value in a fusion that is computed, or read, 0 to 1."""
    users: dict[str, list[tuple[Op, int]]] = {}
    for op in body.values():
        for place, name in enumerate(op.operands):
            users.setdefault(name, []).append((op, place))
    parts: dict[str, float] = {}
    # users stand behind what they use
    for op in reversed(body.values()):
        asked = sum(_asked(module, op, *use, parts, users) for use in users.get(op.name, []))
        parts[op.name] = 1.0 if op.root else min(1.0, asked)
    return parts


def _asked(
    module: Module,
    op: Op,
    user: Op,
    place: int,
    parts: dict[str, float],
    users: dict[str, list[tuple[Op, int]]],
) -> float:
    """The part of a value that one of its users asks for."""
    part = parts[user.name]
    if user.opcode in SLICES and place == 0:
        return part * user.bytes / op.bytes if op.bytes else part
    if user.opcode in ("dynamic-update-slice", "scatter") and place == 0:
        # in place, if nothing but the result is made of it
        return 0.0 if _is_result(user, users) else part
    if user.opcode in POINTWISE:
        return part
    if user.opcode == "fusion":
        inner = module.computations[called(user)[0]]
        read = {x.text: x.name for x in inner.values() if x.opcode == "parameter"}
        return _parts(module, inner)[read[str(place)]]
    return 1.0


def _is_result(op: Op, users: dict[str, list[tuple[Op, int]]]) -> bool:
    """Whether a value is a fusion's result, or a part of it, and nothing else."""
    if op.root:
        return True
    after = [user for user, _ in users.get(op.name, [])]
    return all(x.opcode in ("bitcast", "tuple") and _is_result(x, users) for x in after)


def sources(text: str) -> dict[str, str]:
    """Frame number → ``file:line``, from the tables at the head of a compiled program's text."""

    def table(name: str) -> dict[str, str]:
        # only the head has them: a large program's text is not searched to its end
        found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text[:1_000_000], re.M)
        return dict(line.split(" ", 1) for line in found[1].splitlines()) if found else {}

    files, places = table("FileNames"), table("FileLocations")
    out = {}
    for frame, row in table("StackFrames").items():
        place = re.search(r"file_location_id=(\d+)", row)
        where = places.get(place[1], "") if place else ""
        found = re.search(r"file_name_id=(\d+).* line=(\d+)", where)
        if found:
            out[frame] = _place(files.get(found[1], "?"), found[2])
    return out


def source(op: Op, frames: Mapping[str, str]) -> str:
    """``file:line`` that an instruction is from, as its metadata says; "" if that says nothing."""
    if found := re.search(r"stack_frame_id=(\d+)", op.text):
        return frames.get(found[1], "")
    found = re.search(r'source_file="([^"]*)" source_line=(\d+)', op.text)
    return _place(*found.groups()) if found else ""


def _place(file: str, line: str) -> str:
    """``file:line``, the file without the folders above its package."""
    return re.sub(r'"|.*/(?=jaxrlhf/)|.*/site-packages/', "", f"{file}:{line}")
