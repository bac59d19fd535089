"""Frozen weights in few bits: near what they were, computed as what they stand for, trained on."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import runs
from jax.sharding import NamedSharding, PartitionSpec
from test_transformer import FULL, TOKEN

from jaxrlhf.config import DecoderConfig, LoraConfig, MeshConfig, ModelConfig, SampleConfig
from jaxrlhf.config.model import MoeConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh, shardings
from jaxrlhf.models.decode import decode_layout, lay_out
from jaxrlhf.models.hf import write_hf
from jaxrlhf.models.layers import product
from jaxrlhf.models.load import Loader
from jaxrlhf.models.quantise import KERNELS, behind, is_quantised, quantised
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import score
from jaxrlhf.study.plan.hlo import parse

WIDE = DecoderConfig(
    vocab=300, embed=128, layers=2, heads=4, kv_heads=2, head_dim=64, mlp=192, context=64
)
LORA = LoraConfig(rank=4, targets=("q", "v", "down"))
ERROR = {"int8": 0.0075, "nf4": 0.11}
"""Root mean square of what a weight loses, of its own: for int8 a step of 2.7σ/127.5, which
the largest of 128 is about, over √12."""


@pytest.fixture(scope="module")
def model():
    return Model(WIDE, lora=LORA)


@pytest.fixture(scope="module")
def weights(model):
    return model.init(jax.random.key(0))


def restored(params):
    """The weights that the levels and scales stand for, float32."""
    return jax.tree.map(
        lambda x: qwix.dequantize(x) if is_quantised(x) else x, params, is_leaf=is_quantised
    )


@pytest.mark.parametrize("kind", ERROR)
def test_quantised_weights_are_near_and_few(weights, kind):
    small = quantised(weights, kind)
    for name in KERNELS:
        part = "attention" if name in "qkvo" else "mlp"
        before, after = (x["layers"][part][name]["kernel"] for x in (weights, small))
        lost = np.asarray(qwix.dequantize(after) - before)
        assert 0.3 * ERROR[kind] < np.sqrt((lost**2).mean() / (before**2).mean()) < ERROR[kind]
        assert after.qvalue.dtype == {"int8": jnp.int8, "nf4": jnp.uint4}[kind]
        scales = before.size / (np.prod(before.shape[1:3]) if name == "o" else before.shape[1])
        assert after.scale.size == (scales if kind == "int8" else before.size / 64)
    assert small["embed"] is weights["embed"]


@pytest.mark.parametrize("kind", ERROR)
def test_steps_compute_with_what_the_levels_stand_for(model, weights, kind):
    """Log-probs, what is drawn, and the adapters' gradients are those of the restored weights."""
    small = quantised(weights, kind)
    lora = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(1), x.shape),
        model.init_lora(jax.random.key(2)),
    )

    def total(lora, params):
        logp = score(model, params, TOKEN, FULL, lora=lora)
        return logp.sum(), logp

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    for found, expected in zip(
        jax.tree.leaves(run(lora, small)), jax.tree.leaves(run(lora, restored(small))), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    draw = partial(sample, model, lora=lora, sample_config=SampleConfig(max_new_tokens=4))
    rows = {"prompt_QP": TOKEN[:, :5], "prompt_mask_QP": FULL[:, :5], "key": jax.random.key(0)}
    found, expected = (jax.jit(draw)(params=x, **rows) for x in (small, restored(small)))
    np.testing.assert_array_equal(found.token_BT, expected.token_BT)
    assert np.abs(total(lora, weights)[1] - total(lora, small)[1]).max() > 1e-4  # it is not nothing


def test_a_gradient_keeps_no_weights(model, weights):
    """Of quantised layers nothing of a weight's size waits for the backward pass."""
    small = jax.tree.map(jnp.asarray, quantised(weights, "int8"))
    lora = model.init_lora(jax.random.key(0))

    def total(lora, params):
        return score(model, params, TOKEN, FULL, lora=lora).sum()

    def stacked(params):
        text = str(jax.make_jaxpr(jax.grad(total))(lora, params))
        return text.count("f32[2,128,192]")

    assert stacked(weights) > 0
    assert stacked(small) == 0


def test_a_gradient_keeps_no_experts(weights):
    """Of quantised experts neither, without remat; on a mesh of experts the same slopes."""
    decoder = replace(WIDE, mlp=128, moe=MoeConfig(experts=4, per_token=2))
    mixture = Model(decoder, lora=LoraConfig(2, targets=("q", "v")), remat="none")
    plain = mixture.init(jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.1, mixture.init_lora(jax.random.key(1)))

    def total(lora, params):
        return score(mixture, params, TOKEN[:2, :6], FULL[:2, :6], lora=lora).sum()

    small = quantised(plain, "nf4")
    found, without = (str(jax.make_jaxpr(jax.grad(total))(lora, x)) for x in (small, plain))
    assert "f32[2,4,128,128]" in without
    assert "f32[2,4,128,128]" not in found
    expected = jax.jit(jax.grad(total))(lora, restored(small))
    mesh = make_mesh(MeshConfig(expert=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):  # of two tiles of 64 hidden inputs each device has one
        given = jax.device_put((lora, small), NamedSharding(mesh, PartitionSpec()))
        slopes = jax.jit(jax.grad(total))(*given)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), slopes, expected)


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
def test_loader_keeps_frozen_weights_in_few_bits_on_a_mesh(abstract):
    """Once for all that share them, laid out as the weights are."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    loader = Loader(mesh, abstract=abstract, frozen_dtype="nf4")
    base = loader.base(ModelConfig(decoder=WIDE))
    first, second = loader.frozen(base).params, loader.frozen(base).params
    kernel = first["layers"]["mlp"]["up"]["kernel"]
    assert kernel is second["layers"]["mlp"]["up"]["kernel"]
    assert kernel.qvalue.sharding.shard_shape(kernel.qvalue.shape) == (2, 64, 96)
    assert kernel.scale.sharding.shard_shape(kernel.scale.shape) == (2, 1, 96)
    assert kernel.shape == (2, 128, 192)


def test_what_does_not_divide_is_refused(weights):
    narrow = Model(replace(WIDE, embed=96)).init(jax.random.key(0))
    with pytest.raises(InputError, match=r"frozen_dtype=nf4: k has 96 inputs, no multiple of 64"):
        quantised(narrow, "nf4")
    assert quantised(narrow, "int8")


@pytest.mark.parametrize(("kind", "adapted"), [("nf4", False), ("int8", True)])
def test_the_sampler_reads_few_bits_and_says_what_scoring_says(model, weights, kind, adapted):
    """Laid out for decoding nothing of a layer's maps is wider than it was; log-probs are equal."""
    small = quantised(weights, kind)
    lora = model.init_lora(jax.random.key(2)) if adapted else None
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    laid = jax.eval_shape(partial(lay_out, model), small, lora)
    for layer in laid.layers:
        for name in KERNELS:
            kernel = layer["attention" if name in "qkvo" else "mlp"][name]["kernel"]
            assert kernel.qvalue.dtype.name == {"int8": "int8", "nf4": "uint4"}[kind]
    config = SampleConfig(max_new_tokens=6, n=2)
    draw = jax.jit(partial(sample, model, sample_config=config))
    rows = {"prompt_QP": TOKEN[:, :5], "prompt_mask_QP": FULL[:, :5], "key": jax.random.key(0)}
    found = draw(params=small, lora=lora, **rows)
    logp_BT = score(model, small, found.token_BT, found.attention_mask_BT, lora=lora)
    np.testing.assert_allclose(found.logp_BT, logp_BT * found.mask_BT, atol=1e-4)


def test_the_decode_loop_makes_a_weight_at_a_time(model, weights):
    """What the loop does not change XLA would compute before it: all weights of all layers."""
    draw = partial(sample, model, sample_config=SampleConfig(max_new_tokens=4))
    rows = {"prompt_QP": TOKEN[:, :5], "prompt_mask_QP": FULL[:, :5], "key": jax.random.key(0)}
    small = quantised(weights, "nf4")
    module = parse(jax.jit(draw).lower(params=small, **rows).compile().as_text())
    before = [shape for op in module.computations[module.entry].values() for shape in op.shapes]
    assert ("u4", (128, 192)) in {(x.dtype, x.dims) for x in before}
    assert ("f32", (128, 192)) not in {(x.dtype, x.dims) for x in before}


def test_sampling_on_a_mesh_draws_the_same(model, weights):
    """A scale is split as its weight is, where it is long enough."""
    small, lora = quantised(weights, "nf4"), model.init_lora(jax.random.key(2))
    config = SampleConfig(max_new_tokens=4)
    prompts = TOKEN[:2, :5], FULL[:2, :5]

    def draw(params, lora):
        return sample(model, params, *prompts, jax.random.key(0), config, lora=lora)

    expected = jax.jit(draw)(small, lora)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = quantised(jax.device_put(weights, shardings(model.axes(), mesh)), "nf4")
        found = jax.jit(draw)(split, jax.device_put(lora, shardings(model.lora_axes(), mesh)))
        where = decode_layout(model, mesh, jax.eval_shape(partial(lay_out, model), split, lora))
    np.testing.assert_array_equal(found.token_BT, expected.token_BT)
    down = where.layers[0]["mlp"]["down"]["kernel"]
    assert down.qvalue.spec == PartitionSpec("tensor", None)
    assert down.scale.spec == PartitionSpec(None, None)  # three tiles of 64


def test_a_product_by_hand_with_scales_behind_it(weights):
    w = jax.tree.map(lambda x: x[0], quantised(weights, "int8")["layers"]["attention"]["o"])
    w = w["kernel"]
    x = jax.random.normal(jax.random.key(3), (5, 4, 64))
    plain = qwix.dequantize(w)
    assert behind(2, w).shape == (128,)
    assert behind(2, plain) is None
    for of in (lambda x, w: product(2, x, w), lambda x, w: (product(2, x, w) ** 2).sum()):
        np.testing.assert_allclose(of(x, w), jnp.asarray(of(x, plain)), rtol=2e-5, atol=2e-5)
    slopes = [jax.grad(lambda x, w=w: (product(2, x, w) ** 2).sum())(x) for w in (w, plain)]
    np.testing.assert_allclose(*slopes, rtol=1e-4, atol=1e-4)
    # In bfloat16 the levels are exact: the sum alone is rounded.
    narrow = x.astype("bfloat16")
    exact = jnp.tensordot(narrow.astype("float32"), plain, 2)
    np.testing.assert_array_equal(product(2, narrow, w), exact.astype("bfloat16"))


def test_a_file_is_quantised_as_it_is_read(tmp_path, weights):
    """As it would be afterwards; what an adapter is merged into is read as it is."""
    out = tmp_path / "wide"
    decoder = replace(WIDE, vocab=16)
    wide = {**weights, "embed": {"table": weights["embed"]["table"][:16]}}
    write_hf(out, decoder, wide, load_tokenizer(f"words:{runs.WORDS}"))
    mesh, config = runs.one_device(), ModelConfig(str(out))
    narrow = Loader(mesh, frozen_dtype="nf4", narrow=True).base(config).params
    after = Loader(mesh, frozen_dtype="nf4")
    after = after.frozen(after.base(config)).params
    assert jax.tree.structure(narrow) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, narrow, after)
