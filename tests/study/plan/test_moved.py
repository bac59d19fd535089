"""Bytes that programs move: by hand for each rule, and bounded for the steps of a run."""

import json
import re

import jax
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.run.setup import outline
from jaxrlhf.study.plan.advice import explained, table
from jaxrlhf.study.plan.advice import run as run_plan
from jaxrlhf.study.plan.calls import calls_of
from jaxrlhf.study.plan.compiled import as_json, from_json, mesh_of, plan
from jaxrlhf.study.plan.hlo import open_loops, parse
from jaxrlhf.study.plan.moved import moves, source, sources, total
from jaxrlhf.study.plan.topology import parse as parse_topology

PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/x/jaxrlhf/models/layers.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%sliced (p0: f32[8,64], p1: s32[]) -> f32[64] {
  %p0 = f32[8,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %wide = f32[8,64]{1,0} negate(%p0)
  %row = f32[1,64]{1,0} dynamic-slice(%wide, %p1, %zero), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%row)
}

%written (q0: f32[8,64], q1: f32[64], q2: s32[]) -> f32[8,64] {
  %q0 = f32[8,64]{1,0} parameter(0)
  %q1 = f32[64]{0} parameter(1)
  %row.1 = f32[1,64]{1,0} bitcast(%q1)
  %q2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[8,64]{1,0} dynamic-update-slice(%q0, %row.1, %q2, %zero.1)
}

%kept (r0: f32[8,64], r1: f32[64], r2: s32[]) -> f32[8,64] {
  %r0 = f32[8,64]{1,0} parameter(0)
  %r1 = f32[64]{0} parameter(1)
  %row.2 = f32[1,64]{1,0} bitcast(%r1)
  %r2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %new = f32[8,64]{1,0} dynamic-update-slice(%r0, %row.2, %r2, %zero.2)
  ROOT %changed = f32[8,64]{1,0} negate(%new)
}

%async_collective_fusion.7 (v0: f32[8,64], v1: f32[16,64], v2: f32[64]) -> (f32[64], …) {
  %v0 = f32[8,64]{1,0} parameter(0)
  %v1 = f32[16,64]{1,0} parameter(1)
  %v2 = f32[64]{0} parameter(2)
  %less = f32[64]{0} negate(%v2)
  %all = f32[16,64]{1,0} all-gather(%v0), channel_id=1, dimensions={0}
  ROOT %both = (f32[64]{0}, f32[8,64]{1,0}, f32[16,64]{1,0}) tuple(%less, %v0, %all)
}

%body (t: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %t = (s32[], f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,64]{1,0} get-tuple-element(%t), index=1
  %slice = f32[64]{0} fusion(%x, %i), kind=kLoop, calls=%sliced, metadata={stack_frame_id=1}
  %write = f32[8,64]{1,0} fusion(%x, %slice, %i), kind=kLoop, calls=%written
  ROOT %out = (s32[], f32[8,64]{1,0}) tuple(%i, %write)
}

%condition (u: (s32[], f32[8,64])) -> pred[] {
  %u = (s32[], f32[8,64]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: f32[8,64], i0: s32[]) -> f32[8,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %i0 = s32[] parameter(1)
  %start = (s32[], f32[8,64]{1,0}) tuple(%i0, %a)
  %loop = (s32[], f32[8,64]{1,0}) while(%start), condition=%condition, body=%body
  %done = f32[8,64]{1,0} get-tuple-element(%loop), index=1
  LINES
}
"""


def moved(*lines, trips=3):
    """Name → (bytes a time, times)."""
    found = moves(parse(PROGRAM.replace("LINES", "\n  ".join(lines))), trips)
    return {move.op.name: (move.bytes, move.times) for move in found}


def test_moves_of_slices_and_updates_in_a_loop():
    # 64 numbers and an index are read, 64 written; then 64 read, an index, 64 written in place
    assert moved() == {"slice": (516, 3), "write": (516, 3)}


def test_moves_needs_the_trips_of_an_open_loop():
    with pytest.raises(InputError, match="loop loop: its trips are not known: state as many"):
        moved(trips=None)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("%m = f32[8,64]{1,0} copy(%done)", 2 * 2048),
        ("%m = f32[2,64]{1,0} slice(%done), slice={[0:2], [0:64]}", 2 * 512),
        ("%m = f32[1,64]{1,0} dynamic-slice(%done, %i0, %i0), dynamic_slice_sizes={1,64}", 512),
        ("%m = f32[3,64]{1,0} gather(%done, %i0), offset_dims={1}", 2 * 768 + 4),
        ("%m = f32[8,64]{1,0} dynamic-update-slice(%done, %row, %i0, %i0)", 512),
        # not in place: what is made of it is read and written whole
        ("%m = f32[8,64]{1,0} fusion(%done, %flat, %i0), calls=%kept", 2 * 2048 + 256 + 4),
        # an exchange names its operand again; what it ends with is free
        ("%m = (f32[8,64], f32[16,64]) all-gather-start(%done), dimensions={0}", 2048 + 4096),
        ("%m = f32[8,64]{1,0} all-reduce-start(%done), to_apply=%add", 2 * 2048),
        ("%m = f32[8,64]{1,0} all-reduce-done(%done)", 0),
        # S(1) of a layout with tiles is on a TPU's chip
        ("%m = (f32[8,64]{1,0:T(8,128)S(1)}, f32[8,64]{1,0:T(8,128)}, u32[]{:S(2)}) "
         "copy-start(%done)", 2048),
        ("%m = ((f32[8,64]{1,0:T(8,128)}), f32[2,64]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
         "slice-start(%done), slice={[0:2], [0:64]}", 512),
        # a piece of an exchange beside other work: only that work moves anything
        ("%m = (f32[64], f32[8,64], f32[16,64]) fusion(%done, %wide, %flat), kind=kLoop, "
         "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, "
         "calls=%async_collective_fusion.7", 2 * 256),
        ('%m = f32[8,64]{1,0} custom-call(%done), custom_call_target="ConcatBitcast"', 0),
        ('%m = f32[8,64]{1,0} custom-call(%done), custom_call_target="Other"', 2 * 2048),
        ("%m = f32[8,64]{1,0} bitcast(%done)", 0),
    ],
)  # fmt: skip
def test_moves_of_an_instruction(line, size):
    given = (
        "%row = f32[1,64]{1,0} bitcast(%done)",
        "%flat = f32[64]{0} bitcast(%done)",
        "%wide = f32[16,64]{1,0} bitcast(%done)",
    )
    assert moved(*given, line).get("m", (0, 1)) == (size, 1)


def test_moves_of_a_conditional_are_its_dearest_branch():
    text = PROGRAM.replace(
        "ENTRY",
        "%small (s: f32[8,64]) -> f32[8,64] {\n"
        "  ROOT %s = f32[8,64]{1,0} parameter(0)\n}\n\n"
        "%large (l: f32[8,64]) -> f32[8,64] {\n"
        "  %l = f32[8,64]{1,0} parameter(0)\n"
        "  ROOT %again = f32[8,64]{1,0} copy(%l)\n}\n\nENTRY",
    )
    line = "%c = f32[8,64] conditional(%go, %a, %a), branch_computations={%small, %large}"
    found = moves(parse(text.replace("LINES", line)), 3)
    assert [(x.op.name, x.total) for x in found][-1] == ("again", 4096)
    assert total(found) == 4096 + 6 * 516


def test_source_is_a_file_of_the_package_and_a_line():
    frames = sources(PROGRAM)
    found = moves(parse(PROGRAM), 3)
    assert source(found[0].op, frames) == "jaxrlhf/models/layers.py:7"
    assert source(found[1].op, frames) == ""
    op = found[1].op._replace(text='metadata={source_file="/a/jaxrlhf/b.py" source_line=3}')
    assert source(op, {}) == "jaxrlhf/b.py:3"


@pytest.mark.parametrize(
    ("name", "most"),
    # the CPU compiler keeps attention's scores, and computes draws in several passes; each piece of
    # 512 tokens reads the weights, which are needed once
    [("sample", 1.5), ("reference", 4.0), ("update", 6.0)],
)
def test_moved_by_needed_of_a_step_is_bounded(name, most, llama_steps):
    step = llama_steps[name]
    assert 1 < step.moved / step.needed < most


def test_moved_by_needed_of_a_token_is_bounded(llama_steps):
    moved, needed = llama_steps["sample"].token
    assert 1 < moved / needed < 1.5
    # most of a call of so few prompt tokens
    assert 32 * moved < llama_steps["sample"].moved < 1.2 * 32 * moved


def test_decode_loop_writes_nothing_as_large_as_a_weight(llama):
    run = outline(llama, mesh_of(llama.mesh, parse_topology("cpu:1")))
    with jax.set_mesh(run.mesh):
        call = calls_of(run)["sample"]
        module = parse(call.program.lower(*call.args).compile().as_text())
    (loop,) = open_loops(module)
    inside = [move.op for move in moves(module, 1) if move.loops[:1] == (loop,)]
    smallest = 4 * 256 * 8 * 32
    assert len(inside) > 30
    assert [op.name for op in inside if op.bytes >= smallest] == []


def test_plan_shows_what_is_moved(llama_steps, llama):
    cpu = parse_topology("cpu:1")
    found = plan(llama, cpu, names=("reference",))
    assert re.search(r"^reference +\S+ +\S+ +3\.\d\d$", table(found), re.M)
    (step,) = found.steps
    assert len(step.heaviest) == 10
    sizes = [size for _, _, size, _ in step.heaviest]
    assert sizes == sorted(sizes, reverse=True)
    assert 0.5 < sum(share for *_, share in step.heaviest) < 1
    lines = explained(step).splitlines()
    assert re.fullmatch(
        r"\S+ f32\[520,896\] +\S+ +1\d\.\d% +jaxrlhf/models/layers.py:\d+", lines[2]
    )
    assert from_json(json.loads(json.dumps(as_json(found)))) == found


def test_plan_refuses_to_explain_a_step_that_is_not_there(llama):
    with pytest.raises(InputError, match="step scores: the run has none: give lay_out, sample"):
        run_plan(llama, parse_topology("cpu:1"), explain="scores")
