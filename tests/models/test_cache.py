"""Keys and values in fewer bits, in one slot or one a row, and in caches that grow."""

import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import DecoderConfig
from jaxrlhf.models.cache import empty_cache, grow, store, write

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
