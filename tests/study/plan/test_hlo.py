"""Reading programs: trips, exchanges and FLOPs, by hand and in what XLA writes.

FLOPs also agree with XLA's own count where that can be right: with every loop written out.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import DecoderConfig, MeshConfig, PPOConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Batch
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import policy_loss
from jaxrlhf.study.plan.hlo import (
    Loops,
    Shape,
    called,
    collectives,
    flops,
    group_size,
    known_trips,
    open_loops,
    parse,
    totals,
    visits,
)

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


def test_shape_on_a_chip():
    line = "HloModule f\n\nENTRY %m (x: f32[8]) -> f32[8] {\n  %x = f32[8]{LAYOUT} parameter(0)\n}"
    for layout, near in (
        ("0", False),
        ("0:T(128)", False),
        ("0:T(128)S(1)", True),
        ("0:T(128)S(5)", False),
        ("0:S(1)", False),
    ):
        (shape,) = parse(line.replace("LAYOUT", layout)).computations["m"]["x"].shapes
        assert shape.near is near


def test_visits_multiply_nested_trips():
    assert times(NOTED, "r") == [15]
    assert times(NOTED, "x.3") == [5]


def test_visits_unknown_trips_are_an_error_unless_stated():
    with pytest.raises(InputError, match="loop w: its trips are not known: state as many"):
        times(LOOP, "r")
    assert times(LOOP, "r", trips=7) == [21]


def test_visits_one_stated_number_is_not_for_a_loop_in_a_loop():
    text = LOOP.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(1)")
    assert open_loops(parse(text)) == ["w"]
    with pytest.raises(InputError, match=r"loop w\.3, within another: its trips are not known"):
        times(text, "r", trips=7)
    with pytest.raises(InputError, match=r"loop w: its trips are not known: state as many"):
        times(text, "r", trips=(7, 2))
    assert times(text, "r", trips=Loops((2,), 7)) == [14]


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


EXCHANGES = """HloModule m, num_partitions=8

%wrapped (q: bf16[4,8]) -> bf16[1,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %rs = bf16[1,8]{1,0} reduce-scatter(%q), replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (x: f32[2,8]) -> f32[16,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %b = bf16[4,8]{1,0} custom-call()
  %start = (f32[2,8], f32[16,8]) all-gather-start(%x), replica_groups={}, dimensions={0}
  %as = ((bf16[4,8]), bf16[1,8], u32[]) async-start(%b), calls=%wrapped
  %ad = bf16[1,8]{1,0} async-done(%as)
  %ar = f32[2,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %cp = f32[2,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %done = f32[16,8]{1,0} all-gather-done(%start)
}
"""


def test_collectives_bytes_by_hand():
    found = {one.visit.op.name: one for one in collectives(parse(EXCHANGES))}
    assert found.keys() == {"start", "rs", "ar", "cp"}
    assert found["start"].sent == 64 * 7
    assert max(shape.elements for shape in found["start"].visit.op.shapes) == 128
    assert found["rs"].sent == 64 * 3 / 4
    assert found["ar"].sent == 2 * 64 * 1 / 2
    assert found["cp"].sent == 64
    assert totals(found.values())["all-gather"] == (1, 448)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2,4},{1,3,5}}", 3),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("{}", 8),
        ("mesh['a'=4,'b'=1,'c'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'b'}", 2),
        ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", 4),
    ],
)
def test_group_size(groups, size):
    text = EXCHANGES.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
    assert group_size(parse(text).computations["wrapped"]["rs"], 8) == size


def test_group_size_that_cannot_be_read_is_an_error():
    op = parse(EXCHANGES.replace("replica_groups=[2,4]<=[8]", "replica_groups=@new")).computations
    with pytest.raises(ValueError, match="replica_groups cannot be read"):
        group_size(op["wrapped"]["rs"], 8)


def test_collectives_in_pieces_count_once():
    piece = """
%async_collective_fusion.NAME (q: f32[2,8]) -> f32[16,8] {
  %q = f32[2,8]{1,0} parameter(0)
  ROOT %NAME = f32[16,8]{1,0} all-gather(%q), channel_id=7, replica_groups={}, dimensions={0}
}
"""
    call = (
        "  %NAME.call = f32[16,8] fusion(%x), kind=kCustom, calls=%async_collective_fusion.NAME\n"
    )
    calls = call.replace("NAME", "first") + call.replace("NAME", "second")
    text = EXCHANGES.replace("  ROOT %done", f"{calls}  ROOT %done")
    text += piece.replace("NAME", "first") + piece.replace("NAME", "second")
    assert totals(collectives(parse(text)))["all-gather"] == (2, 2 * 448)


def program(f, mesh, *given):
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in given
    ]
    return parse(jax.jit(f).lower(*args).compile().as_text())


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))


def test_collectives_in_a_loop(mesh):
    def f(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    module = program(f, mesh, ((64, 32), P("fsdp")), ((6, 32, 32), P(None, "fsdp")))
    (one,) = (x for x in collectives(module) if x.kind == "all-gather")
    assert (one.visit.times, one.sent, len(one.visit.loops)) == (6, 8 * 32 * 4 * 3, 1)
    assert one.visit.op.shapes == (Shape("f32", (32, 32)),)


A, B = jnp.ones((4, 8)), jnp.ones((8, 16))
ONE = 2 * 4 * 8 * 16


def count(f, *args, trips=None):
    return flops(jax.make_jaxpr(f)(*args), trips)


def test_flops_of_a_loop_in_a_loop():
    def repeat(end, body, x):
        return jax.lax.while_loop(lambda y: (y < end).all(), body, x)

    def nested(x):
        return repeat(3, lambda y: repeat(2, lambda z: z @ B @ B.T, y) @ B @ B.T, x)

    assert count(nested, A, trips=Loops((5,), 7)) == 5 * (1 + 7) * 2 * ONE
    with pytest.raises(InputError, match="a while loop whose trips are not known"):
        count(nested, A, trips=5)


def test_flops_products():
    assert count(jnp.dot, A, B) == ONE
    assert count(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), A[None], B[None]) == ONE
    kernel = jnp.ones((3, 3, 5, 7))
    image = jnp.ones((2, 10, 10, 5))
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert count(conv, image, kernel) == 2 * 2 * 10 * 10 * 7 * 3 * 3 * 5


def test_flops_scan_and_nesting():
    def f(a, b):
        def step(x, _):
            return x, jax.jit(jnp.dot)(x, b)

        return jax.lax.scan(step, a, length=6)

    assert count(f, A, B) == 6 * ONE
    assert count(jax.checkpoint(f), A, B) == 6 * ONE


def test_flops_while_needs_trips():
    def f(a, b):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ b @ b.T, a)

    with pytest.raises(InputError, match="trips are not known"):
        count(f, A, B)
    assert count(f, A, B, trips=5) == 5 * 2 * ONE


def test_flops_while_without_products_needs_none():
    assert count(lambda x: jax.lax.while_loop(lambda y: y < 9, lambda y: y + 1, x), 0.0) == 0


def test_flops_cond_takes_the_dearest_branch():
    def f(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: (a @ b) @ b.T, lambda: a * 2)

    assert count(f, A, B) == 2 * ONE


def test_flops_custom_vjp_and_gradient():
    @jax.custom_vjp
    def f(a, b):
        return a @ b

    f.defvjp(lambda a, b: (f(a, b), (a, b)), lambda s, d: (d @ s[1].T, s[0].T @ d))
    assert count(f, A, B) == ONE
    assert count(jax.grad(lambda a, b: f(a, b).sum(), (0, 1)), A, B) == 3 * ONE


def test_flops_shard_map_counts_every_device():
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    rows = P("data")
    f = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, P()), out_specs=rows)
    assert count(f, A, B) == ONE


def test_flops_sees_what_remat_computes_again():
    def f(a, b):
        return jnp.sin(jnp.sin(a @ b) @ b.T).sum()

    plain, again = (count(jax.grad(g, (0, 1)), A, B) for g in (f, jax.checkpoint(f)))
    assert plain == 6 * ONE
    assert again == 8 * ONE


@pytest.fixture
def unrolled(monkeypatch):
    """Loops written out, which is all that XLA's count can be right about."""
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    monkeypatch.setattr(jax, "checkpoint", lambda f: f)  # else XLA merges what is computed twice


def wide(layers, **more):
    decoder = DecoderConfig(
        vocab=2048,
        embed=256,
        layers=layers,
        heads=2,
        kv_heads=1,
        head_dim=128,
        mlp=1024,
        context=64,
    )
    return Model(decoder, **more)


def rows_of(shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("layers", [1, 2])
def test_flops_agrees_with_xla_on_scoring(layers, unrolled):
    model = wide(layers)
    traced = jax.jit(partial(score, model)).trace(model.shapes(), *rows_of((4, 64)))
    said = traced.lower().compile().cost_analysis()["flops"]
    assert flops(traced.jaxpr) == pytest.approx(said, rel=0.02)


@pytest.mark.parametrize("layers", [1, 2])
def test_flops_agrees_with_xla_on_a_gradient(layers, unrolled):
    model = wide(layers)
    loss = policy_loss(model, ALGORITHMS["ppo"](PPOConfig()))
    ints, floats = (jax.ShapeDtypeStruct((4, 64), kind) for kind in (jnp.int32, jnp.float32))
    batch = Batch(
        token_BT=ints,
        attention_mask_BT=ints,
        mask_BT=floats,
        old_logp_BT=floats,
        advantage_BT=floats,
        weight_BT=floats,
        return_BT=floats,
        old_value_BT=floats,
    )
    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(model.shapes(), None, batch)
    said = traced.lower().compile().cost_analysis()["flops"]
    # the backward pass computes logits again; XLA keeps those of the only piece that there is here
    again = 2 * 4 * 63 * model.decoder.embed * model.decoder.vocab
    assert flops(traced.jaxpr) == pytest.approx(said + again, rel=0.02)
