"""Products of a few rows with weights whose outputs stand first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.turned import FEW, Turned, times_turned, turn, turned, turned_back


def drawn(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rows", [(), (5,), (5, 1), (2, 3), (9, 4)])
@pytest.mark.parametrize(("ins", "outs"), [((8,), (12,)), ((8,), (2, 5, 3)), ((2, 4), (6,))])
def test_it_is_the_product(rows, ins, outs):
    x, kernel = drawn(*rows, *ins), drawn(*ins, *outs, seed=1)
    w = turn(len(ins), kernel)
    assert (w.x.shape, w.shape, w.dtype) == (outs + ins, ins + outs, jnp.float32)
    found = times_turned(x, w)
    np.testing.assert_allclose(found, jnp.tensordot(x, kernel, len(ins)), rtol=1e-5, atol=1e-5)


def test_the_sum_is_taken_in_the_dtype_that_is_asked_for():
    x, kernel = drawn(4, 256).astype("bfloat16"), drawn(256, 3, seed=1).astype("bfloat16")
    found = times_turned(x, turn(1, kernel), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
    assert times_turned(x, turn(1, kernel)).dtype == jnp.bfloat16


def test_axes_are_turned_and_turned_back():
    names = "heads", "head_dim", "embed"
    assert turned(names, 2) == ("embed", "heads", "head_dim")
    assert turned_back(turned(names, 2), 2) == names


@pytest.mark.parametrize(("rows", "made"), [(16, "96,16"), (FEW + 1, f"{FEW + 1},96")])
def test_of_few_rows_the_weight_is_the_left_side_of_the_compiled_product(rows, made):
    """Its result has outputs first: XLA has not put the sides back, and copies no weight."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 64), (96, 64))]
    call = jax.jit(lambda x, w: times_turned(x, Turned(w, 1))).lower(*shapes).compile()
    found = [line.split(" = ")[1] for line in call.as_text().splitlines() if "dot(" in line]
    assert found
    assert all(line.startswith(f"f32[{made}]") for line in found), found


def test_a_weight_of_several_axes_is_copied_for_no_product():
    """Of many rows, as of few: nothing has its inputs first."""
    for rows in (16, FEW + 1):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 64), (2, 48, 64))]
        call = jax.jit(lambda x, w: times_turned(x, Turned(w, 1))).lower(*shapes).compile()
        text = call.as_text()
        assert "dot(" in text
        assert not [shape for shape in ("f32[64,96]", "f32[64,2,48]") if shape in text]
