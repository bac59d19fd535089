"""FLOPs from the jaxpr: by hand, and against XLA's own count where it can be right."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import DecoderConfig, MeshConfig, PPOConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Batch
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import policy_loss
from jaxrlhf.study.plan.flops import count

A, B = jnp.ones((4, 8)), jnp.ones((8, 16))
ONE = 2 * 4 * 8 * 16


def flops(f, *args, trips=None):
    return count(jax.make_jaxpr(f)(*args), trips)


def test_count_products():
    assert flops(jnp.dot, A, B) == ONE
    assert flops(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), A[None], B[None]) == ONE
    kernel = jnp.ones((3, 3, 5, 7))
    image = jnp.ones((2, 10, 10, 5))
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert flops(conv, image, kernel) == 2 * 2 * 10 * 10 * 7 * 3 * 3 * 5


def test_count_scan_and_nesting():
    def f(a, b):
        def step(x, _):
            return x, jax.jit(jnp.dot)(x, b)

        return jax.lax.scan(step, a, length=6)

    assert flops(f, A, B) == 6 * ONE
    assert flops(jax.checkpoint(f), A, B) == 6 * ONE


def test_count_while_needs_trips():
    def f(a, b):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ b @ b.T, a)

    with pytest.raises(InputError, match="trips are not known"):
        flops(f, A, B)
    assert flops(f, A, B, trips=5) == 5 * 2 * ONE


def test_count_while_without_products_needs_none():
    assert flops(lambda x: jax.lax.while_loop(lambda y: y < 9, lambda y: y + 1, x), 0.0) == 0


def test_count_cond_takes_the_dearest_branch():
    def f(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: (a @ b) @ b.T, lambda: a * 2)

    assert flops(f, A, B) == 2 * ONE


def test_count_custom_vjp_and_gradient():
    @jax.custom_vjp
    def f(a, b):
        return a @ b

    f.defvjp(lambda a, b: (f(a, b), (a, b)), lambda s, d: (d @ s[1].T, s[0].T @ d))
    assert flops(f, A, B) == ONE
    assert flops(jax.grad(lambda a, b: f(a, b).sum(), (0, 1)), A, B) == 3 * ONE


def test_count_shard_map_counts_every_device():
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    rows = PartitionSpec("data")
    f = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert flops(f, A, B) == ONE


def test_count_sees_what_remat_computes_again():
    def f(a, b):
        return jnp.sin(jnp.sin(a @ b) @ b.T).sum()

    plain, again = (flops(jax.grad(g, (0, 1)), A, B) for g in (f, jax.checkpoint(f)))
    assert plain == 6 * ONE
    assert again == 8 * ONE


@pytest.fixture
def unrolled(monkeypatch):
    """Loops written out, which is all that XLA's count can be right about."""
    monkeypatch.setattr(jax.lax, "scan", partial(jax.lax.scan, unroll=True))
    monkeypatch.setattr(jax, "checkpoint", lambda f: f)  # else XLA merges what is computed twice


def wide(layers, **more):
    decoder = DecoderConfig(
        vocab=2048,
        embed=256,
        layers=layers,
        heads=2,
        kv_heads=1,
        head_dim=128,
        mlp=1024,
        context=64,
    )
    return Model(decoder, **more)


def rows_of(shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("layers", [1, 2])
def test_count_agrees_with_xla_on_scoring(layers, unrolled):
    model = wide(layers)
    traced = jax.jit(partial(score, model)).trace(model.shapes(), *rows_of((4, 64)))
    said = traced.lower().compile().cost_analysis()["flops"]
    assert count(traced.jaxpr) == pytest.approx(said, rel=0.02)


@pytest.mark.parametrize("layers", [1, 2])
def test_count_agrees_with_xla_on_a_gradient(layers, unrolled):
    model = wide(layers)
    loss = policy_loss(model, ALGORITHMS["ppo"](PPOConfig()))
    ints, floats = (jax.ShapeDtypeStruct((4, 64), kind) for kind in (jnp.int32, jnp.float32))
    batch = Batch(
        token_BT=ints,
        attention_mask_BT=ints,
        mask_BT=floats,
        old_logp_BT=floats,
        advantage_BT=floats,
        weight_BT=floats,
        return_BT=floats,
        old_value_BT=floats,
    )
    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(model.shapes(), None, batch)
    said = traced.lower().compile().cost_analysis()["flops"]
    assert count(traced.jaxpr) == pytest.approx(said, rel=0.02)
