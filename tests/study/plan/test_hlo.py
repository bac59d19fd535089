"""Reading programs: loops and their trips, on text written by hand and on what XLA writes."""

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.study.plan.hlo import Shape, called, known_trips, parse, visits

LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], f32[8]{0:T(128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = f32[8]{0} get-tuple-element(%p.1), index=1
  %r = f32[8]{0} all-reduce(%x.1), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t.1 = (s32[], /*index=1*/f32[8]{0}) tuple(%i.1, %r)
}

%inner_condition (p.2: (s32[], f32[8])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.2, %n), direction=LT
}

%outer (p.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.3 = (s32[], f32[8]{0}) parameter(0)
  %x.3 = f32[8]{0} get-tuple-element(%p.3), index=1
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %t.3 = (s32[], f32[8]{0}) tuple(%copied, %x.3)
  ROOT %w.3 = (s32[], f32[8]{0}) while(%t.3), condition=%inner_condition, body=%inner
}

%outer_condition (p.4: (s32[], f32[8])) -> pred[] {
  %p.4 = (s32[], f32[8]{0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %one = s32[] constant(1)
  %t = (s32[], f32[8]{0}) tuple(%one, %x)
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%outer_condition, body=%outer, KNOWN
}
"""
NOTED = LOOP.replace("KNOWN", 'backend_config={"known_trip_count":{"n":"5"}}')


def times(text, name, trips=None):
    return [v.times for v in visits(parse(text), trips) if v.op.name == name]


def test_parse_reads_instructions():
    module = parse(NOTED)
    assert (module.entry, module.devices) == ("main", 4)
    op = module.computations["inner"]["p.1"]
    assert op.shapes == (Shape("s32", ()), Shape("f32", (8,)))
    assert op.bytes == 36
    r = module.computations["inner"]["r"]
    assert (r.opcode, r.operands, r.root) == ("all-reduce", ("x.1",), False)
    assert module.computations["inner_condition"]["n"].text == "3"


def test_shape_bytes():
    assert Shape("bf16", (3, 5)).bytes == 30
    assert Shape("s4", (8,)).bytes == 4
    assert Shape("pred", ()).bytes == 1


def test_visits_multiply_nested_trips():
    assert times(NOTED, "r") == [15]
    assert times(NOTED, "x.3") == [5]


def test_visits_unknown_trips_are_an_error_unless_stated():
    with pytest.raises(InputError, match="loop w: its trips are not known: state them"):
        times(LOOP, "r")
    assert times(LOOP, "r", trips=7) == [21]


def test_visits_one_stated_number_is_not_for_two_loops():
    text = LOOP.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(1)")
    with pytest.raises(InputError, match=r"loops w, w\.3: trips of more than one are not known"):
        times(text, "r", trips=7)


def test_known_trips_needs_a_start_at_zero():
    text = NOTED.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(1)")
    module = parse(text)
    loop = module.computations["outer"]["w.3"]
    assert known_trips(module, loop, "outer") is None


def test_known_trips_of_a_fused_condition():
    text = NOTED.replace(
        "ROOT %lt = pred[] compare(%i.2, %n), direction=LT",
        "ROOT %lt = pred[] fusion(%i.2, %n), kind=kLoop, calls=%less",
    )
    text += """
%less (l: s32[], m: s32[]) -> pred[] {
  %l = s32[] parameter(0)
  %m = s32[] parameter(1)
  ROOT %cmp = pred[] compare(%l, %m), direction=LT
}
"""
    assert times(text, "r") == [15]


def test_visits_say_which_loops_are_around():
    found = [v.loops for v in visits(parse(NOTED)) if v.op.name == "r"]
    assert found == [("w", "w.3")]


def test_called_reads_all_ways_to_name_a_computation():
    ops = parse(
        """
ENTRY %e (p: s32[]) -> f32[] {
  %p = s32[] parameter(0)
  %c = f32[] conditional(%p), branch_computations={%a, %b}
  ROOT %f = f32[] fusion(%c), kind=kLoop, calls=%g
}
"""
    ).computations["e"]
    assert called(ops["c"]) == ["a", "b"]
    assert called(ops["f"]) == ["g"]


def test_visits_of_what_xla_writes():
    def f(x):
        def outer(x, _):
            return jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ y), x), None

        x = jax.lax.scan(outer, x, length=5)[0]
        return jax.lax.while_loop(lambda y: jnp.abs(y).sum() > 1, lambda y: y @ y, x)

    text = jax.jit(f).lower(jnp.eye(16)).compile().as_text()
    found = [v.times for v in visits(parse(text), trips=7) if v.op.opcode == "dot"]
    assert sorted(found) == [7, 15]
