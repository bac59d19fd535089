"""Keys and values in fewer bits, in one slot or one a row, and in caches that grow."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig
from jaxrlhf.models.cache import closed, empty_cache, grow, opened, store, write

FEW = DecoderConfig(vocab=8, embed=8, layers=1, heads=2, kv_heads=2, head_dim=4, mlp=8, context=32)


def test_store_int8_by_hand():
    x = jnp.array([[[[127.0, -63.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]]])
    found = store(x, "int8")
    np.testing.assert_array_equal(found.x, [[[[127, -63, 1, 0], [0, 0, 0, 0]]]])
    np.testing.assert_array_equal(found.scale, [[[1.0, 0.0]]])
    halves = store(x / 2, "int8")
    np.testing.assert_array_equal(halves.x, found.x)
    np.testing.assert_array_equal(halves.scale, [[[0.5, 0.0]]])


def test_write_and_grow_keep_the_rest():
    """One slot for all rows, or one a row; values and scales alike."""
    cache = empty_cache(FEW, "int8", 2, 5)
    keys, _ = cache[0]
    new = jnp.array(np.random.default_rng(0).normal(size=(2, 2, 1, 4)), jnp.float32)
    keys = write(keys, new, jnp.array([0, 3]))
    keys = write(keys, 2 * new, jnp.array(4))
    np.testing.assert_allclose(keys.x[1, :, 3] * keys.scale[1, :, 3, None], new[1, :, 0], atol=0.02)
    np.testing.assert_allclose(
        keys.x[:, :, 4] * keys.scale[:, :, 4, None], 2 * new[:, :, 0], atol=0.04
    )
    assert (keys.scale[0] != 0).sum() == (keys.scale[1] != 0).sum() == 2 * 2
    longer = grow(FEW, ((keys, keys),) * FEW.layers, 20)[0][0]
    assert (longer.x.shape, longer.scale.shape) == ((2, 2, 24, 4), (2, 2, 24))
    np.testing.assert_array_equal(longer.x[:, :, :8], keys.x)
    assert not longer.x[:, :, 8:].any()
    assert grow(FEW, ((keys, keys),) * FEW.layers, 3)[0][0] is keys


@pytest.mark.parametrize(("rows", "heads"), [(1, 2), (3, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_without_axes_of_one_it_is_the_same_cache(rows, heads, kind):
    """Written by one number for all rows and by one a row, and grown."""
    decoder = replace(FEW, heads=heads, kv_heads=heads)
    cache = empty_cache(decoder, kind, rows, 5)
    each = (n for n in (rows, heads) if n > 1 or kind == "int8")
    assert cache[0][0].x.shape == (*each, 8, 4)
    new = jnp.array(np.random.default_rng(0).normal(size=(rows, heads, 1, 4)), jnp.float32)
    whole = opened(cache[0], heads)[0]
    assert whole.x.shape == (rows, heads, 8, 4)
    for at in (jnp.array(3), jnp.arange(rows) + 2):
        written = write(cache[0][0], new, at), write(cache[0][1], 2 * new, at)
        expected = write(whole, new, at), write(whole, 2 * new, at)
        jax.tree.map(np.testing.assert_array_equal, opened(written, heads), expected)
        jax.tree.map(np.testing.assert_array_equal, closed(expected), written)
        (longer,) = grow(decoder, (written,), 12)
        found = jax.tree.map(lambda x: x[:, :, :8], opened(longer, heads))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert longer[0].x.shape[-2] == 16
