"""A plan as text."""

from collections.abc import Sequence

from jaxrlhf.config import AXES
from jaxrlhf.study.plan.advice import Candidate
from jaxrlhf.study.plan.planned import KINDS, Plan, Step
from jaxrlhf.study.plan.topology import CHIPS, GIB

TITLES = {"weights_copy": "weights copy", "kv_cache": "KV cache"}


def table(plan: Plan) -> str:
    """Everything a plan says, in lines of text."""
    axes = " · ".join(f"{name} {size}" for name, size in plan.mesh.items())
    chip = CHIPS[plan.chip]
    title = f"{plan.topology}: {plan.devices} x {plan.chip}, mesh {axes}"
    facts = (
        f"a device: {plan.memory / GIB:.2f} GiB, {chip.flops / 1e12:g} TFLOP/s, "
        f"{chip.bandwidth / 1e9:g} GB/s memory, {chip.link / 1e9:g} GB/s links ({chip.source})"
    )
    parts = [title, facts, "", "GiB on a device while a step runs"]
    parts += [*columns(_memory(plan)), "", "a call on a device, at least"]
    parts += [*columns(_work(plan)), "", "exchanges of a call, MB that each device sends"]
    parts += [*columns(_exchanges(plan)), ""]
    parts += [f"note: {remark}" for remark in plan.remarks]
    return "\n".join([*parts, verdict(plan)])


def verdict(plan: Plan) -> str:
    """Whether it fits, in a line."""
    if plan.fits:
        spare = (plan.memory - plan.peak) / GIB
        return (
            f"fits: {plan.peak / GIB:.2f} GiB of {plan.memory / GIB:.2f}, {spare:.2f} to spare; "
            f"an iteration takes {plan.time:.3g} s at least"
        )
    lines = [
        f"{step.name} needs {step.peak / GIB:.2f} GiB, {(step.peak - plan.memory) / GIB:.2f} more"
        for step in plan.too_large
    ]
    return f"does not fit {plan.memory / GIB:.2f} GiB: {'; '.join(lines)}"


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
    for rank, one in enumerate(found, 1):
        mesh, plan = one.plan.mesh, one.plan
        sent = sum(step.calls * step.sent for step in plan.steps) / 1e9
        sizes = [str(mesh[name]) for name in AXES]
        pieces = str(one.config.optim.microbatches)
        rows.append(
            [str(rank), *sizes, pieces, f"{plan.peak / GIB:.2f}", f"{plan.time:.3g}", f"{sent:.2f}"]
        )
    return "\n".join(columns(rows))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _memory(plan: Plan) -> list[list[str]]:
    kinds = [kind for kind in KINDS if any(step.bytes.get(kind) for step in plan.steps)]
    rows = [["step", *(TITLES.get(kind, kind) for kind in kinds), "in all"]]
    for step in plan.steps:
        cells = [f"{step.bytes.get(kind, 0.0) / GIB:.3f}" for kind in kinds]
        rows.append([step.name, *cells, f"{step.peak / GIB:.3f}" + "!" * (step.peak > plan.memory)])
    return rows


def _work(plan: Plan) -> list[list[str]]:
    rows = [["step", "calls", "GFLOP", "compute ms", "memory ms", "links ms", "bound", "share"]]
    for step in plan.steps:
        times = [f"{1e3 * step.seconds[name]:.3g}" for name in ("compute", "memory", "links")]
        bound = max(step.seconds, key=lambda name: step.seconds[name])
        share = step.calls * step.time / plan.time if plan.time else 0.0
        cells = [f"{step.flops / 1e9:.4g}", *times, bound, f"{share:.1%}"]
        rows.append([step.name, str(step.calls), *cells])
    return rows


def _exchanges(plan: Plan) -> list[list[str]]:
    kinds = sorted({kind for step in plan.steps for kind in step.collectives})
    if not kinds:
        return [["none"]]
    return [["step", *kinds], *(_sent(step, kinds) for step in plan.steps)]


def _sent(step: Step, kinds: Sequence[str]) -> list[str]:
    cells = []
    for kind in kinds:
        count, sent = step.collectives.get(kind, (0, 0.0))
        cells.append(f"{sent / 1e6:.4g} in {count}" if count else "-")
    return [step.name, *cells]
