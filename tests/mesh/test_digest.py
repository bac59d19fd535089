import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.core.types import TrainState
from jaxrlhf.mesh.checkpoint import describe, digest, kind, named_leaves, seal, unseal


def test_digest_by_hand():
    assert int(digest(jnp.array([[3, 0], [1, 2]], jnp.int32))) == 3 * 1 + 0 * 3 + 1 * 5 + 2 * 7
    assert int(digest(jnp.array([1.0], jnp.float32))) == 0x3F800000
    assert int(digest(jnp.array([-1, -1], jnp.int32))) == (0xFFFFFFFF * 4) % 2**32
    assert int(digest(jnp.int32(5))) == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_digest_any_flipped_bit(dtype):
    x = np.asarray(jnp.arange(12).reshape(3, 4) % 2, dtype=dtype)
    want = int(digest(x))
    raw = x.tobytes()
    for bit in range(1 if dtype == "bool" else 8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << (bit % 8)
        other = np.frombuffer(bytes(changed), x.dtype).reshape(x.shape)
        assert int(digest(other)) != want, bit


def test_digest_swapped_elements():
    assert int(digest(jnp.array([1, 2, 3]))) != int(digest(jnp.array([2, 1, 3])))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_digest_sharding(devices):
    x = jax.random.normal(jax.random.key(0), (16, 24))
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    for spec in (PartitionSpec("data"), PartitionSpec(None, "data")):
        assert int(digest(jax.device_put(x, NamedSharding(mesh, spec)))) == int(digest(x))


def test_named_leaves_paths():
    zero = jnp.zeros(())
    state = TrainState(params={"a": zero}, opt_state=(None, {"b": zero}), step=zero, skipped=zero)
    names = ["p.params.a", "p.opt_state.1.b", "p.step", "p.skipped"]
    assert list(named_leaves({"p": state, "critic": None})) == names


def test_named_leaves_clash():
    with pytest.raises(ValueError, match="dotted path"):
        named_leaves({"a.b": 1, "a": {"b": 2}})


def test_kind_and_describe():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert kind(x) == kind(jax.ShapeDtypeStruct(x.shape, x.dtype)) == "bfloat16[2, 3]"
    assert describe({"x": x}) == {"x": {"kind": "bfloat16[2, 3]", "digest": 0x3F80 * 36}}


def test_seal_roundtrip_and_change():
    sealed = seal({"a": (1, 2), "b": {"c": float("inf")}, 3: "é"})
    assert unseal(sealed) == {"a": [1, 2], "b": {"c": float("inf")}, "3": "é"}
    sealed["note"]["a"][0] = 2
    with pytest.raises(ValueError, match="not as it was saved"):
        unseal(sealed)
