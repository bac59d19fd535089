"""The embedding: what it looks up, and how its gradient adds up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.layers import look_up

V, D = 32, 8
TABLE = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
TOKEN = np.random.default_rng(1).integers(0, V, (4, 6))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_look_up_by_hand(dtype):
    found = look_up(V, dtype, jnp.asarray(TABLE), jnp.asarray(TOKEN))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, jnp.asarray(TABLE[TOKEN], dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_look_up_gradient_of_a_frequent_token(dtype):
    """8,192 times 1e-3: in bfloat16 the sum would stop at 0.5."""
    token = jnp.zeros((8, 1024), jnp.int32).at[0, 0].set(3)

    def total(table):
        return (1e-3 * look_up(V, dtype, table, token)).sum(dtype=jnp.float32)

    found = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(TABLE)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], 8191e-3, rtol=5e-3)
    np.testing.assert_allclose(found[3], 1e-3, rtol=5e-3)
    assert (found[[1, 2, *range(4, V)]] == 0).all()


def test_look_up_gradient_is_that_of_indexing_on_a_mesh():
    def total(table, read):
        return jnp.sin(read(table)).sum()

    expected = jax.grad(total)(jnp.asarray(TABLE), lambda table: table[TOKEN])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(total), static_argnums=1)(
            jnp.asarray(TABLE), lambda table: look_up(V, "float32", table, jnp.asarray(TOKEN))
        )
    np.testing.assert_allclose(found, expected, atol=1e-6)
