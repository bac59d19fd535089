"""Weights that nothing trains are kept in the compute dtype, and compute the same."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from jaxrlhf.config import LoraConfig, ModelConfig
from jaxrlhf.core.types import TrainState
from jaxrlhf.models.hf import write_hf
from jaxrlhf.models.load import Loader, Network, load_model
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.models.transformer import Model
from jaxrlhf.run.setup import setup, start_of
from jaxrlhf.steps.score import reward, score


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory, random_params):
    """A Hugging Face folder in bfloat16."""
    out = str(tmp_path_factory.mktemp("narrow") / "model")
    tokenizer = load_tokenizer(f"words:{runs.WORDS}")
    write_hf(out, runs.DECODER, random_params(runs.DECODER), tokenizer, "bfloat16")
    return out


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


@pytest.mark.parametrize(
    ("compute", "wish", "kept"),
    [
        ("float32", None, "bfloat16"),  # as the file has them
        ("bfloat16", "float32", "float32"),
    ],
)
def test_weights_of_a_file_in_bfloat16(compute, wish, kept, tmp_path, narrow_folder):
    config = runs.ppo(tmp_path)
    lora = LoraConfig(rank=2, alpha=4)
    config = replace(
        config, model=ModelConfig(narrow_folder, dtype=compute, frozen_dtype=wish, lora=lora)
    )
    mesh = runs.one_device()
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
    assert dtypes(run.frozen["policy"])["layers"] == {kept}
    assert {x.dtype for x in jax.tree.leaves(run.states)} >= {np.dtype("float32")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), run.reference.params)
    token_BT = np.arange(24, dtype=np.int32).reshape(3, 8) % 16
    rows = token_BT, np.ones_like(token_BT)
    model = run.reference.model
    same = [jax.jit(score, static_argnums=0)(model, x, *rows) for x in (wide, run.reference.params)]
    np.testing.assert_array_equal(*same)


def test_what_a_file_in_bfloat16_trains_is_float32(narrow_folder, tmp_path):
    config = runs.sft(tmp_path, model=ModelConfig(narrow_folder))
    mesh = runs.one_device()
    with jax.set_mesh(mesh):
        state = setup(config, mesh).states["policy"]
    _, params, _ = load_model(narrow_folder, mesh)
    ours = TrainState.create(params, optax.adam(1e-3))
    for found in (state.params, ours.params):
        assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, state.params, ours.params)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
