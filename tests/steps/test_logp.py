"""Log-probs in pieces and their own gradient equal log_softmax's, on any mesh; a weight split over
fsdp is gathered once, and its gradient added up once, however many pieces there are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig
from jaxrlhf.mesh.sharding import make_mesh, put, row_layout, shardings
from jaxrlhf.steps import columns, logp
from jaxrlhf.study.plan.hlo import collectives, flops, parse

B, T, D, V = 8, 11, 16, 24  # 11 columns: neither pieces nor devices divide them
RNG = np.random.default_rng(0)
HIDDEN, SLOPES = RNG.standard_normal((B, T, D)), RNG.standard_normal((2, B, T))
HIDDEN, SLOPES = HIDDEN.astype(np.float32), SLOPES.astype(np.float32)
WEIGHT = (0.25 * RNG.standard_normal((D, V))).astype(np.float32)
TOKEN = RNG.integers(0, V, (B, T), np.int32)
MESHES = [
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, fsdp=4, tensor=2),
    MeshConfig(data=2, fsdp=2, context=2),
]


def plain(hidden, weight, axis, token, temperature, entropy, scale=1.0, cap=0.0):
    """From all logits at once."""
    logits = scale * jnp.tensordot(hidden, weight, ((2,), (axis,)))
    log_p = jax.nn.log_softmax((cap * jnp.tanh(logits / cap) if cap else logits) / temperature)
    spread = -(jnp.exp(log_p) * log_p).sum(-1) if entropy else jnp.zeros(token.shape)
    return jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0], spread


def run(function, axis, entropy, hidden, weight, token, temperature, **shape):
    """Its values, and gradients by hidden states, weight and temperature."""

    def total(hidden, weight, temperature):
        found = function(hidden, weight, axis, token, temperature, entropy, **shape)
        return (SLOPES[0] * found[0] + SLOPES[1] * found[1]).sum(), found

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(hidden, weight, temperature)


def expected(axis, entropy, hidden, weight, token, temperature, **shape):
    """What ``run`` finds by ``plain``; of the temperature's gradient the terms, one a token."""
    temperature = np.full((B, T, 1), temperature, np.float32)
    return run(plain, axis, entropy, hidden, weight, token, temperature, **shape)


def close(found, expected):
    """To a millionth of the largest number in each; of a sum, to a millionth of its terms'."""

    def leaf(x, y):
        if x.ndim:
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())
        else:
            np.testing.assert_allclose(x, y.sum(), rtol=0, atol=1e-6 * np.abs(y).sum())

    jax.tree.map(leaf, found, expected)


@pytest.mark.parametrize("pieces", [1, 3, 11])
@pytest.mark.parametrize(("axis", "entropy"), [(0, True), (1, False)])
def test_token_logp_equals_log_softmax(axis, entropy, pieces, monkeypatch):
    monkeypatch.setattr(columns, "LOGITS_A_DEVICE", B * -(-T // pieces) * V)
    weight = WEIGHT if axis == 0 else WEIGHT.T
    given = axis, entropy, HIDDEN, weight, TOKEN, 0.7
    close(jax.jit(partial(run, logp.token_logp, *given))(), expected(*given))


@pytest.mark.parametrize("shape", [{"scale": 0.5}, {"cap": 2.0}, {"scale": 3.0, "cap": 1.5}])
def test_token_logp_of_scaled_and_capped_logits(shape, monkeypatch):
    monkeypatch.setattr(columns, "LOGITS_A_DEVICE", B * -(-T // 3) * V)
    given = 0, True, HIDDEN, WEIGHT, TOKEN, 0.7
    close(jax.jit(partial(run, logp.token_logp, *given, **shape))(), expected(*given, **shape))


def test_token_logp_in_bfloat16_adds_up_in_float32(monkeypatch):
    """600 equal terms, one a piece: a sum in bfloat16 would stop at the 256th."""
    monkeypatch.setattr(columns, "LOGITS_A_DEVICE", V)
    hidden, weight = jnp.ones((1, 600, D), jnp.bfloat16), np.zeros((D, V), np.float32)
    token = np.zeros((1, 600), np.int32)

    def total(hidden, weight):
        return logp.token_logp(hidden, weight, 0, token, 1.0, False)[0].sum()

    value, gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, weight)
    np.testing.assert_allclose(value, -600 * np.log(V), rtol=1e-6)
    assert [x.dtype for x in gradient] == [jnp.bfloat16, jnp.float32]
    other = float(jnp.bfloat16(1 / V))
    np.testing.assert_allclose(gradient[1][:, 1:], -600 * other, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_token_logp_gathers_and_reduces_the_weight_once(config, axis, monkeypatch):
    """The same values on eight devices; the weight is gathered once, its gradient reduced once over
    the rows' devices, and once over the columns'."""
    monkeypatch.setattr(columns, "LOGITS_A_DEVICE", B * 2 * V // 8)  # six pieces
    mesh = make_mesh(config)
    weight = WEIGHT if axis == 0 else WEIGHT.T
    layout = shardings(columns.WEIGHT[axis], mesh)
    given = put((HIDDEN, weight, TOKEN), (row_layout(mesh), layout, row_layout(mesh)))
    with jax.set_mesh(mesh):
        program = jax.jit(
            partial(run, logp.token_logp, axis, True),
            out_shardings=((row_layout(mesh), layout, None), row_layout(mesh)),
        )
        compiled = program.lower(*given, 0.7).compile()
        close(compiled(*given, 0.7), expected(axis, True, HIDDEN, weight, TOKEN, 0.7))
    whole = {D, V // config.tensor}
    of_weight = [
        (x.kind, x.visit.times)
        for x in collectives(parse(compiled.as_text()))
        if any(whole <= {*shape.dims} for shape in x.visit.op.shapes)
    ]
    reduced = 1 + (config.context > 1)
    assert sorted(of_weight) == [("all-gather", 1)] + [("all-reduce", 1)] * reduced


def test_token_logp_computes_no_gradient_of_a_frozen_weight(monkeypatch):
    """Logits, logits again, and a gradient's product: three for hidden states, one more for W."""
    monkeypatch.setattr(columns, "LOGITS_A_DEVICE", B * 2 * V)

    def loss(hidden, weight):
        return logp.token_logp(hidden, weight, 0, TOKEN, 1.0, False)[0].sum()

    wide = 6 * 2  # of which the last is padding
    products = {
        argnums: flops(jax.make_jaxpr(jax.grad(loss, argnums))(HIDDEN, WEIGHT))
        / (2 * B * wide * D * V)
        for argnums in (0, (0, 1))
    }
    assert products == {0: 3, (0, 1): 4}
