"""The embedding and its gradient, where positions start, and what remat keeps: the same loss and
gradient, from less."""

import re
from dataclasses import replace
from functools import cache, partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrlhf.config import DecoderConfig, LoraConfig, MeshConfig
from jaxrlhf.config.model import Remat
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models import layers
from jaxrlhf.models.layers import Linear, look_up, product
from jaxrlhf.models.remat import POLICIES
from jaxrlhf.models.rope import positions
from jaxrlhf.models.transformer import Model

V, D = 32, 8
TABLE = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
TOKEN = np.random.default_rng(1).integers(0, V, (4, 6))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_look_up_by_hand(dtype):
    found = look_up(V, "vocab", dtype, jnp.asarray(TABLE), jnp.asarray(TOKEN))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, jnp.asarray(TABLE[TOKEN], dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_look_up_gradient_of_a_frequent_token(dtype):
    """8,192 times 1e-3: in bfloat16 the sum would stop at 0.5."""
    token = jnp.zeros((8, 1024), jnp.int32).at[0, 0].set(3)

    def total(table):
        return (1e-3 * look_up(V, "vocab", dtype, table, token)).sum(dtype=jnp.float32)

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
            jnp.asarray(TABLE),
            lambda table: look_up(V, "vocab", "float32", table, jnp.asarray(TOKEN)),
        )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_positions_start_anew_in_each_segment():
    """Rotations only see differences of positions, so this shows in no logit of a short row."""
    segment = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]])
    real = (segment != 0).astype(jnp.int32)
    expected = [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 0]]
    np.testing.assert_array_equal(positions(real, segment), expected)
    padded = jnp.array([[0, 0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(positions(padded), [[0, 0, 0, 1, 2, 2]])


# Remat

DECODER = DecoderConfig(
    vocab=64, embed=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp=64, context=128
)
MODEL = Model(DECODER, lora=LoraConfig(rank=4, alpha=8))
ROWS = jnp.array(np.random.default_rng(0).integers(0, 64, (4, 128)), jnp.int32)


@cache
def program(remat):
    """Loss and gradient by weights and adapters, compiled, and what it is called with."""
    model = replace(MODEL, remat=remat)

    def loss(params, lora):
        hidden, _ = model.apply(params, ROWS, jnp.ones_like(ROWS), lora)
        return (model.logits(params, hidden) ** 2).mean()

    @jax.jit
    def start(key):
        lora = jax.tree.map(lambda x: x + 0.1, model.init_lora(key))
        return model.init(key), lora

    given = start(jax.random.key(0))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*given).compile(), given


@pytest.mark.parametrize("remat", ["elementwise", "dots", "full"])
def test_policies_change_no_loss_and_no_gradient(remat):
    (plain, given), (other, _) = program("none"), program(remat)
    for a, b in zip(*map(jax.tree.leaves, (plain(*given), other(*given))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_policies_keep_ever_less():
    sizes = [program(x)[0].memory_analysis().temp_size_in_bytes for x in get_args(Remat)]
    none, elementwise, dots, full = sizes
    assert elementwise < 0.7 * none
    assert dots < elementwise
    assert full < 0.7 * dots


def test_products_of_one_token_read_an_array_each():
    """Those that read the same a GPU's compiler joins, and copies their weights to do so."""
    lora = LoraConfig(2, targets=("q",))
    linear = Linear("q", {"embed": 8}, {"mlp": 4}, nnx.Rngs(0), lora)

    def read(tokens):
        eqns = jax.make_jaxpr(linear)(jnp.ones((2, tokens, 8))).jaxpr.eqns
        return [eqn.invars[0] for eqn in eqns if "custom_vjp" in eqn.primitive.name]

    product, low_rank = read(1)
    assert product is not low_rank
    product, low_rank = read(3)
    assert product is low_rank


@pytest.mark.parametrize("contract", [1, 2])
def test_a_gradient_turns_no_factor_around(contract, monkeypatch):
    """On one device; on several, whose rows are not joined, it is the same gradient."""
    sizes = ((2, 16, 24), (24, 3, 8)) if contract == 1 else ((2, 16, 3, 8), (3, 8, 24))
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=False))
    slope = jax.random.normal(keys[2], (2, 16, *w.shape[contract:]))

    def compiled():
        def gradient(x, w):  # what made the factors is turned around with them
            return jax.vjp(partial(product, contract), jnp.sin(x), w)[1](jnp.cos(slope))

        return jax.jit(gradient).lower(x, w).compile()

    one = compiled()
    monkeypatch.setattr(layers, "devices_in_mesh", lambda: 8)
    several = compiled()
    turned = [re.findall(r"= \S+ transpose\(", each.as_text()) for each in (one, several)]
    assert turned[0] == []
    assert turned[1]  # or nothing is counted
    for found, expected in zip(one(x, w), several(x, w), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_policies_are_those_of_the_config():
    assert set(POLICIES) == set(get_args(Remat))


def test_a_table_that_is_whole_is_not_cut_to_be_sent_again():
    """In a decode loop a TPU's compiler would send it in each step."""

    def cut(kept):
        table, index = jnp.zeros((64, 32), kept), jnp.zeros((8, 1), jnp.int32)
        look = partial(look_up, 64, "vocab", "bfloat16")
        return "spec=P('tensor', ('fsdp'" in str(jax.make_jaxpr(look)(table, index))

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        assert not cut("bfloat16")  # laid out for decoding
        assert cut("float32")  # rounded before it is sent
