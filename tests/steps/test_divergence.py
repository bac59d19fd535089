"""Divergences in pieces and their gradient equal those of all logits at once, of two models of
different shapes, on any mesh, packed or not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import ALGORITHMS, generalised_jsd
from jaxrlhf.config import DecoderConfig, GKDConfig, LoraConfig, MeshConfig
from jaxrlhf.core.types import TokenBatch
from jaxrlhf.mesh.sharding import make_mesh, put, row_layout, shardings
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps import columns
from jaxrlhf.steps.columns import Projection
from jaxrlhf.steps.divergence import Side, Taught, divergence_to, token_divergence
from jaxrlhf.steps.packed import pieces_of
from jaxrlhf.steps.update import distillation_loss
from jaxrlhf.study.plan.hlo import flops

B, T, D, E, V = 8, 11, 16, 24, 32  # 11 columns: neither pieces nor devices divide them
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


HIDDEN, WEIGHT, SLOPE = normal(B, T, D), 0.5 * normal(D, V), normal(B, T)
THEIRS, THEIR_WEIGHT = normal(B, T, E), 0.5 * normal(V, E)
WANTED = RNG.random((B, T)) < 0.3
OURS_TO, THEIRS_TO = Projection(0), Projection(1, 0.5, 2.0)
BETAS = [0.0, 0.1, 0.5, 1.0]


def in_pieces(beta, wanted, hidden, weight):
    student, teacher = Side(hidden, weight, OURS_TO), Side(THEIRS, THEIR_WEIGHT, THEIRS_TO)
    divergence = partial(generalised_jsd, beta=beta)
    return token_divergence(student, teacher, divergence, 0.7, WANTED if wanted else None)


def plain(beta, wanted, hidden, weight):
    """From all logits at once."""
    logits, theirs = hidden @ weight, 2.0 * jnp.tanh(0.5 * (THEIRS @ THEIR_WEIGHT.T) / 2.0)
    found = generalised_jsd(logits / 0.7, theirs / 0.7, beta)
    return jnp.where(WANTED, found, 0) if wanted else found


def run(function, beta, wanted, hidden, weight):
    """Its values, and gradients by the student's hidden states and weight."""

    def total(hidden, weight):
        found = function(beta, wanted, hidden, weight)
        read = jnp.where(WANTED, found, 0) if wanted else found
        return (SLOPE * read).sum(), read

    return jax.grad(total, (0, 1), has_aux=True)(hidden, weight)


def close(found, expected):
    def leaf(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-6 * np.abs(y).max())

    jax.tree.map(leaf, found, expected)


@pytest.mark.parametrize(
    ("beta", "pieces", "wanted"),
    [*((beta, 3, False) for beta in BETAS), (0.5, 1, False), (0.5, 11, True), (0.0, 3, True)],
)
def test_token_divergence_equals_that_of_all_logits(beta, pieces, wanted, monkeypatch):
    monkeypatch.setattr(columns, "LOGITS_A_DEVICE", 2 * B * -(-T // pieces) * V)
    found = jax.jit(partial(run, in_pieces, beta, wanted))(HIDDEN, WEIGHT)
    close(found, run(plain, beta, wanted, HIDDEN, WEIGHT))


def test_token_divergence_on_a_mesh(monkeypatch):
    monkeypatch.setattr(columns, "LOGITS_A_DEVICE", 2 * B * 2 * V // 8)  # six pieces
    mesh = make_mesh(MeshConfig(2, 2, 2))
    layout = shardings(columns.WEIGHT[0], mesh)
    given = put((HIDDEN, WEIGHT), (row_layout(mesh), layout))
    with jax.set_mesh(mesh):
        found = jax.jit(partial(run, in_pieces, 0.5, False))(*given)
    close(found, run(plain, 0.5, False, HIDDEN, WEIGHT))


def test_token_divergence_has_no_logits_of_all_columns(monkeypatch):
    """Nor products for a gradient that nobody asks for: logits of both, again, and ∂h; then ∂W."""
    monkeypatch.setattr(columns, "LOGITS_A_DEVICE", 2 * B * 2 * V)

    def loss(hidden, weight):
        return in_pieces(0.5, False, hidden, weight).sum()

    wide, found = 6 * 2, {}  # of which the last is padding
    for argnums in (0, (0, 1)):
        traced = jax.make_jaxpr(jax.grad(loss, argnums))(HIDDEN, WEIGHT)
        found[argnums] = flops(traced) / (2 * B * wide * V)
        assert f"{wide},{V}]" not in str(traced)
    assert found == {0: 3 * D + 2 * E, (0, 1): 4 * D + 2 * E}


SHAPE = {"vocab": V, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 16}
STUDENT = Model(DecoderConfig(embed=D, **SHAPE), lora=LoraConfig(rank=2))
TEACHER = Model(DecoderConfig(embed=E, logit_softcap=3.0, **{**SHAPE, "layers": 2}))
BASE, TAUGHT_BY = (m.init(jax.random.key(i)) for i, m in enumerate((STUDENT, TEACHER)))
LORA = jax.tree.map(lambda x: x + 0.1, STUDENT.init_lora(jax.random.key(2)))
TOKEN = RNG.integers(0, V, (B, T), np.int32)
REAL = np.ones((B, T), np.int32)
REAL[0, :3], REAL[1, 7:], REAL[2, 5:] = 0, 0, 0


def test_divergence_to_reads_the_distribution_before_each_token():
    divergence = partial(generalised_jsd, beta=0.5)
    networks = STUDENT, BASE, TEACHER, TAUGHT_BY
    found = jax.jit(lambda: divergence_to(*networks, TOKEN, REAL, divergence, 0.7, LORA, first=3))()

    def logits(model, params, lora=None):
        hidden, _ = model.apply(params, TOKEN, REAL, lora)
        return model.logits(params, hidden)[:, 2:-1] / 0.7

    wanted = generalised_jsd(logits(STUDENT, BASE, LORA), logits(TEACHER, TAUGHT_BY), 0.5)
    wanted = jnp.where(REAL[:, 3:] * REAL[:, 2:-1] != 0, wanted, 0)
    np.testing.assert_allclose(found[:, 3:], wanted, atol=1e-6)
    assert (found[:, :3] == 0).all()


WEIGHTS = np.where(REAL != 0, RNG.random((B, T)), 0).astype(np.float32)
WEIGHTS[:, :4] = 0
WEIGHTS[:, 1:] *= REAL[:, :-1]
BATCH = TokenBatch(*map(jnp.asarray, (TOKEN, REAL, WEIGHTS)))


def loss(params, batch, teacher=TAUGHT_BY):
    algorithm = ALGORITHMS["gkd"](GKDConfig())
    join = distillation_loss(STUDENT, TEACHER, algorithm, first=4)
    return join(params, Taught(None, teacher), batch)[0]


@pytest.fixture(scope="module")
def alone():
    return jax.jit(jax.value_and_grad(loss))(BASE, BATCH)


def near(found, wanted):
    """To 1e-5 of the largest number in each."""

    def leaf(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())

    jax.tree.map(leaf, found, wanted)


def test_distillation_loss_of_packed_rows(alone):
    """Rows end to end, in pieces: their losses add up, and so do their gradients."""
    piece, pieces = pieces_of(BATCH, 2)
    assert len(piece(0).batch.weight_BT) == B
    of_piece = jax.jit(jax.value_and_grad(lambda params, i: loss(params, piece(i))))
    found = [of_piece(BASE, i) for i in range(int(pieces))]
    assert len(found) > 1
    near(jax.tree.map(lambda *x: sum(x), *found), alone)


def test_distillation_loss_on_a_mesh(alone):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    ours, theirs = (shardings(model.axes(), mesh) for model in (STUDENT, TEACHER))
    rows = TokenBatch(*[row_layout(mesh)] * 3)
    given = put((BASE, BATCH, TAUGHT_BY), (ours, rows, theirs))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(*given)
    near(found, alone)
