"""Weights that nothing trains are kept in the compute dtype, and compute the same."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from jaxrlhf.config import LoraConfig
from jaxrlhf.models.load import Loader, Network
from jaxrlhf.models.transformer import Model
from jaxrlhf.run.setup import setup, start_of
from jaxrlhf.steps.score import reward, score


def dtypes(params):
    return {name: {x.dtype.name for x in jax.tree.leaves(params[name])} for name in params}


def test_frozen_weights_compute_the_same():
    model = Model(runs.DECODER, dtype="bfloat16")
    params = model.init(jax.random.key(0), head=True)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (runs.DECODER.embed,))
    params["norm"]["scale"] += 0.1 * params["head"]["kernel"]
    kept = Loader(runs.one_device()).frozen(Network(model, params)).params
    assert dtypes(kept)["layers"] == dtypes(kept)["embed"] == {"bfloat16"}
    assert dtypes(kept)["norm"] == dtypes(kept)["head"] == {"float32"}
    token_BT = np.arange(24, dtype=np.int32).reshape(3, 8) % 16
    rows = token_BT, np.ones_like(token_BT)
    for function in (score, reward):
        same = [jax.jit(function, static_argnums=0)(model, x, *rows) for x in (params, kept)]
        np.testing.assert_array_equal(*same)


def test_frozen_float32_is_what_was_read():
    params = Model(runs.DECODER).init(jax.random.key(0))
    kept = Loader(runs.one_device()).frozen(Network(Model(runs.DECODER), params)).params
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (kept, params)), strict=True))


@pytest.mark.parametrize("abstract", [True, False])
def test_reference_and_base_are_one_set_of_weights(abstract, tmp_path):
    config = runs.ppo(tmp_path)
    lora = LoraConfig(rank=2, alpha=4)
    config = replace(config, model=replace(config.model, dtype="bfloat16", lora=lora))
    mesh = runs.one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh, abstract=abstract)
    leaves = [jax.tree.leaves(x) for x in (run.frozen["policy"], run.reference.params)]
    assert all(x is y for x, y in zip(*leaves, strict=True))
    assert dtypes(run.reference.params)["layers"] == {"bfloat16"}


def test_what_is_trained_stays_float32(tmp_path):
    config = runs.ppo(tmp_path)
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    mesh = runs.one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        again = start_of(run)
    first = run.states["policy"].params
    assert {x.dtype for x in jax.tree.leaves((first, again))} == {np.dtype("float32")}
    rounded = first["layers"]["mlp"]["up"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(again["layers"]["mlp"]["up"]["kernel"], rounded)
