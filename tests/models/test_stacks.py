"""Layers of several shapes: which stack each lies in, the loop over all, and who counts or changes
them: adapters, few bits, plans."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from jaxrlhf.config import DecoderConfig, LoraConfig, MeshConfig
from jaxrlhf.config.model import MoeConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models import kernels, names
from jaxrlhf.models.cache import empty_cache, opened
from jaxrlhf.models.declared import fused
from jaxrlhf.models.decode import axes, lay_out, lay_out_soon, read_prompts, step
from jaxrlhf.models.kernels import choose_each
from jaxrlhf.models.quantise import KERNELS, is_quantised, quantised
from jaxrlhf.models.replay import joined
from jaxrlhf.models.rope import layers_of
from jaxrlhf.models.stacks import Pass, caches, passes, places, stacks
from jaxrlhf.models.transformer import Model, merge_lora
from jaxrlhf.models.turned import Turned
from jaxrlhf.models.walk import in_order, walk
from jaxrlhf.run.speed import decode_bytes, forward_flops, matrices
from jaxrlhf.steps.score import score

TWO = DecoderConfig(
    vocab=48, embed=32, layers=7, heads=4, kv_heads=2, head_dim=8, mlp=40, context=64,
    windows=(6, 6, 0), full_head_dim=16, full_kv_heads=1, keys_are_values=True, qk_norm=True,
    value_norm=True, layer_scale=True, window_rope_theta=50.0, norms="both", family="gemma4_text",
)  # fmt: skip
"""Full layers are numbers 2 and 5."""
SHARED = replace(
    TWO, layers=9, shared_kv_layers=4, shared_mlp=56, layer_embed=12, keys_are_values=False
)
"""Layers 5 to 8: full, two with a window, full; they look at those of numbers 2 and 4."""
EXPERTS = replace(TWO, mlp=24, moe=MoeConfig(4, 2, beside=40))
LORA = LoraConfig(rank=2, alpha=1.0)
TOKEN = jnp.array(np.random.default_rng(0).integers(0, 48, (3, 12)))
MASK = jnp.array([[1] * 12, [0] * 4 + [1] * 8, [0] * 2 + [1] * 10])


SHAPES = {"two": TWO, "shared": SHARED, "experts": EXPERTS}


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    return Model(SHAPES[request.param], lora=LORA)


@pytest.fixture(scope="module")
def params(model, random_params):
    """Random, scales around 1, so that no layer makes next to nothing of its input."""

    def leaf(path, x):
        return jnp.asarray(x + 1 if "scale" in str(path[-1]) else x)

    return jax.tree_util.tree_map_with_path(leaf, random_params(model.decoder))


def moved(model, params):
    """Adapters that change something."""
    fresh = model.init_lora(jax.random.key(1), params)

    def leaf(path, x):
        noise = jax.random.normal(jax.random.key(2), x.shape)
        return x * (1 + 0.2 * noise) if "magnitude" in str(path) else 0.3 * noise

    return jax.tree_util.tree_map_with_path(leaf, fresh)


@pytest.fixture(scope="module")
def lora(model, params):
    return moved(model, params)


def pattern(text):
    """w with a window, f without."""
    windows = tuple(6 * (kind == "w") for kind in text)
    return replace(TWO, layers=len(text), windows=windows)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("wwwwwf" * 10, [([("window", 5), ("full", 1)], 10)]),
        ("wwf" * 2 + "ff", [([("window", 2), ("full", 1)], 2), ([("full", 2)], 1)]),
        ("wwf" * 2 + "ww", [([("window", 2), ("full", 1)], 2), ([("window", 2)], 1)]),
        ("wfwf", [([("window", 1), ("full", 1)], 2)]),
        ("fwwf", [([("full", 1)], 1), ([("window", 2)], 1), ([("full", 1)], 1)]),
        ("wwww", [([("", 4)], 1)]),
        ("ffff", [([("", 4)], 1)]),
    ],
)
def test_passes_tell_the_layers_by_what_repeats(text, found):
    c = pattern(text)
    every = [
        name for runs, times in passes(c) for name, count in runs * times for _ in range(count)
    ]
    assert every == [stack.name for stack, _ in places(c)]
    assert len(every) == len(text)
    if text != "fwwf":  # of which there are several as short
        assert passes(c) == tuple(Pass(tuple(runs), times) for runs, times in found)


def test_each_stack_is_a_decoder_of_its_own():
    near, full = stacks(TWO)
    assert (near.name, near.layers, near.path) == ("window", (0, 1, 3, 4, 6), "layers/window/")
    assert (full.name, full.layers) == ("full", (2, 5))
    assert (near.decoder.head_dim, near.decoder.kv_heads) == (8, 2)
    assert (full.decoder.head_dim, full.decoder.kv_heads) == (16, 1)
    assert [s.decoder.keys_are_values for s in stacks(TWO)] == [False, True]
    assert stacks(full.decoder) == (full._replace(name="", layers=(0, 1)),)
    assert [kind.head_dim for kind in layers_of(TWO)] == [8, 8, 16, 8, 8, 16, 8]
    plain = DecoderConfig(vocab=9, embed=8, layers=2, heads=1, kv_heads=1, head_dim=8, mlp=8)
    assert stacks(plain)[0].decoder is plain


def test_layers_that_share_look_at_the_last_of_their_kind():
    found = {stack.name: stack for stack in stacks(SHARED)}
    assert list(found) == ["window", "full", "full_shared", "window_shared"]
    assert found["full_shared"].layers == (5, 8)
    assert found["window_shared"].reads == "window"
    assert [s.decoder.mlp for s in found.values()] == [40, 40, 56, 56]
    assert caches(SHARED) == (0, 1, 2, 3, 4, 2, 4, 4, 2)
    assert caches(TWO) == tuple(range(7))


def test_what_routers_do_is_in_the_order_of_the_layers(random_params):
    """Their sums, and the experts that tokens took, which are taken again."""
    params = jax.tree.map(jnp.asarray, random_params(EXPERTS))
    model = Model(EXPERTS)
    _, sums = model.apply(params, TOKEN, MASK, routers=True)
    first, kept = model.apply(params, TOKEN, MASK, keep=True)
    count_LE = np.stack([(np.bincount(x[MASK != 0].ravel(), minlength=4)) for x in kept.expert])
    np.testing.assert_array_equal(sums.chosen_LE, count_LE)
    again, _ = model.apply(params, TOKEN, MASK, expert_BTM=joined(kept.expert))
    np.testing.assert_allclose(again, first, atol=1e-6)
    full = jnp.full_like(kept.expert, 0).at[..., 1].set(1)
    forced, same = model.apply(params, TOKEN, MASK, keep=True, expert_BTM=joined(full))
    np.testing.assert_array_equal(same.expert, full)
    assert np.abs(forced - first).max() > 0.1


def test_walk_takes_the_layers_in_their_order():
    """Each notes its number, and what it was given."""

    def body(stack, carry, item):
        return carry + 1, (carry, item)

    items = {stack.name: jnp.array(stack.layers) for stack in stacks(TWO)}
    bodies = {stack.name: partial(body, stack) for stack in stacks(TWO)}
    last, left = walk(TWO, bodies, jnp.array(0), items)
    assert last == TWO.layers
    for stack in stacks(TWO):
        np.testing.assert_array_equal(left[stack.name], [stack.layers, stack.layers])
    carried, given = in_order(TWO, left)
    np.testing.assert_array_equal(carried, range(TWO.layers))
    np.testing.assert_array_equal(given, range(TWO.layers))


def test_what_is_compiled_does_not_grow_with_depth():
    def products(periods):
        model = Model(pattern("wwf" * periods))
        slope = jax.grad(lambda params: model.apply(params, TOKEN, MASK)[0].sum())
        return jax.jit(slope).lower(model.shapes()).as_text().count("dot_general")

    assert products(2) == products(5)


def test_trees_are_what_is_declared(model, params, lora):
    """Weights, adapters, axes, names in files, and what decoding reads."""
    shapes = partial(jax.tree.map, lambda x: x.shape, is_leaf=lambda x: isinstance(x, Turned))
    assert shapes(model.init(jax.random.key(0))) == shapes(model.shapes()) == shapes(params)
    assert shapes(lora) == shapes(model.lora_shapes())
    none_of_v = {"q", "k", "o"} if model.decoder.keys_are_values else {"q", "k", "v", "o"}
    assert set(lora["full"]["attention"]) == none_of_v
    for found, wanted in ((model.axes(), model.shapes()), (model.lora_axes(), lora)):
        ranks = jax.tree.map(lambda x, names: x.ndim == len(names), wanted, found)
        assert all(jax.tree.leaves(ranks))
    names.flatten(model.decoder, params)
    weights = jax.eval_shape(partial(lay_out, model), params)
    for (stack, _), layer in zip(places(model.decoder), weights.layers, strict=True):
        assert shapes(layer) == shapes(fused(stack.decoder).shapes)
    ranks = jax.tree.map(lambda x, names: x.ndim == len(names), weights, axes(model, weights))
    assert all(jax.tree.leaves(ranks))
    cache = empty_cache(model.decoder, "float32", 3, 9)
    own = [(1, 16) if layer in (2, 5) else (2, 8) for layer in range(7)]
    own = own[:5] if model.decoder.shared_kv_layers else own
    for (heads, width), layer in zip(own, cache, strict=True):
        slots = 16 if width == 16 else 8  # a ring of its window of 6
        shape = 3, heads, slots, width
        assert [x.shape for x in jax.tree.leaves(opened(layer, heads))] == [shape, shape]
    soon = lay_out_soon(model, params)
    jax.tree.map(np.testing.assert_array_equal, soon, jax.jit(partial(lay_out, model))(params))


def stepwise(model, params, lora=None):
    """Hidden states of the last seven tokens, one after the other."""
    weights = lay_out(model, params, lora)
    hidden, prompts = read_prompts(model, params, TOKEN[:, :5], MASK[:, :5], lora)
    cache, found = empty_cache(model.decoder, "float32", 3, 7), [hidden]
    run = jax.jit(lambda cache, token, at: step(model, weights, prompts, cache, token, at))
    for at in range(7):
        hidden, cache, _ = run(cache, TOKEN[:, 5 + at], jnp.array(at))
        found.append(hidden)
    return jnp.stack(found, 1)


@pytest.mark.parametrize(
    ("model", "dora"),
    [("two", False), ("two", True), ("shared", False), ("experts", False)],
    indirect=["model"],
)
def test_adapters_of_each_stack(dora, model, params):
    """Beside the weights, merged into them, and a token at a time."""
    model = replace(model, lora=replace(LORA, dora=dora))
    lora = moved(model, params)
    plain = score(model, params, TOKEN, MASK)
    found = score(model, params, TOKEN, MASK, lora=lora)
    assert np.abs(found - plain).max() > 0.1
    merged = merge_lora(model, params, lora)
    np.testing.assert_allclose(score(model, merged, TOKEN, MASK), found, atol=1e-4)
    whole, _ = model.apply(params, TOKEN, MASK, lora)
    np.testing.assert_allclose(stepwise(model, params, lora), whole[:, 4:], atol=2e-5)


@pytest.mark.parametrize(
    ("model", "kind"),
    [("two", "int8"), ("two", "nf4"), ("shared", "int8"), ("experts", "int8")],
    indirect=["model"],
)
def test_few_bits_of_each_stack(kind, model, params, lora):
    """Under adapters: what the levels stand for is what is computed with, whole and by steps."""
    small = quantised(params, kind)
    mapped = [path.split("/")[-2] for path, _ in names.leaves_of(params) if "kernel" in path]
    count = sum(name in KERNELS for name in mapped)
    assert sum(map(is_quantised, jax.tree.leaves(small, is_leaf=is_quantised))) == count
    restored = jax.tree.map(
        lambda x: qwix.dequantize(x) if is_quantised(x) else x, small, is_leaf=is_quantised
    )
    expected = score(model, restored, TOKEN, MASK, lora=lora)
    np.testing.assert_allclose(score(model, small, TOKEN, MASK, lora=lora), expected, atol=2e-5)
    by_steps = stepwise(model, restored, lora)
    np.testing.assert_allclose(stepwise(model, small, lora), by_steps, atol=2e-5)


def test_matrices_are_all_kernels(model, params):
    """Of four experts a token takes two."""
    sizes = {path: x.size for path, x in names.leaves_of(params) if path.endswith("kernel")}
    experts = sum(x for path, x in sizes.items() if "/experts/" in path and "router" not in path)
    assert matrices(model.decoder, vocab=False) == sum(sizes.values()) - experts // 2
    assert matrices(model.decoder) - matrices(model.decoder, vocab=False) == 32 * 48


def test_caches_are_counted_by_shape():
    """By hand: of seven layers five have heads of 8, two of 16 and no values of their own."""
    alone = Model(TWO)
    seen = forward_flops(alone, 20.0) - 2 * matrices(TWO)
    assert seen == 4 * 4 * (5 * 8 * 6 + 2 * 16 * 20)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert decode_bytes(alone, mesh, "int8", 0, 1.0) == 2 * (5 * 2 * (8 + 4) + 2 * 1 * (16 + 4))


H100, V5E = "NVIDIA H100 80GB HBM3", "TPU v5 lite"


@pytest.mark.parametrize(
    ("kind", "sizes", "found"),
    [
        (H100, (128, 512), ["cudnn", "pieces"]),
        (H100, (256, 512), ["pieces", "pieces"]),
        (V5E, (256, 512), ["splash", "splash"]),
        (V5E, (40, 512), ["pieces", "splash"]),
    ],
)
def test_kernels_are_chosen_by_shape(kind, sizes, found, monkeypatch):
    """One that is asked for is taken where heads fit, and refused where none does."""
    monkeypatch.setattr(kernels, "device_kind", lambda: kind)
    c = replace(TWO, head_dim=sizes[0], full_head_dim=sizes[1])
    chosen = choose_each("auto", c, "bfloat16", packed=False)
    assert list(chosen.values()) == found
    wanted = "cudnn" if kind == H100 else "splash"
    if wanted in found:
        assert choose_each(wanted, c, "bfloat16", packed=False) == chosen
    else:
        with pytest.raises(InputError, match=re.escape(f"model.attention={wanted}: heads are of")):
            choose_each(wanted, c, "bfloat16", packed=False)
    assert set(choose_each("pieces", c, "bfloat16", packed=False).values()) == {"pieces"}
