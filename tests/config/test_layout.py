"""Meshes that divide, and the errors that name what they do not divide."""

from dataclasses import replace

import pytest

from jaxrlhf.config import DecoderConfig, MeshConfig, check_mesh, resolve_mesh
from jaxrlhf.core.errors import InputError

DECODER = DecoderConfig(
    vocab=64, embed=48, layers=2, heads=9, kv_heads=3, head_dim=16, mlp=96, context=88
)


@pytest.mark.parametrize(
    ("mesh", "devices", "resolved"),
    [
        (MeshConfig(), 8, MeshConfig(8, 1, 1)),
        (MeshConfig(2, -1, 2), 8, MeshConfig(2, 2, 2)),
        (MeshConfig(2, 1, 1, -1), 8, MeshConfig(2, 1, 1, 4)),
        (MeshConfig(1, 1, 1), 1, MeshConfig(1, 1, 1)),
    ],
)
def test_resolve_mesh(mesh, devices, resolved):
    assert resolve_mesh(mesh, devices) == resolved


@pytest.mark.parametrize("mesh", [MeshConfig(3), MeshConfig(-1, 3), MeshConfig(2, 2, 1)])
def test_resolve_mesh_wrong_product(mesh):
    with pytest.raises(InputError, match="does not make 8 devices"):
        resolve_mesh(mesh, 8)


@pytest.mark.parametrize(
    ("mesh", "changes", "rows", "message"),
    [
        (MeshConfig(tensor=2), {}, 32, "heads=9 % tensor=2 is not 0: mesh.tensor can be 1 with"),
        (MeshConfig(tensor=2), {"heads": 10}, 32, "kv_heads=3 % tensor=2"),
        (MeshConfig(tensor=2), {"heads": 4, "kv_heads": 2, "mlp": 95}, 32, "mlp=95 % tensor=2"),
        (MeshConfig(tensor=2), {"heads": 4, "kv_heads": 2, "vocab": 63}, 32, "vocab=63 % tensor=2"),
        (
            MeshConfig(tensor=8),
            {"heads": 12, "kv_heads": 12, "vocab": 60},
            32,
            "can be 1, 2, 4 with",
        ),
        (
            MeshConfig(fsdp=4),
            {"embed": 50},
            32,
            "embed=50 % fsdp=4 is not 0: mesh.fsdp can be 1, 2",
        ),
        (
            MeshConfig(fsdp=2, context=2),
            {"embed": 50},
            32,
            "embed=50 % fsdp·context=4 is not 0: mesh.fsdp · mesh.context can be 1, 2 with",
        ),
        (MeshConfig(context=0), {}, 32, "mesh.context=0: must be at least 1"),
        (MeshConfig(fsdp=2), {}, 12, "rows=12 % (data·fsdp)=8 is not 0"),
    ],
)
def test_check_mesh_refuses(mesh, changes, rows, message):
    with pytest.raises(InputError) as error:
        check_mesh(mesh, replace(DECODER, **changes), devices=8, rows=rows)
    assert message in str(error.value)


def test_check_mesh_resolves():
    decoder = replace(DECODER, heads=4, kv_heads=2)
    mesh = check_mesh(MeshConfig(fsdp=2, tensor=2), decoder, devices=8, rows=4)
    assert mesh == MeshConfig(2, 2, 2)
