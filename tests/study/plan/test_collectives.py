"""What crosses between devices: by hand, and in programs that XLA partitions."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.config import MeshConfig
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.study.plan.collectives import (
    arrays_with,
    collectives,
    gathered,
    group_size,
    product_bytes,
    totals,
)
from jaxrlhf.study.plan.hlo import parse

TEXT = """HloModule m, num_partitions=8

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
    found = {one.name: one for one in collectives(parse(TEXT))}
    assert found.keys() == {"start", "rs", "ar", "cp"}
    assert found["start"].sent == 64 * 7
    assert found["start"].result.elements == 128
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
    text = TEXT.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
    assert group_size(parse(text).computations["wrapped"]["rs"], 8) == size


def test_group_size_that_cannot_be_read_is_an_error():
    op = parse(TEXT.replace("replica_groups=[2,4]<=[8]", "replica_groups=@new")).computations
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
    text = TEXT.replace("  ROOT %done", f"{calls}  ROOT %done")
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


def test_gathered_in_a_loop(mesh):
    def f(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    module = program(f, mesh, ((64, 32), P("fsdp")), ((6, 32, 32), P(None, "fsdp")))
    (one,) = gathered(module, 32 * 32)
    assert (one.times, one.sent, len(one.loops)) == (6, 8 * 32 * 4 * 3, 1)
    assert gathered(module, 32 * 32 + 1) == []


def test_arrays_with_finds_by_dimensions_and_size(mesh):
    module = program(lambda x, w: (x @ w).sum(), mesh, ((64, 33), P("fsdp")), ((33, 96), P()))
    assert arrays_with(module, (16, 96), 16 * 96)
    assert not arrays_with(module, (64, 96), 1)
    assert not arrays_with(module, (16, 96), 16 * 96 + 1)


def test_product_bytes(mesh):
    module = program(lambda x, w: x @ w, mesh, ((64, 32), P("fsdp")), ((32, 96), P()))
    assert product_bytes(module) == 4 * (16 * 32 + 32 * 96 + 16 * 96)
