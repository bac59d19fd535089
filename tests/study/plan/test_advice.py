"""Which configs are tried when one does not fit: none is compiled here."""

from dataclasses import replace
from types import SimpleNamespace

import runs

from jaxrlhf.config import MeshConfig, check_mesh, rows_at_once
from jaxrlhf.study.plan import advice


def plan_on(too_large, **sizes):
    mesh = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1, **sizes}
    steps = tuple(SimpleNamespace(name=name) for name in too_large)
    return SimpleNamespace(mesh=mesh, devices=8, too_large=steps)


def test_further_splits_weights_and_tokens():
    assert list(advice._further(plan_on((), data=2, fsdp=2, tensor=2))) == [
        (4, 1, 2),
        (1, 2, 2),
        (2, 2, 2),
        (1, 4, 2),
        (2, 1, 4),
        (1, 2, 4),
    ]


def test_further_keeps_context():
    found = list(advice._further(plan_on((), data=2, fsdp=2, context=2)))
    assert found[0] == (4, 2, 1)
    assert all(context >= 2 and fsdp * context >= 4 for fsdp, context, _ in found)


def test_ladder_of_rows_too_long_for_a_device_comes_to_context(tmp_path):
    """A microbatch is down to one row for each piece of the batch: its tokens are split next."""
    config = replace(runs.ppo(tmp_path), mesh=MeshConfig(fsdp=8, data=1))
    tried = list(advice._ladder(config, plan_on(("update",), fsdp=8)))
    assert tried[0].model.remat != config.model.remat
    assert tried[0].mesh == config.mesh
    context = next(x for x in tried if x.mesh.context == 2)
    assert context.mesh == MeshConfig(data=1, fsdp=4, tensor=1, context=2)
    for other in tried:
        decoder, rows = other.model.decoder, rows_at_once(other)
        assert check_mesh(other.mesh, decoder, 8, rows) == other.mesh
    smallest = min(rows_at_once(x) for x in tried if x.mesh == context.mesh)
    assert smallest < rows_at_once(config)
    assert "--mesh.fsdp 4 --mesh.context 2" in advice.flags(config, context)


def test_layouts_keep_context(tmp_path):
    config = runs.ppo(tmp_path)
    tried = list(advice._layouts(config, plan_on((), data=2, context=4)))
    assert {x.mesh.context for x in tried} == {4}
    assert {x.mesh.data * x.mesh.fsdp * x.mesh.tensor for x in tried} == {2}
