"""Attention by kernels equals attention in pieces, by values and gradients where the kernels can be
interpreted or have a plain twin; which kernel is chosen where."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models import kernels
from jaxrlhf.models.attention import attend_before
from jaxrlhf.models.kernels import (
    attend_cudnn,
    attend_rows,
    attend_splash,
    choose,
    real_first,
    reorder,
)

B, T, N, K, H = 2, 199, 4, 2, 8  # an odd length: no number of tiles divides it
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE, SLOPE = (
    RNG.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N)
)
MASK = np.ones((B, T), np.int32)
MASK[0, :40] = MASK[0, 150:160] = MASK[1, 170:] = 0  # on the left, with a gap; on the right
SEGMENT = jnp.array([[1] * 100 + [2] * 99] * B)


@pytest.fixture
def on_cpu(monkeypatch):
    """Kernels as a CPU carries them out."""
    monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.setattr(kernels, "CUDNN", "xla")


def run(attend, query, key, value, mask):
    """What real tokens see, and its gradients."""

    def total(query, key, value):
        seen = attend(query, key, value, mask) * mask[:, :, None, None]
        return (seen * SLOPE).sum(), seen

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)


def cudnn_anywhere(query, key, value, mask):
    """``attend_cudnn`` of rows as they come."""
    order, back = real_first(mask)
    seen = attend_cudnn(*(reorder(x, order) for x in (query, key, value, mask)))
    return reorder(seen, back)


FORMS = {
    "cudnn": (cudnn_anywhere, attend_before),
    "splash": (attend_splash, attend_before),
    "splash packed": (
        partial(attend_splash, segment_BT=SEGMENT),
        partial(attend_before, segment_BT=SEGMENT),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_kernels_equal_pieces(form, config, on_cpu):
    """Whole, and with rows and heads on eight devices, which rows do not divide by."""
    kernel, plain = FORMS[form]
    expected = run(plain, QUERY, KEY, VALUE, MASK)
    if config is None:
        found = run(kernel, QUERY, KEY, VALUE, MASK)
    else:
        with jax.set_mesh(make_mesh(config)):
            found = run(kernel, QUERY, KEY, VALUE, MASK)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, expected)


@pytest.mark.parametrize("config", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_sinks_of_splash_equal_those_in_pieces(config, on_cpu):
    """And their gradient, which adds up over rows and tokens."""
    sink = jnp.array([1.0, -2.0, 3.0, 0.5])

    def slope(attend, sink):
        def total(sink):
            seen = attend(QUERY, KEY, VALUE, MASK, sink_N=sink) * MASK[:, :, None, None]
            return (seen * SLOPE).sum(), seen

        return jax.jit(jax.grad(total, has_aux=True))(sink)

    expected = slope(attend_before, sink)
    with jax.set_mesh(make_mesh(config or MeshConfig(), None if config else jax.devices()[:1])):
        found = slope(attend_splash, sink)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize(
    ("kernel", "features"),
    [
        ("cudnn", {"windows": (5,), "attention_scale": 0.2}),
        ("cudnn", {"windows": (5, 0)}),
        ("splash", {"windows": (0, 5), "attention_scale": 0.2, "attention_softcap": 2.0}),
        ("splash", {"windows": (5,)}),
    ],
)
def test_kernels_of_layers_with_windows_equal_pieces(kernel, features, decoder, on_cpu):
    """Of each kind of layer, where all layers are one loop; rows have no gaps."""
    decoder, mask = replace(decoder, **features), jnp.ones_like(MASK).at[1, :7].set(0)
    for number in range(len(features["windows"])):

        def attend(form, query, key, value, mask, number=number):
            if form != "cudnn":
                return attend_rows(form, decoder, jnp.array(number), query, key, value, mask, None)
            order, back = real_first(mask)
            rows = (reorder(x, order) for x in (query, key, value, mask))
            return reorder(attend_rows(form, decoder, jnp.array(number), *rows, None), back)

        expected = run(partial(attend, "pieces"), QUERY, KEY, VALUE, mask)
        found = run(partial(attend, kernel), QUERY, KEY, VALUE, mask)
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, expected)
        every = run(attend_before, QUERY, KEY, VALUE, mask)
        same = np.abs(every[1] - found[1]).max() < 0.01
        assert same == (features == {"windows": (5, 0)} and number == 1)  # all else shows


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_model_with_kernels_equals_that_with_pieces(
    kernel, model, params, lora, on_cpu, monkeypatch
):
    """Hidden states and gradients where tokens are real; what decoding reads of every place."""
    token = jnp.array(RNG.integers(0, 300, (3, 12)), jnp.int32)
    mask = jnp.array([[1] * 12, [0] * 4 + [1] * 8, [1] * 5 + [0] * 2 + [1] * 2 + [0] * 3])
    slope = jnp.array(RNG.standard_normal((3, 12, 32)), jnp.float32) * mask[..., None]

    def total(params):
        hidden, kept = model.apply(params, token, mask, lora, keep=True)
        kept = jax.tree.map(lambda x: x * mask[None, :, None, :, None], kept[:2])
        return (hidden * slope).sum(), (hidden * mask[..., None], kept)

    expected = jax.jit(jax.grad(total, has_aux=True))(params)
    monkeypatch.setattr(kernels, "choose", lambda *_: kernel)
    found = jax.jit(jax.grad(total, has_aux=True))(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), found, expected)


def test_kernels_are_not_called_again_for_a_gradient(model, on_cpu, monkeypatch):
    """Where elementwise operations alone are computed twice; with ``dots`` attention is too.

    Counted are results that somebody reads: a call of which nobody does is none once compiled.
    """
    monkeypatch.setattr(kernels, "choose", lambda *_: "splash")
    rows = (jax.ShapeDtypeStruct((3, 12), jnp.int32),) * 2

    def calls(remat):
        network = replace(model, remat=remat)
        slope = jax.grad(lambda params, *rows: network.apply(params, *rows)[0].sum())
        text = str(jax.make_jaxpr(slope)(model.shapes(), *rows))
        made = re.findall(r"\n *(\S[^\n=]*) = pallas_call\[", text)
        read = [name for names in made for name in re.findall(r"(\w+):", names) if name != "_"]
        return sum(len(re.findall(rf"\b{name}\b", text)) > 1 for name in read)

    assert calls("elementwise") == calls("none") < calls("dots")


@pytest.mark.parametrize("remat", ["none", "full"])
def test_masks_of_layers_are_never_as_wide_as_queries(remat, model, on_cpu, monkeypatch):
    """Neither in front of the loop over layers, where JAX puts what is alike in all of them, nor
    kept for the loop backwards."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "cudnn")
    # The kernel keeps scores to itself, and with them the masks that its plain twin makes.
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda query, *_, **__: query)
    model, rows = replace(model, remat=remat), (jax.ShapeDtypeStruct((3, 12), jnp.int32),) * 2
    slope = jax.grad(lambda params, *rows: model.apply(params, *rows)[0].sum())
    found = jax.make_jaxpr(slope)(model.shapes(), *rows)
    scans = [x for x in found.jaxpr.eqns if x.primitive.name == "scan"]
    assert len(scans) == 2
    masks = [x.aval for scan in scans for x in (*scan.invars, *scan.outvars)]
    layers = model.decoder.layers
    assert all(x.size <= layers * 3 * 12 for x in masks if x.dtype == bool)
    consts = [x.aval for scan in scans for x in scan.invars[: scan.params["num_consts"]]]
    assert not [x for x in consts if x.ndim == 4 and x.shape[2] > 1]


def test_real_first_keeps_the_order():
    order, back = real_first(jnp.array([[0, 1, 0, 1, 1]]))
    np.testing.assert_array_equal(order, [[1, 3, 4, 0, 2]])
    x = jnp.arange(10).reshape(1, 5, 2)
    np.testing.assert_array_equal(reorder(x, order)[0, :, 0], [2, 6, 8, 0, 4])
    np.testing.assert_array_equal(reorder(reorder(x, order), back), x)


H100, V5E = "NVIDIA H100 80GB HBM3", "TPU v5 lite"


@pytest.mark.parametrize(
    ("kind", "dtype", "size", "packed", "kernel"),
    [
        (H100, "bfloat16", 128, False, "cudnn"),
        (H100, "bfloat16", 40, False, "cudnn"),
        (V5E, "bfloat16", 128, False, "splash"),
        (V5E, "bfloat16", 64, True, "splash"),
        (H100, "float32", 128, False, "pieces"),  # the kernels would compute in less
        (V5E, "float32", 128, False, "pieces"),
        (H100, "bfloat16", 128, True, "pieces"),
        (H100, "bfloat16", 256, False, "pieces"),
        (V5E, "bfloat16", 40, False, "pieces"),
        ("cpu", "bfloat16", 128, False, "pieces"),
    ],
)
def test_choose_takes_what_fits(kind, dtype, size, packed, kernel, decoder, monkeypatch):
    monkeypatch.setattr(kernels, "device_kind", lambda: kind)
    decoder = replace(decoder, head_dim=size)
    assert choose("auto", decoder, dtype, packed) == kernel
    assert choose("pieces", decoder, dtype, packed) == "pieces"
    with jax.set_mesh(make_mesh(MeshConfig(data=4, context=2))):
        assert choose("auto", decoder, dtype, packed) == "pieces"
    if kernel != "pieces":
        assert choose(kernel, decoder, dtype, packed) == kernel


@pytest.mark.parametrize(
    ("wanted", "kind", "dtype", "size", "packed", "why"),
    [
        ("cudnn", V5E, "bfloat16", 128, False, "the devices are TPU v5 lite"),
        ("splash", "cpu", "bfloat16", 128, False, "the devices are cpu"),
        ("cudnn", H100, "float32", 128, False, "model.dtype is float32"),
        ("splash", V5E, "bfloat16", 40, False, "heads are of 40"),
        ("cudnn", H100, "bfloat16", 128, True, "no packed rows"),
    ],
)
def test_choose_refuses_what_does_not(wanted, kind, dtype, size, packed, why, decoder, monkeypatch):
    monkeypatch.setattr(kernels, "device_kind", lambda: kind)
    with pytest.raises(InputError, match=f"model.attention={wanted}: .*{why}.*: set auto or"):
        choose(wanted, replace(decoder, head_dim=size), dtype, packed)


def test_sinks_are_not_for_cudnn(decoder, monkeypatch):
    sinks = replace(decoder, head_dim=128, attention_sinks=True)
    for kind, kernel in ((H100, "pieces"), (V5E, "splash")):
        monkeypatch.setattr(kernels, "device_kind", lambda kind=kind: kind)
        assert choose("auto", sinks, "bfloat16", packed=False) == kernel
    monkeypatch.setattr(kernels, "device_kind", lambda: H100)
    with pytest.raises(InputError, match=r"has no sinks \(attention_sinks\): set auto or pieces"):
        choose("cudnn", sinks, "bfloat16", packed=False)
