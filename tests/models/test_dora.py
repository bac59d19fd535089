"""DoRA: magnitudes by hand, through every way that adapters go, and slopes that spare the norm."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import FULL, KEY, TOKEN, flat, logits

from jaxrlhf.config import LoraConfig, MeshConfig, SampleConfig
from jaxrlhf.mesh.sharding import make_mesh, shardings
from jaxrlhf.models.decode import lay_out
from jaxrlhf.models.dora import with_gains
from jaxrlhf.models.quantise import quantised
from jaxrlhf.models.transformer import Model, merge_lora
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import decays


@pytest.fixture(scope="module")
def dora(decoder):
    return Model(decoder, lora=LoraConfig(2, 4.0, ("q", "o", "down"), dora=True))


@pytest.fixture(scope="module")
def weights(dora, random_weights):
    return random_weights(dora.shapes(), 0)


@pytest.fixture(scope="module")
def turned(dora, weights, random_weights):
    """Adapters that turn outputs, and lengthen or shorten them."""
    fresh = jax.jit(dora.init_lora)(KEY, weights)
    noise = random_weights(dora.lora_shapes(), 1)
    return jax.tree.map(lambda x, y: x + y, fresh, noise)


def test_fresh_magnitudes_are_norms_and_change_nothing(dora, weights):
    fresh = jax.jit(dora.init_lora)(KEY, weights)
    kernel = np.asarray(weights["layers"]["attention"]["o"]["kernel"], np.float64)
    found = fresh["attention"]["o"]["lora_magnitude"]
    np.testing.assert_allclose(found, np.sqrt((kernel**2).sum((1, 2))), rtol=1e-6)
    assert fresh["attention"]["q"]["lora_magnitude"].shape == (2, 4, 8)
    plain = logits(dora, weights, TOKEN, FULL)
    np.testing.assert_allclose(logits(dora, weights, TOKEN, FULL, fresh), plain, atol=1e-5)
    with pytest.raises(ValueError, match="DoRA's magnitudes are the norms of weights"):
        dora.init_lora(KEY)


def test_merged_weights_by_hand(dora, weights, turned):
    """m · (W + 2·A·B) / ‖W + 2·A·B‖ of each output, and the same as running with it."""
    merged = jax.jit(merge_lora, static_argnums=0)(dora, weights, turned)
    w = np.asarray(weights["layers"]["attention"]["q"]["kernel"], np.float64)
    a, b, m = (np.asarray(turned["attention"]["q"][f"lora_{x}"]) for x in ("a", "b", "magnitude"))
    w = w + 2 * np.einsum("ldr,lrnh->ldnh", a, b)
    expected = m[:, None] * w / np.sqrt((w**2).sum(1, keepdims=True))
    np.testing.assert_allclose(merged["layers"]["attention"]["q"]["kernel"], expected, atol=1e-5)
    found = logits(dora, weights, TOKEN, FULL, turned)
    np.testing.assert_allclose(found, logits(dora, merged, TOKEN, FULL), atol=1e-4)
    assert np.abs(found - logits(dora, weights, TOKEN, FULL)).max() > 0.1


def test_the_sampler_says_what_scoring_says(decoder, random_weights):
    """Gains are computed when weights are laid out; here over a quantised base."""
    wide = replace(decoder, embed=64, head_dim=16)
    model = Model(wide, lora=LoraConfig(2, 4.0, ("v", "up"), dora=True))
    params = quantised(random_weights(model.shapes(), 0), "nf4")
    lora = jax.jit(model.init_lora)(KEY, params)
    lora = jax.tree.map(lambda x, y: x + y, lora, random_weights(model.lora_shapes(), 1))
    draw = jax.jit(partial(sample, model, sample_config=SampleConfig(max_new_tokens=5)))
    rows = {"prompt_QP": TOKEN[:, :5], "prompt_mask_QP": FULL[:, :5], "key": KEY}
    found = draw(params=params, lora=lora, **rows)
    logp_BT = score(model, params, found.token_BT, found.attention_mask_BT, lora=lora)
    np.testing.assert_allclose(found.logp_BT, logp_BT * found.mask_BT, atol=1e-4)


def test_the_slope_takes_the_norm_for_a_constant(dora, weights, turned):
    def total(lora, norm_moves):
        tree = dict(weights["layers"]["mlp"]["down"], **lora)
        one = jax.tree.map(lambda x: x[0], tree)
        if norm_moves:
            w = one["kernel"] + 2 * one["lora_a"] @ one["lora_b"]
            return (one["lora_magnitude"] / jnp.linalg.norm(w, axis=0)).sum()
        return with_gains(2.0, one)["lora_magnitude"].sum()

    lora = turned["mlp"]["down"]
    found, through = (jax.grad(total)(lora, moves) for moves in (False, True))
    np.testing.assert_allclose(found["lora_magnitude"], through["lora_magnitude"], rtol=1e-5)
    for half in ("lora_a", "lora_b"):
        assert not np.any(found[half])
        assert np.any(through[half])


def test_magnitudes_stay_float32_and_do_not_decay(dora, weights, turned):
    narrow = replace(dora, dtype="bfloat16")
    longer = jax.tree.map(lambda x: x, turned)
    longer["attention"]["q"]["lora_magnitude"] *= 1.001
    q, other = (
        lay_out(narrow, weights, lora).layers[0]["attention"]["q"] for lora in (turned, longer)
    )
    assert (q["kernel"].dtype, q["lora_magnitude"].dtype) == ("bfloat16", "float32")
    ratio = other["lora_magnitude"] / q["lora_magnitude"]
    np.testing.assert_allclose(ratio, 1.001, rtol=1e-5)
    decay = flat(decays(turned))
    assert {name for name, x in decay.items() if not x} == {
        name for name in decay if name.endswith("magnitude")
    }


def test_on_a_mesh_it_is_the_same(dora, weights, turned):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    laid = jax.device_put(weights, shardings(dora.axes(), mesh))
    lora = jax.device_put(turned, shardings(dora.lora_axes(), mesh))
    with jax.set_mesh(mesh):
        found = logits(dora, laid, TOKEN, FULL, lora)
    np.testing.assert_allclose(found, logits(dora, weights, TOKEN, FULL, turned), atol=1e-4)


@pytest.mark.parametrize("remat", ["elementwise", "dots"])
def test_a_gradient_keeps_no_product_of_adapters(dora, weights, turned, remat):
    """It is as large as the weight, and the norm made of it is a number an output."""

    def stacked(remat):
        network = replace(dora, remat=remat)
        slope = jax.grad(lambda lora: score(network, weights, TOKEN, FULL, lora=lora).sum())
        shape = weights["layers"]["mlp"]["down"]["kernel"].shape
        return str(jax.make_jaxpr(slope)(turned)).count(f"f32[{','.join(map(str, shape))}]")

    assert 0 < stacked(remat) <= stacked("none")
