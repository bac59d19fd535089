"""Packed rows: where tokens lie, the same results as of padded rows, and what they cost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import DECODER

from jaxrlhf.algorithms import grpo, gspo, ppo
from jaxrlhf.config import GRPOConfig, GSPOConfig, MeshConfig, PPOConfig
from jaxrlhf.core import masked
from jaxrlhf.core.types import Batch, TrainState
from jaxrlhf.data.packing import first_fit_decreasing
from jaxrlhf.mesh import sharding
from jaxrlhf.mesh.sharding import make_mesh, put_rows, shardings
from jaxrlhf.models.transformer import Model
from jaxrlhf.rewards.models import packed_reward, packed_scores
from jaxrlhf.steps import packed, pieces
from jaxrlhf.steps.packed import first_fit, in_pieces, pack, pieces_for
from jaxrlhf.steps.score import forward, reward, score, token_scores, value
from jaxrlhf.steps.update import critic_loss, make_update, policy_loss

P, N, B = 6, 10, 8
T = P + N
MODEL = Model(DECODER)


@pytest.fixture(scope="module")
def params():
    start = MODEL.init(jax.random.key(0), head=True)
    kernel = jax.random.normal(jax.random.key(1), start["head"]["kernel"].shape) / 8
    return {**start, "head": {**start["head"], "kernel": kernel}}


def rows(seed=0):
    """(tokens, attention mask, mask) of prompts on the left of column P and responses after it."""
    rng = np.random.default_rng(seed)
    prompt_B, response_B = rng.integers(1, P + 1, B), rng.integers(1, N + 1, B)
    response_B[0] = N
    column = np.arange(T)
    real_BT = (column >= P - prompt_B[:, None]) & (column < P + response_B[:, None])
    token_BT = rng.integers(0, DECODER.vocab, (B, T)).astype(np.int32)
    return token_BT, real_BT.astype(np.int32), (real_BT & (column >= P)).astype(np.float32)


def batch(seed=0, kl=False):
    token_BT, real_BT, mask_BT = rows(seed)
    mask_BT[3] = 0  # a row whose reward is not known
    rng = np.random.default_rng(seed)
    old, advantage, returns, values = rng.normal(size=(4, B, T)).astype(np.float32) * 0.3
    return Batch(
        token_BT=token_BT,  # type: ignore[arg-type]
        attention_mask_BT=real_BT,  # type: ignore[arg-type]
        mask_BT=mask_BT,  # type: ignore[arg-type]
        old_logp_BT=(old - 2.7) * mask_BT,
        advantage_BT=advantage * mask_BT,
        weight_BT=masked.weights(mask_BT, "sequence"),
        return_BT=returns,
        old_value_BT=values,
        ref_logp_BT=(values - 2.7) * mask_BT if kl else None,
        kl_coef_B=np.full(B, 0.1, np.float32) if kl else None,  # type: ignore[arg-type]
    )


def test_first_fit_is_that_of_the_data():
    length_B = np.random.default_rng(0).integers(0, 17, 40)
    row_B, start_B = map(np.asarray, jax.jit(first_fit, static_argnums=1)(length_B, 16))
    bins = first_fit_decreasing(length_B, 16)
    for row, items in enumerate(bins):
        items = [i for i in items if length_B[i]]
        assert set(items) == {i for i in range(40) if row_B[i] == row and length_B[i]}
        begin = np.concatenate([[0], np.cumsum(length_B[items])])[:-1]
        np.testing.assert_array_equal(start_B[items], begin)


def test_pack_keeps_each_token_once_and_each_row_together():
    _, real_BT, _ = rows(seed=3)
    real_BT[2, P - 1] = 0  # a gap
    packing = jax.jit(pack, static_argnums=1)(real_BT, 2)
    source = np.asarray(packing.source_IRT).reshape(-1)
    kept = source < real_BT.size
    assert sorted(source[kept]) == sorted(np.flatnonzero(real_BT))
    place_BT = np.asarray(packing.target_BT)
    for b in range(B):
        place = place_BT[b][real_BT[b] != 0]
        assert (np.diff(place) == 1).all()
        assert len(set(place // T)) == 1
    assert (place_BT[real_BT == 0] == source.size).all()
    held = kept.reshape(-1, 2 * T).any(1)
    np.testing.assert_array_equal(held, np.arange(len(held)) < int(packing.used))
    assert int(packing.used) < len(held)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_in_pieces_says_what_padded_rows_say(sizes, params):
    token_BT, real_BT, _ = rows()
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])

    def logp(rows):
        token_RT, mask_RT, segment_RT, wanted_RT, _ = rows
        more = {"segment_BT": segment_RT, "wanted_BT": wanted_RT}
        return forward(MODEL, params, token_RT, mask_RT, 0.7, **more).logp_BT

    def values(rows):
        return value(MODEL, params, *rows[:2], segment_BT=rows.segment_RT)

    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(MODEL.axes(head=True), mesh))
        texts = put_rows((token_BT, real_BT), mesh)
        got = [
            jax.jit(partial(in_pieces, logp, most=4, first=P))(*texts),
            jax.jit(partial(in_pieces, values, most=4))(*texts),
            jax.jit(packed_reward, static_argnums=0)(MODEL, params, *texts, None),
        ]
        scores = jax.jit(packed_scores, static_argnums=0)(MODEL, params, *texts, None)
    want = [
        score(MODEL, params, token_BT, real_BT, 0.7, first=P),
        value(MODEL, params, token_BT, real_BT),
        reward(MODEL, params, token_BT, real_BT),
    ]
    for x, y in zip(jax.device_get(got), jax.device_get(want), strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6)
    each = token_scores(MODEL, params, token_BT, real_BT) * real_BT
    np.testing.assert_allclose(scores, each, atol=5e-6)


PPO = ppo(PPOConfig(entropy_coef=0.01, minibatches=1))
LOSSES = {
    "ppo": policy_loss(MODEL, PPO, 0.7, P),
    "shared": policy_loss(MODEL, PPO, 0.7, P, value_coef=0.5),
    "critic": critic_loss(MODEL, PPO),
    "head": critic_loss(MODEL, PPO, head_only=True),
    "grpo": policy_loss(MODEL, grpo(GRPOConfig(kl_in="loss")), 1.0, P),
    "gspo": policy_loss(MODEL, gspo(GSPOConfig(kl_in="exact_loss")), 1.0, P),
}


def step(params, loss, batch, **how):
    tx = optax.sgd(1.0)
    state = TrainState.create(jax.tree.map(jnp.copy, params), tx)
    state, metrics = make_update(tx, loss, **how)(state, batch)
    return jax.device_get((jax.tree.map(jnp.subtract, params, state.params), metrics))


@pytest.mark.parametrize("name", LOSSES)
def test_packed_update_has_the_gradient_of_the_padded(name, params):
    given = batch(kl=name in ("grpo", "gspo"))
    want, measured = step(params, LOSSES[name], given)
    got, also = step(params, LOSSES[name], given, packed=2)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), got, want)
    assert max(np.abs(x).max() for x in jax.tree.leaves(want)) > 1e-2
    assert also.keys() == measured.keys()
    for key, x in measured.items():
        np.testing.assert_allclose(also[key], x, atol=1e-5, rtol=1e-5, err_msg=key)


def test_rows_that_are_kept_apart(params, monkeypatch):
    """Where attention takes no packed rows: each has one of its own, and no segments."""
    token_BT, real_BT, _ = rows(seed=3)
    seen = []

    def logp(rows):
        token_RT, mask_RT, segment_RT, wanted_RT, _ = rows
        seen.append(segment_RT)
        return forward(MODEL, params, token_RT, mask_RT, 0.7, wanted_BT=wanted_RT).logp_BT

    got = jax.jit(partial(in_pieces, logp, most=2, first=P, apart=True))(token_BT, real_BT)
    want = score(MODEL, params, token_BT, real_BT, 0.7, first=P)
    np.testing.assert_allclose(got, want, atol=5e-6)
    assert set(seen) == {None}
    row_B, start_B = map(np.asarray, first_fit(real_BT.sum(1), T, apart=True))
    assert sorted(row_B) == list(range(B))
    assert not start_B.any()
    assert (np.diff(np.asarray(real_BT).sum(1)[np.argsort(row_B)]) <= 0).all()
    want, _ = step(params, LOSSES["shared"], batch())
    monkeypatch.setattr(pieces, "keeps_apart", lambda model: True)
    got, _ = step(params, LOSSES["shared"], batch(), packed=2, model=MODEL)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), got, want)


def test_rows_kept_apart_are_scored_in_few_pieces(monkeypatch):
    """As many as fit in memory, of one size: weights are gathered for each. An update has as many
    as its microbatches say, and packed rows, which may leave the last piece empty, more."""
    monkeypatch.setitem(packed.TOKENS_AT_ONCE, "cpu", 8192)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=8))):
        assert pieces_for(128, 2048, apart=True) == (4, 32)
        monkeypatch.setattr(sharding, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
        assert pieces_for(128, 2048, apart=True) == (1, 128)
        assert pieces_for(320, 2048, apart=True) == (3, 112)  # 18 rows a device fit: not 144
        assert pieces_for(128, 2**20, apart=True) == (16, 8)
        assert pieces_for(128, 2048) == (4, 32)
        assert pieces_for(128, 2048, most=16, apart=True) == (8, 16)
        monkeypatch.setattr(sharding, "device_kind", lambda: "NVIDIA GeForce RTX 4090")
        assert pieces_for(128, 2048, apart=True) == (3, 48)  # 6 rows a device fit


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"context": 2}])
def test_packed_update_on_a_mesh(sizes, params):
    """Rows of 16 columns, which context divides, and those that are predicted, 15, it does not."""
    want, _ = step(params, LOSSES["shared"], batch())
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        laid = jax.device_put(params, shardings(MODEL.axes(head=True), mesh))
        got, _ = step(laid, LOSSES["shared"], put_rows(batch(), mesh), packed=4)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), got, want)


def test_cost_is_that_of_the_real_tokens():
    """Rows of 16 to 512 tokens: within 15 % of as many tokens without padding."""
    length_B = np.random.default_rng(0).permutation(np.linspace(16, 512, 64).astype(int))
    real_BT = (np.arange(512) < length_B[:, None]).astype(np.int32)
    packing = jax.jit(pack)(real_BT)
    _, rows_at_once, width = packing.source_IRT.shape
    assert int(packing.used) * rows_at_once * width <= 1.15 * length_B.sum()


def test_scoring_needs_no_more_memory_than_the_update(params, monkeypatch):
    monkeypatch.setitem(packed.TOKENS_AT_ONCE, "cpu", 8 * T)
    many = jax.tree.map(lambda x: np.tile(x, (32,) + (1,) * (x.ndim - 1)), batch())

    def logp(rows):
        return forward(MODEL, params, *rows[:2], segment_BT=rows.segment_RT).logp_BT

    scored = jax.jit(partial(in_pieces, logp)).lower(many.token_BT, many.attention_mask_BT)
    tx = optax.sgd(1.0)
    state = TrainState.create(params, tx)
    update = make_update(tx, LOSSES["ppo"], microbatches=32).lower(state, many)
    used = [x.compile().memory_analysis().temp_size_in_bytes for x in (scored, update)]
    assert used[0] <= used[1]
