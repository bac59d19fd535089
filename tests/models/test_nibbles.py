"""Products with weights two codes a byte: by each kernel, interpreted, what the weights say; where
they are chosen, and what a device's compiler makes of them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import NamedSharding, PartitionSpec
from test_quantise import LORA, WIDE
from test_transformer import FULL, TOKEN

from jaxrlhf.config import MeshConfig, SampleConfig
from jaxrlhf.mesh.sharding import DECODE, make_mesh, spec
from jaxrlhf.models import nibbles
from jaxrlhf.models.decode import decode_layout, lay_out
from jaxrlhf.models.nibbles import Nibbles, maker, packed, times, unpacked
from jaxrlhf.models.quantise import is_quantised, quantised
from jaxrlhf.models.transformer import Model
from jaxrlhf.run.programs import decode_weights
from jaxrlhf.steps.sample import sample
from jaxrlhf.study.plan.hlo import collectives, parse

RNG = np.random.default_rng(0)
MAKERS = ("triton", "mosaic")


def weights(ins, outs, by="triton", names=("embed", "mlp")):
    """Random ones in nf4, as qwix has them and two a byte."""
    wide = jnp.asarray(RNG.standard_normal((ins, outs)), jnp.float32)
    small = qwix.quantize(wide, "nf4", channelwise_axes=[1], tiled_axes={0: min(64, ins)})
    return small, packed(1, small, names, by)


def rows(count, ins, dtype="float32"):
    return jnp.asarray(RNG.standard_normal((count, 1, ins)), dtype)


@pytest.fixture(scope="module")
def model():
    return Model(replace(WIDE, layers=1), lora=LORA)


@pytest.fixture(scope="module")
def small(model):
    return quantised(model.init(jax.random.key(0)), "nf4")


@pytest.fixture
def kernel(request, monkeypatch):
    """Whose kernel is interpreted."""
    monkeypatch.setattr(nibbles, "INTERPRET", request.param)
    return request.param


SHAPES = [(64, 16, 1), (576, 208, 5), (1536, 1040, 64)]
"""Inputs, outputs and rows that no block divides: one tile; nine, in three splits; 24, in three
blocks of a TPU, and of columns one and a bit."""


@pytest.mark.parametrize("kernel", MAKERS, indirect=True)
@pytest.mark.parametrize(("ins", "outs", "count"), SHAPES)
def test_a_kernel_multiplies_by_what_the_codes_stand_for(kernel, ins, outs, count):
    small, w = weights(ins, outs, kernel)
    wide = qwix.dequantize(small)
    np.testing.assert_array_equal(unpacked(w, "float32"), wide)
    assert w.code.nbytes + w.scale.nbytes == (0.5 + 4 / 64) * ins * outs
    x = rows(count, ins)
    found = np.asarray(jax.jit(times)(x, w))
    expected = np.asarray(x, np.float64) @ np.asarray(wide, np.float64)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    narrow = x.astype("bfloat16")
    found = np.asarray(jax.jit(times)(narrow, w), np.float32)
    expected = jnp.tensordot(narrow, wide.astype("bfloat16"), 1).astype("float32")
    # A sum next to the middle between two bfloat16 numbers may be rounded to either.
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
def test_many_rows_are_multiplied_by_wide_weights(kernel, monkeypatch):
    small, w = weights(128, 32, kernel)
    x = rows(9, 128)
    monkeypatch.setattr(nibbles, "MOST_ROWS", 8)
    assert "pallas_call" not in str(jax.make_jaxpr(times)(x, w))
    np.testing.assert_allclose(times(x, w), x @ qwix.dequantize(small), rtol=1e-4, atol=1e-4)
    assert "pallas_call" in str(jax.make_jaxpr(times)(x[:8], w))


@pytest.mark.parametrize(
    ("kernel", "config"),
    [("mosaic", None), ("triton", MeshConfig(data=2, fsdp=2, tensor=2))],
    indirect=["kernel"],
    ids=str,
)
def test_the_sampler_draws_the_same_by_a_kernel(kernel, config, model, small):
    """On one device, and split over eight, where three tiles of 64 do not divide by two."""
    lora = jax.tree.map(lambda x: x + 0.05, model.init_lora(jax.random.key(1)))
    few = SampleConfig(max_new_tokens=3, n=2)
    given = {"prompt_QP": TOKEN[:2, :5], "prompt_mask_QP": FULL[:2, :5], "key": jax.random.key(0)}

    def draw(model, params, lora):
        return jax.jit(partial(sample, model, sample_config=few))(params, lora=lora, **given)

    expected = draw(replace(model, nf4_product="plain"), small, lora)
    mesh = make_mesh(config or MeshConfig(data=1), None if config else jax.devices()[:1])
    with jax.set_mesh(mesh):
        everywhere = jax.device_put((small, lora), NamedSharding(mesh, PartitionSpec()))
        found = draw(model, *everywhere)
        laid = jax.eval_shape(partial(lay_out, model), small, lora)
        where = decode_layout(model, mesh, laid).layers[0]
    np.testing.assert_array_equal(found.token_BT, expected.token_BT)
    np.testing.assert_allclose(found.logp_BT, expected.logp_BT, atol=1e-4)
    o, down = laid.layers[0]["attention"]["o"], laid.layers[0]["mlp"]["down"]
    assert isinstance(o["kernel"], Nibbles)
    assert isinstance(down["kernel"], Nibbles) == (config is None)
    assert where["attention"]["o"]["kernel"].code.spec == PartitionSpec("tensor", None)


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
@pytest.mark.parametrize("names", [("embed", "mlp"), ("mlp", "embed")], ids=str)
def test_no_weight_is_sent(kernel, names):
    """Split by outputs nothing is, by inputs the sums, of two rows a device."""
    small, w = weights(128, 64, kernel, names)
    x = rows(5, 128)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        axes = (None, None, names[0]), names
        split = tuple(NamedSharding(mesh, spec(each, DECODE)) for each in axes)
        program = jax.jit(times, in_shardings=split)
        found = program(x, w)
        module = parse(program.lower(x, w).compile().as_text())
    np.testing.assert_allclose(found, x @ qwix.dequantize(small), rtol=1e-4, atol=1e-4)
    sent = [(x.kind, x.visit.op.shapes[0].dims) for x in collectives(module)]
    sums = [found for found in sent if found[0] == "all-reduce"]
    assert sums == ([("all-reduce", (2, 64))] if names[0] == "mlp" else [])
    assert all(dims[0] <= 8 for _, dims in sent)  # rows, not codes


def test_what_is_packed():
    """Tiles of 64 and outputs that blocks divide; of int8, and of a narrow map, nothing."""
    assert isinstance(weights(128, 48)[1], Nibbles)
    assert not isinstance(weights(32, 48)[1], Nibbles)
    assert not isinstance(weights(128, 40)[1], Nibbles)
    whole = qwix.quantize(jnp.ones((64, 48)), "int8", channelwise_axes=[1])
    assert packed(1, whole, ("embed", "mlp"), "triton") is whole


def test_the_kernel_is_of_the_devices(model, small, monkeypatch):
    """A CPU has none; NVIDIA GPUs and TPUs have, unless XLA's product is asked for."""
    assert maker("auto") is None
    laid = jax.eval_shape(partial(lay_out, model), small).layers[0]["mlp"]["up"]["kernel"]
    assert is_quantised(laid)
    assert not isinstance(laid, Nibbles)
    for kind, expected in (("NVIDIA H100 80GB HBM3", "triton"), ("TPU v5e", "mosaic")):
        monkeypatch.setattr(nibbles, "device_kind", lambda kind=kind: kind)
        assert maker("auto") == expected
        assert maker("plain") is None


@pytest.mark.parametrize(("by", "platform"), [("triton", "cuda"), ("mosaic", "tpu")])
def test_a_kernel_is_lowered_for_devices_that_are_not_here(by, platform):
    """What is left to their compilers is one call, given the codes."""
    _, w = weights(576, 208, by)
    # A function of its own: of the same one jax has a trace, with the kernel interpreted.
    traced = jax.jit(partial(times)).trace(rows(5, 576, "bfloat16"), w)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    call = {"cuda": "xla.gpu.triton", "tpu": "tpu_custom_call"}[platform]
    assert [("tensor<288x208xui8>" in line) for line in text.split("\n") if call in line] == [True]


def test_a_plan_lays_weights_out_for_devices_that_are_not_here(model, small, monkeypatch):
    """They are those of the mesh, whatever is in force where the program is made."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])

    def kind():
        return "cpu" if jax.sharding.get_abstract_mesh().empty else "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(nibbles, "device_kind", kind)
    program = decode_weights(model, mesh, small, None)
    with jax.set_mesh(mesh):
        found = jax.eval_shape(program, small, None)
    assert isinstance(found.layers[0]["mlp"]["up"]["kernel"], Nibbles)
