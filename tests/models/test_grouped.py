"""Rows times the matrix of their group: by hand and by ragged_dot, with gradients, in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.grouped import grouped

D, F = 6, 5
RNG = np.random.default_rng(0)


def given(sizes, rows):
    matrices = RNG.standard_normal((len(sizes), D, F)).astype(np.float32)
    x = RNG.standard_normal((rows, D)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(matrices), jnp.asarray(sizes, jnp.int32)


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [([3, 0, 9, 1], 13), ([0, 0, 5], 9), ([0, 0], 4), ([70, 1, 40], 111), ([1] * 16, 20)],
)
def test_grouped_equals_each_row_by_its_matrix(sizes, rows):
    """Groups without a row, rows of no group, groups of several tiles; and both gradients."""
    x, matrices, counts = given(sizes, rows)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.zeros((rows, F), np.float32)
    for row, group in enumerate(owner):
        expected[row] = np.asarray(x)[row] @ np.asarray(matrices)[group]
    slope = jnp.asarray(RNG.standard_normal((rows, F)), jnp.float32)

    def total(where, x, matrices):
        found = grouped(where, x, matrices, counts)
        return (slope * found).sum(), found

    run = jax.jit(jax.grad(total, argnums=(1, 2), has_aux=True), static_argnums=0)
    slopes, found = run("cpu", x, matrices)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain, same = run("tpu", x, matrices)  # ragged_dot
    np.testing.assert_allclose(same, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), slopes, plain)


def test_gradients_of_many_bfloat16_rows_add_up_in_float32():
    x, matrices = jnp.ones((4096, D), jnp.bfloat16), jnp.ones((2, D, F), jnp.bfloat16)
    sizes = jnp.array([4096, 0], jnp.int32)
    slope = jax.jit(jax.grad(lambda w: grouped("cpu", x, w, sizes).sum(dtype=jnp.float32)))(
        matrices
    )
    assert slope.dtype == jnp.bfloat16
    assert float(slope[0, 0, 0]) == 4096  # in bfloat16 a sum of ones stops at 256


def test_rows_are_not_written_out_for_every_group():
    """As XLA does it for CPUs and GPUs."""
    x, matrices, counts = given([64] * 16, 1024)

    def numbers(where):
        run = jax.jit(lambda *args: grouped(where, *args)).lower(x, matrices, counts).compile()
        return run.memory_analysis().temp_size_in_bytes / 4

    assert numbers("cpu") < 8 * 1024 * (D + F) < 16 * 1024 * D < numbers("tpu")
