"""The decoder: padding, causality, adapters and variants, and trees that do not fit."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import LoraConfig, MeshConfig, RopeScaling
from jaxrlhf.mesh.sharding import RULES, make_mesh, shardings
from jaxrlhf.models import transformer
from jaxrlhf.models.declared import fuse
from jaxrlhf.models.transformer import Model, merge_lora

T = 10
TOKEN = jnp.array(np.random.default_rng(0).integers(0, 300, (3, T)), jnp.int32)
FULL = jnp.ones((3, T), jnp.int32)
KEY = jax.random.key(0)
VARIANTS = {
    "qwen2 untied": {"qkv_bias": True, "tied": False},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "llama3 multi-head": {
        "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16), "rope_theta": 100.0, "kv_heads": 4,
    },
}  # fmt: skip


@partial(jax.jit, static_argnums=0)
def logits(model, params, token, mask, lora=None):
    hidden, _ = model.apply(params, token, mask, lora)
    return model.logits(params, hidden)


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: isinstance(x, tuple)
        )
    }


@pytest.mark.parametrize("changes", [{}, *VARIANTS.values()], ids=["plain", *VARIANTS])
def test_fused_layers_equal_others(changes, decoder, monkeypatch):
    """What GPUs read whose weights are split, forwards and backwards, on eight devices."""
    model, mesh = Model(replace(decoder, **changes), remat="full"), make_mesh(MeshConfig(2, 2, 2))
    slope = jax.random.normal(KEY, (4, T, decoder.embed))

    @jax.jit
    def found(params):
        def total(params):
            hidden = model.apply(params, jnp.tile(TOKEN[:2], (2, 1)), jnp.ones((4, T)))[0]
            return (hidden * slope).sum(), hidden

        return jax.grad(total, has_aux=True)(params)

    params = model.init(KEY)
    expected, seen = found(params), []
    monkeypatch.setattr(transformer, "platform", lambda: "gpu")
    monkeypatch.setattr(transformer, "fuse", lambda layer: seen.append(1) or fuse(layer))
    with jax.set_mesh(mesh):
        got = found(jax.device_put(params, shardings(model.axes(), mesh)))
    assert seen

    def close(x, y):  # float32 rounds sums by their largest terms: the gradients reach 103
        np.testing.assert_allclose(x, y, rtol=0, atol=4e-6 * np.abs(y).max())

    jax.tree.map(close, got, expected)


# Rows


def test_apply_padding_changes_nothing(model, params):
    """A row alone, padded left, padded right, and with a gap, gives the same logits."""
    alone = logits(model, params, TOKEN[:1], FULL[:1])[0]
    columns = np.stack([np.arange(T) + 4, np.arange(T), np.r_[0:6, 10 : T + 4]])
    token, mask = np.full((3, T + 4), 7, np.int32), np.zeros((3, T + 4), np.int32)
    np.put_along_axis(token, columns, np.asarray(TOKEN[:1]), axis=1)
    np.put_along_axis(mask, columns, 1, axis=1)
    padded = logits(model, params, token, mask)
    assert jnp.isfinite(padded).all()
    for row, at in enumerate(columns):
        np.testing.assert_allclose(padded[row, at], alone, atol=1e-5)


def test_apply_segments_are_rows_of_their_own(model, params):
    """Two rows in one, then padding: each token sees what it would see alone, and no more."""
    lengths = (4, 5)
    token = jnp.concatenate([TOKEN[0, :4], TOKEN[1, :5], jnp.full(3, 7)])[None]
    segment = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([*lengths, 3]))[None]
    hidden, _ = model.apply(params, token, (segment != 0).astype(jnp.int32), segment_BT=segment)
    packed, start = model.logits(params, hidden)[0], 0
    assert jnp.isfinite(packed).all()
    for row, length in enumerate(lengths):
        alone = logits(model, params, TOKEN[row : row + 1, :length], FULL[:1, :length])[0]
        np.testing.assert_allclose(packed[start : start + length], alone, atol=1e-5)
        start += length
    together = logits(model, params, token, (segment != 0).astype(jnp.int32))[0]
    assert abs(together[4:9] - packed[4:9]).max() > 1e-2  # it is the segments that do it


def test_apply_is_causal(model, params):
    before = logits(model, params, TOKEN, FULL)
    after = logits(model, params, TOKEN.at[:, 6].set(TOKEN[:, 6] + 1), FULL)
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert (jnp.abs(after[:, 6:] - before[:, 6:]).max(axis=2) > 1e-3).all()


def test_apply_tells_positions_apart(model, params):
    """Two equal tokens before it in the other order: a bag of tokens would not see it."""
    swapped = TOKEN.at[:, 1].set(TOKEN[:, 2]).at[:, 2].set(TOKEN[:, 1])
    change = logits(model, params, swapped, FULL) - logits(model, params, TOKEN, FULL)
    assert jnp.abs(change[:, 5:]).max() > 1e-3


# Variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_apply_variants(decoder, random_weights, variant):
    """Each reads every one of its weights."""
    model = Model(replace(decoder, **VARIANTS[variant]))
    params = random_weights(model.shapes(), 2)
    names = flat(params)
    assert ("layers.attention.q.bias" in names) == (variant == "qwen2 untied")
    assert ("layers.attention.q_norm.scale" in names) == (variant == "qwen3")
    assert ("unembed.kernel" in names) == (variant == "qwen2 untied")
    expected = logits(model, params, TOKEN, FULL)

    leaves, structure = jax.tree.flatten(params)
    for index, name in enumerate(names):
        other = leaves.copy()
        other[index] += jnp.linspace(-0.5, 0.5, other[index].size).reshape(other[index].shape)
        change = logits(model, structure.unflatten(other), TOKEN, FULL) - expected
        assert jnp.abs(change).max() > 1e-3, name


# Declarations


def test_init_matches_shapes_and_axes(model):
    found = {"lora": (jax.eval_shape(model.init_lora, KEY), model.lora_shapes(), model.lora_axes())}
    for head in (False, True):
        made = jax.eval_shape(partial(model.init, head=head), KEY)
        found["head" * head] = made, model.shapes(head), model.axes(head)
    for kind, (made, shapes, axes) in found.items():
        made, shapes, axes = flat(made), flat(shapes), flat(axes)
        assert made == shapes
        assert axes.keys() == shapes.keys()
        assert all(len(axes[name]) == len(shapes[name].shape) for name in axes)
        assert ("head.kernel" in axes) == (kind == "head")
        assert {x.dtype for x in shapes.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_axes_are_all_in_the_rules(decoder, variant):
    model = Model(replace(decoder, **VARIANTS[variant]), lora=LoraConfig())
    for tree in (model.axes(head=True), model.lora_axes()):
        assert {name for names in flat(tree).values() for name in names} <= RULES.keys()


def test_init_layers_and_seeds_differ(model):
    init = jax.jit(model.init, static_argnames="head")
    one, two = init(jax.random.key(0), head=True), init(jax.random.key(1), head=True)
    kernel = one["layers"]["mlp"]["up"]["kernel"]
    assert (kernel[0] != kernel[1]).all()
    assert (kernel != two["layers"]["mlp"]["up"]["kernel"]).all()
    np.testing.assert_allclose(kernel.std(), 32**-0.5, rtol=0.1)
    for leaf in jax.tree.leaves(one["head"]):
        assert (leaf == 0).all()


def test_model_is_static_and_hashable(decoder):
    assert hash(Model(decoder)) == hash(Model(replace(decoder)))
    assert Model(decoder) == Model(replace(decoder))
    assert Model(decoder) != Model(decoder, dtype="bfloat16")


# Adapters


def test_init_lora_changes_nothing(model, params):
    fresh = jax.jit(model.init_lora)(jax.random.key(5))
    assert all(jnp.abs(x).max() > 0 for name, x in flat(fresh).items() if name.endswith("lora_a"))
    np.testing.assert_array_equal(
        logits(model, params, TOKEN, FULL, fresh), logits(model, params, TOKEN, FULL)
    )


def test_merge_lora_equals_running_with_it(model, params, lora):
    merged = jax.jit(merge_lora, static_argnums=0)(model, params, lora)
    assert flat(merged).keys() == flat(params).keys()
    found = logits(model, merged, TOKEN, FULL)
    np.testing.assert_allclose(found, logits(model, params, TOKEN, FULL, lora), atol=1e-4)
    assert jnp.abs(found - logits(model, params, TOKEN, FULL)).max() > 0.1


def test_merge_lora_by_hand(model, params, lora):
    """W + (alpha/rank)·A·B, layer by layer; alpha 4 and rank 2."""
    merged = merge_lora(model, params, lora)["layers"]
    a, b = (np.asarray(lora["attention"]["o"][name], np.float64) for name in ("lora_a", "lora_b"))
    expected = params["layers"]["attention"]["o"]["kernel"] + 2 * np.einsum("lnhr,lrd->lnhd", a, b)
    np.testing.assert_allclose(merged["attention"]["o"]["kernel"], expected, atol=1e-6)
    for name in ("attention_norm", "mlp_norm"):
        assert merged[name] is params["layers"][name]


def test_lora_gradient_is_that_of_the_merged_weights(model, params, lora):
    """With respect to adapters, and to weights on both sides of them."""

    def total(weights, adapters):
        hidden, _ = model.apply(weights, TOKEN, FULL, adapters)
        return jnp.sin(model.logits(weights, hidden)).sum()

    def merged(weights, adapters):
        return total(merge_lora(model, weights, adapters), None)

    found, expected = (
        jax.jit(jax.grad(function, argnums=(0, 1)))(params, lora) for function in (total, merged)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-3), found, expected)


def test_init_lora_targets(decoder):
    model = Model(decoder, lora=LoraConfig(rank=3, targets=("q", "down")))
    shapes = {name: x.shape for name, x in flat(jax.eval_shape(model.init_lora, KEY)).items()}
    assert shapes == {
        "attention.q.lora_a": (2, 32, 3),
        "attention.q.lora_b": (2, 3, 4, 8),
        "mlp.down.lora_a": (2, 64, 3),
        "mlp.down.lora_b": (2, 3, 32),
    }


# Trees that do not fit


def without(tree, *path):
    name, *rest = path
    if rest:
        return {**tree, name: without(tree[name], *rest)}
    return {key: child for key, child in tree.items() if key != name}


def put(tree, value, *path):
    name, *rest = path
    return {**tree, name: put(tree[name], value, *rest) if rest else value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: without(p, "layers", "mlp", "up"), r"^layers\.mlp\.up is missing"),
        (lambda p: without(p, "norm"), r"^params\.norm is missing"),
        (lambda p: put(p, p["norm"], "unembed"), r"^params\.unembed is not a parameter"),
        (
            lambda p: put(p, p["norm"], "layers", "mlp", "third"),
            r"^layers\.mlp\.third is not a parameter",
        ),
        (
            lambda p: put(p, jnp.zeros((2, 32, 63)), "layers", "mlp", "up", "kernel"),
            r"up\.kernel has shape \(2, 32, 63\), .* \(2, 32, 64\)",
        ),
        (lambda p: put(p, jnp.zeros((299, 32)), "embed", "table"), r"embed\.table has shape"),
    ],
    ids=["layer", "norm", "extra", "extra in a layer", "shape in a layer", "shape"],
)
def test_apply_refuses_other_trees(model, change, message):
    shapes = change(model.shapes())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, shapes, TOKEN, FULL)


def test_apply_refuses_other_adapters(model):
    lora = jax.eval_shape(model.init_lora, KEY)
    with pytest.raises(ValueError, match=r"layers\.mlp\.up\.lora_a is missing"):
        jax.eval_shape(model.apply, model.shapes(), TOKEN, FULL, without(lora, "mlp", "up"))
    other = Model(model.decoder, lora=LoraConfig(rank=3))
    with pytest.raises(ValueError, match=r"lora_a has shape .*, 2\), the model declares .*, 3\)"):
        jax.eval_shape(other.apply, model.shapes(), TOKEN, FULL, lora)


def test_scalar_needs_a_head(model):
    with pytest.raises(ValueError, match="params hold no 'head'"):
        jax.eval_shape(model.scalar, model.shapes(), jnp.zeros((3, 32)))
