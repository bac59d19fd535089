"""Remat: the same loss and gradient, from less that is kept."""

from dataclasses import replace
from functools import cache
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.config.model import Remat
from jaxrlhf.models.layers import POLICIES
from jaxrlhf.models.transformer import Model

DECODER = DecoderConfig(
    vocab=64, embed=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp=64, context=128
)
MODEL = Model(DECODER, lora=LoraConfig(rank=4, alpha=8))
TOKEN = jnp.array(np.random.default_rng(0).integers(0, 64, (4, 128)), jnp.int32)


@cache
def program(remat):
    """Loss and gradient by weights and adapters, compiled, and what it is called with."""
    model = replace(MODEL, remat=remat)

    def loss(params, lora):
        hidden, _ = model.apply(params, TOKEN, jnp.ones_like(TOKEN), lora)
        return (model.logits(params, hidden) ** 2).mean()

    @jax.jit
    def start(key):
        lora = jax.tree.map(lambda x: x + 0.1, model.init_lora(key))
        return model.init(key), lora

    given = start(jax.random.key(0))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*given).compile(), given


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_policies_change_no_loss_and_no_gradient(remat):
    (plain, given), (other, _) = program("none"), program(remat)
    for a, b in zip(*map(jax.tree.leaves, (plain(*given), other(*given))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_policies_keep_ever_less():
    sizes = [program(x)[0].memory_analysis().temp_size_in_bytes for x in get_args(Remat)]
    none, dots, full = sizes
    assert dots < 0.7 * none
    assert full < 0.7 * dots


def test_policies_are_those_of_the_config():
    assert set(POLICIES) == set(get_args(Remat))
