"""A token at a time is the same as all at once: of each family, with adapters, on meshes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import FULL, TOKEN, VARIANTS, logits

from jaxrlhf.config import MeshConfig
from jaxrlhf.mesh.sharding import DECODE, make_mesh, shardings
from jaxrlhf.models import decode
from jaxrlhf.models.cache import empty_cache, slots_of
from jaxrlhf.models.decode import (
    axes,
    decode_layout,
    fused,
    lay_out,
    lay_out_soon,
    read_prompts,
    step,
)
from jaxrlhf.models.rope import angle_tables
from jaxrlhf.models.transformer import Model
from jaxrlhf.models.turned import Turned

P, NEW, SAMPLES = 4, 5, 2
GEMMA = {"activation": "gelu", "norm_offset": True, "embed_multiplier": 32**0.5}
MASK = FULL.at[1, :3].set(0)  # a prompt of one token
MORE = jnp.array(np.random.default_rng(5).integers(0, 300, (3 * SAMPLES, NEW)), jnp.int32)


@partial(jax.jit, static_argnames=("model", "kind", "prepared"))
def stepwise(model, params, lora=None, kind="float32", prepared=True):
    """Logits of the prompts' last tokens and of the new ones, two continuations a prompt."""
    tables = angle_tables(P + NEW, model.decoder) if prepared else None
    weights = lay_out(model, params, lora)
    hidden, prompts = read_prompts(model, params, TOKEN[:, :P], MASK[:, :P], lora, kind=kind)
    found = [jnp.repeat(hidden, SAMPLES, axis=0)]
    cache = empty_cache(model.decoder, kind, 3 * SAMPLES, NEW)  # three slots are never used
    assert cache[0][0].x.shape[2] == slots_of(NEW) == 8
    for at in range(NEW):
        given = cache, MORE[:, at], jnp.array(at), tables
        hidden, cache, _ = step(model, weights, prompts, *given)
        found.append(hidden)
    return model.logits(weights.outer, jnp.stack(found, axis=1))


def whole(model, params, lora=None):
    rows = [jnp.repeat(x[:, :P], SAMPLES, axis=0) for x in (TOKEN, MASK)]
    token = jnp.concatenate([rows[0], MORE], axis=1)
    mask = jnp.concatenate([rows[1], jnp.ones_like(MORE)], axis=1)
    return logits(model, params, token, mask, lora)[:, P - 1 :]


@pytest.mark.parametrize("variant", [*VARIANTS, "gemma"])
def test_step_equals_the_whole_row(decoder, random_weights, variant):
    model = Model(replace(decoder, **(VARIANTS | {"gemma": GEMMA})[variant]))
    params = random_weights(model.shapes(), 2)
    np.testing.assert_allclose(stepwise(model, params), whole(model, params), atol=2e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "lora"])
def test_step_equals_the_whole_row_with_adapters(model, params, lora, adapted):
    lora = lora if adapted else None
    expected = whole(model, params, lora)
    np.testing.assert_allclose(stepwise(model, params, lora), expected, atol=2e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "lora"])
def test_lay_out_is_what_it_declares(model, params, lora, adapted):
    """Shapes and axes of every array, in the compute dtype but for norm and head."""
    model = Model(model.decoder, "bfloat16", model.lora)
    lora = lora if adapted else None
    weights = jax.eval_shape(lambda params, lora: lay_out(model, params, lora), params, lora)
    names = axes(model, weights)
    ranks = jax.tree.map(lambda x, axes: len(axes) == x.ndim, weights, names)
    assert all(jax.tree.leaves(ranks))
    if not adapted:
        shapes = partial(jax.tree.map, lambda x: x.shape, is_leaf=lambda x: isinstance(x, Turned))
        assert shapes(weights.layers[0]) == shapes(fused(model.decoder).shapes)
    wide = {name for name, x in weights.outer.items() if jax.tree.leaves(x)[0].dtype == "float32"}
    assert wide == {"norm", "head"}
    assert {x.dtype for x in jax.tree.leaves(weights.layers)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("turned", [False, True])
def test_joining_turns_no_weight_around(model, params, turned, monkeypatch):
    """Beside those that CPUs are to read turned: of a weight that is, GPUs keep more copies."""
    monkeypatch.setattr(decode, "turns", lambda: turned)
    text = str(jax.make_jaxpr(lambda x: lay_out(model, x))(params))
    assert text.count("concatenate[") >= model.decoder.layers
    assert text.count("transpose[") == turned * 7 * model.decoder.layers


def test_lay_out_gathers_over_all_but_tensor(model, params):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    where = decode_layout(model, mesh, jax.eval_shape(partial(lay_out, model), params))
    with jax.set_mesh(mesh):
        laid = jax.device_put(params, shardings(model.axes("head" in params), mesh))
        weights = jax.jit(partial(lay_out, model), out_shardings=where)(laid)
    kernel = weights.layers[0]["attention"]["qkv"]["kernel"]
    c = model.decoder
    group = c.heads // c.kv_heads + 2
    assert kernel.shape == (c.embed, c.kv_heads, group, c.head_dim)
    share = kernel.x.sharding.shard_shape(kernel.x.shape)
    assert share == (c.kv_heads // 2, group, c.head_dim, c.embed)
    assert DECODE["group"] is DECODE["pair"] is None


@pytest.mark.parametrize("changes", [{}, {"windows": (3, 0), "window_rope_theta": 50.0}])
def test_step_over_tables_is_step_without(decoder, random_weights, changes):
    """Layers of two kinds have tables of their own."""
    model = Model(replace(decoder, **changes))
    params = random_weights(model.shapes(), 2)
    expected = whole(model, params)
    for prepared in (True, False):
        found = stepwise(model, params, prepared=prepared)
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("rows", [3, 1])
def test_a_step_copies_no_cache(decoder, random_weights, rows, kv_heads):
    """As a CPU's compiler has it, a token is written where it lies: also of one row or head."""
    model = Model(replace(decoder, kv_heads=kv_heads))
    params = random_weights(model.shapes(), 2)
    weights = lay_out(model, params)
    _, prompts = read_prompts(model, params, TOKEN[:rows, :P], MASK[:rows, :P])
    cache = empty_cache(model.decoder, "float32", rows, 40)
    call = jax.jit(partial(step, model), donate_argnums=2)
    text = call.lower(weights, prompts, cache, TOKEN[:rows, P], 5).compile().as_text()
    shape = f"40,{model.decoder.head_dim}]"
    assert shape in text
    assert not [x for x in text.splitlines() if " copy(" in x and shape in x.split(" copy(")[0]]


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_step_over_smaller_caches_is_close(decoder, random_weights, kind, most):
    """Kept in fewer bits, keys and values change logits of a spread of some units by little."""
    model = Model(decoder)
    params = random_weights(model.shapes(), 2)
    expected = stepwise(model, params)
    change = np.abs(stepwise(model, params, kind=kind) - expected)
    assert 1e-4 < change.max() < most * np.std(expected)


def test_lay_out_soon_is_lay_out(model, params):
    """A layer a call; on several devices in one program."""
    model = replace(model, lora=None)
    wanted = jax.tree.map(np.asarray, jax.jit(partial(lay_out, model))(params))
    jax.tree.map(np.testing.assert_array_equal, lay_out_soon(model, params), wanted)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        laid = jax.device_put(params, shardings(model.axes(head=True), mesh))
        jax.tree.map(np.testing.assert_array_equal, lay_out_soon(model, laid), wanted)
