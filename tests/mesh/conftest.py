"""Eight devices as a cube."""

import pytest

from jaxrlhf.config import MeshConfig
from jaxrlhf.mesh.sharding import make_mesh


@pytest.fixture(scope="session")
def mesh():
    """data 2 × fsdp 2 × tensor 2."""
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
