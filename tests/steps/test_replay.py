"""Router replay: what is kept is what was taken, and it is taken again, however rows are laid."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_sample import KEY, PROMPT, PROMPT_MASK, draw_rollout

from jaxrlhf.algorithms import ppo
from jaxrlhf.config import GRPOConfig, MeshConfig, MoeConfig, PPOConfig, SampleConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import TrainState
from jaxrlhf.mesh.sharding import make_mesh, put_rows, shardings, take_rows
from jaxrlhf.models import kernels
from jaxrlhf.models.experts import Experts
from jaxrlhf.models.replay import joined, nobody, unknown
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.iteration import make_iteration
from jaxrlhf.steps.sample import replays, sample
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import critic_loss, make_update, policy_loss

EXPERTS, EACH = 8, 3
DRAW = SampleConfig(max_new_tokens=8, n=2, stop=tuple(range(0, 300, 4)), pad=1, router_replay=True)


@pytest.fixture(scope="module")
def mixture(decoder):
    moe = MoeConfig(experts=EXPERTS, per_token=EACH)
    return Model(replace(decoder, moe=moe, mlp=16, qk_norm=True))


@pytest.fixture(scope="module")
def weights(mixture, random_weights):
    return random_weights(mixture.shapes(head=True), 3)


@pytest.fixture(scope="module")
def rollout(mixture, weights):
    return draw_rollout(mixture, weights, PROMPT, PROMPT_MASK, KEY, DRAW)


@pytest.fixture(scope="module")
def rows(mixture, weights, rollout):
    """Whole rows as their routers choose, and with the sampler's experts: hidden states, ids."""

    @jax.jit
    def read(params, expert_BTM):
        texts = rollout.token_BT, rollout.attention_mask_BT
        hidden, kept = mixture.apply(params, *texts, keep=True, expert_BTM=expert_BTM)
        return hidden, joined(kept.expert)

    return read(weights, None), read(weights, rollout.expert_BTM)


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's order of tokens and its kernel's plain twin; what was asked for."""
    asked = []
    monkeypatch.setattr(kernels, "choose", lambda *given: asked.append(given) or "cudnn")
    monkeypatch.setattr(kernels, "CUDNN", "xla")
    return asked


def read_of(rollout):
    """bool [B, T], tokens that the sampler has read: all but the last of each row."""
    real_BT = np.asarray(rollout.attention_mask_BT) != 0
    last_B = np.where(real_BT, np.arange(real_BT.shape[1]), 0).max(1)
    real_BT[np.arange(len(real_BT)), last_B] = False
    return real_BT


def test_what_the_sampler_keeps_is_what_whole_rows_take(mixture, rollout, rows):
    """Of prompts and responses, ended and cut; and nothing of tokens that it never read."""
    kept, known = np.asarray(rollout.expert_BTM), read_of(rollout)
    assert len(set(known.sum(1).tolist())) > 3
    assert 0 < rollout.ended_B.sum() < len(known)
    assert kept.dtype == np.uint8
    assert kept.shape == (*known.shape, mixture.decoder.layers * EACH)
    np.testing.assert_array_equal(kept[known], rows[0][1][known])
    assert (kept[~known] == 255).all()


def test_in_float32_it_changes_nothing(rows):
    """Not a bit, of real tokens and of padding."""
    jax.tree.map(np.testing.assert_array_equal, *rows)


def test_what_prompts_leave_is_where_their_tokens_are(mixture, weights, rollout, rows, cudnn):
    """Of a kernel that moves tokens: rows as their routers choose, and the sampler's own."""
    texts = rollout.token_BT, rollout.attention_mask_BT
    _, kept = jax.jit(partial(mixture.apply, keep=True))(weights, *texts)
    real = np.asarray(rollout.attention_mask_BT) != 0
    np.testing.assert_array_equal(joined(kept.expert)[real], rows[0][1][real])
    again = partial(sample, mixture, sample_config=DRAW)  # draw_rollout is compiled already
    drawn = jax.jit(again)(weights, PROMPT, PROMPT_MASK, KEY)
    assert len(cudnn) > 1
    np.testing.assert_array_equal(drawn.token_BT, rollout.token_BT)
    np.testing.assert_array_equal(drawn.expert_BTM, rollout.expert_BTM)


def test_a_mesh_that_splits_lengths_keeps_the_same(mixture, weights, rollout):
    mesh = make_mesh(MeshConfig(data=2, expert=2, context=2))
    policy = jax.device_put(weights, shardings(mixture.axes(head=True), mesh))
    with jax.set_mesh(mesh):
        prompts = put_rows((PROMPT, PROMPT_MASK), mesh)
        found = draw_rollout(mixture, policy, *prompts, KEY, DRAW)
    np.testing.assert_array_equal(found.token_BT, rollout.token_BT)
    np.testing.assert_array_equal(found.expert_BTM, rollout.expert_BTM)


def test_slots_keep_the_same(mixture, weights, rollout):
    found = draw_rollout(mixture, weights, PROMPT, PROMPT_MASK, KEY, replace(DRAW, slots=3))
    np.testing.assert_array_equal(found.token_BT, rollout.token_BT)
    np.testing.assert_array_equal(found.expert_BTM, rollout.expert_BTM)


def test_in_bfloat16_it_takes_away_what_routers_add(mixture, weights):
    """The mean difference between the sampler's log-probs and those that are scored."""
    narrow, wide = replace(mixture, dtype="bfloat16"), replace(DRAW, n=16, stop=())
    near = jax.tree.map(lambda x: x, weights)
    near["layers"]["mlp"]["router"]["kernel"] *= 0.3  # nearer ties, and experts that say more
    near["layers"]["mlp"]["down"]["kernel"] *= 16
    drawn = draw_rollout(narrow, near, PROMPT, PROMPT_MASK, KEY, wide)
    texts = drawn.token_BT, drawn.attention_mask_BT

    @jax.jit
    def gap(expert):
        logp_BT = score(narrow, near, *texts, expert_BTM=expert)
        return (jnp.abs(logp_BT - drawn.logp_BT) * drawn.mask_BT).sum() / drawn.mask_BT.sum()

    with_them, without = float(gap(drawn.expert_BTM)), float(gap(None))
    assert with_them < 0.6 * without, (with_them, without)


@pytest.mark.parametrize("normalise", [True, False])
def test_weights_are_of_the_router_as_it_is(mixture, weights, normalise):
    """Of the experts that are given; of nobody's, the likeliest. A gradient comes back."""
    decoder = replace(mixture.decoder, moe=replace(mixture.decoder.moe, normalise=normalise))
    layer = jax.tree.map(lambda x: x[0], weights["layers"]["mlp"])
    graph, _ = nnx.split(Experts(decoder, nnx.Rngs(0), None))
    x = jnp.array(np.random.default_rng(0).standard_normal((1, 2, 32)), jnp.float32)
    given = jnp.array([[[6, 0, 3], [255] * 3]], jnp.uint8)

    def routed(layer, given):
        return nnx.merge(graph, layer).route(x, given)

    found, own = routed(layer, given), routed(layer, None)
    logits = np.asarray(x @ layer["router"]["kernel"], np.float64)
    chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_array_equal(found.expert[0, 0], [6, 0, 3])
    part = chance[0, 0, [6, 0, 3]]
    np.testing.assert_allclose(
        found.weight[0, 0], part / (part.sum() if normalise else 1), rtol=1e-5
    )
    np.testing.assert_array_equal(found.expert[0, 1], own.expert[0, 1])
    np.testing.assert_array_equal(found.weight[0, 1], own.weight[0, 1])
    slope = jax.grad(lambda layer: routed(layer, given).weight[0, 0, 0])(layer)
    assert (np.abs(slope["router"]["kernel"][:, 6]) > 0).any()


def test_ids_are_as_small_as_they_can_be(mixture):
    for experts, kind in ((255, jnp.uint8), (256, jnp.uint16)):
        moe = replace(mixture.decoder.moe, experts=experts)
        none = unknown(replace(mixture.decoder, moe=moe), (2,))
        assert none.dtype == kind
        assert nobody(none) == none[0, 0] >= experts


def forced(mixture, batch, seed):
    """A batch whose tokens take experts that no router would choose, but for nobody's."""
    rng, shape = np.random.default_rng(seed), batch.token_BT.shape
    order = np.tile(np.arange(EXPERTS), (*shape, mixture.decoder.layers, 1))
    expert = rng.permuted(order, axis=-1)[..., :EACH].reshape(*shape, -1)
    known = np.asarray(batch.attention_mask_BT) != 0
    known[:, -1] = False
    return replace(batch, expert_BTM=np.where(known[..., None], expert, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def batches(mixture, batch):
    return [forced(mixture, batch, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def steps(mixture, weights, batches):
    """What a step on either takes away from the weights."""
    found = learnt(mixture, weights, batches, {"microbatches": 4})
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), *found)
    assert max(jax.tree.leaves(apart)) > 1e-2  # or nothing would be said
    return found


def learnt(mixture, weights, batches, how, mesh=None):
    """What a step on each batch takes away from the weights."""
    tx, loss = optax.sgd(1.0), policy_loss(mixture, ppo(PPOConfig()), first=4, value_coef=0.5)
    update = make_update(tx, loss, model=mixture, donate=False, **how)
    state = TrainState.create(weights, tx)
    if mesh is not None:
        mesh = make_mesh(mesh)
        layout = shardings(mixture.axes(head=True), mesh)
        state = replace(state, params=jax.device_put(weights, layout))
        batches = [put_rows(batch, mesh) for batch in batches]
    with jax.set_mesh(mesh) if mesh else nullcontext():
        after = jax.device_get([update(state, batch)[0].params for batch in batches])
    return [jax.tree.map(lambda x, y: x - y, weights, params) for params in after]


@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        (MeshConfig(data=2, expert=2, tensor=2), {"packed": 4}),
        (MeshConfig(data=2, expert=2, context=2), {"microbatches": 2}),
        (MeshConfig(data=1, fsdp=2, context=2, tensor=2), {"packed": 4}),
    ],
)
def test_updates_take_them_however_rows_are_laid(mesh, how, mixture, weights, batches, steps):
    """In microbatches, packed, over a mesh that splits rows, their length and the experts."""
    (found,) = learnt(mixture, weights, batches[:1], how, mesh)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, steps[0])


@pytest.mark.parametrize("how", [{"microbatches": 2}, {"packed": 4}], ids=str)
def test_a_kernel_that_moves_tokens_moves_theirs(how, mixture, weights, batches, steps, cudnn):
    """cuDNN's wants the real tokens of a row first, and takes no packed rows."""
    (found,) = learnt(mixture, weights, batches[:1], how)
    assert len(cudnn) > 0
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, steps[0])


def test_a_shared_trunk_takes_them_and_a_critic_of_its_own_does_not(mixture, weights, batch):
    given = forced(mixture, batch, 1)
    for head_only in (True, False):
        loss = critic_loss(mixture, ppo(PPOConfig()), head_only=head_only)
        value = jax.jit(lambda x, loss=loss: loss(weights, None, x)[0])
        assert (value(given) == value(batch)) == (not head_only)


def test_rows_that_move_keep_theirs():
    """On a mesh, of a last axis that does not divide over it."""
    mesh = make_mesh(MeshConfig(data=4, expert=2))
    x, row = np.arange(16 * 3 * 5).reshape(16, 3, 5), np.random.default_rng(0).permutation(16)
    with jax.set_mesh(mesh):
        found = jax.jit(take_rows)(put_rows(x, mesh), row[:8])
    np.testing.assert_array_equal(found, x[row[:8]])


def test_an_iteration_scores_again_and_learns_with_them(mixture, weights, rollout):
    """GRPO of what a sampler says that it took: the ratio is 1 though no router would choose it."""
    given = forced(mixture, rollout, 1)
    iteration = make_iteration(
        mixture,
        optax.sgd(1e-2),
        lambda rollout: (rollout.token_BT % 2 * rollout.mask_BT).sum(1),
        config=GRPOConfig(old_logp="rescore"),
        sample_config=DRAW,
        sampler=lambda *_, **__: given,
        donate=False,
    )
    policy = {name: x for name, x in weights.items() if name != "head"}
    state = TrainState.create(policy, optax.sgd(1e-2))
    _, metrics, _ = iteration(state, policy, PROMPT, PROMPT_MASK, KEY)
    assert metrics["sample_gap"] > 0.1
    assert abs(metrics["kl"]) > 0.01  # the reference chooses by itself
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("slots", [0, 3])
def test_ids_of_two_bytes_reach_the_update(slots, decoder, random_weights):
    """300 experts, from the sampler on. In float32 they change nothing, but for their lower byte
    alone; tokens that were never read have nobody's, of two bytes too."""
    moe = MoeConfig(experts=300, per_token=EACH)
    mixture = Model(replace(decoder, moe=moe, mlp=4, qk_norm=True))
    weights, tx = random_weights(mixture.shapes(), 3), optax.sgd(1.0)
    draw = replace(DRAW, slots=slots)
    rollout = draw_rollout(mixture, weights, PROMPT, PROMPT_MASK, KEY, draw)
    kept, known = np.asarray(rollout.expert_BTM), read_of(rollout)
    assert kept.dtype == np.uint16
    assert (kept[known] < 300).all()
    assert ((kept[known] > 255).sum(-1) > 0).mean() > 0.3
    assert (kept[~known] == 65535).all()

    def after(expert_BTM):
        iteration = make_iteration(
            mixture,
            tx,
            lambda rollout: (rollout.token_BT % 2 * rollout.mask_BT).sum(1),
            config=GRPOConfig(old_logp="rescore"),
            sample_config=replace(draw, router_replay=expert_BTM is not None),
            sampler=lambda *_, **__: replace(rollout, expert_BTM=expert_BTM),
            donate=False,
        )
        state = TrainState.create(weights, tx)
        return iteration(state, weights, PROMPT, PROMPT_MASK, KEY)[0].params

    expected, found = after(None), after(rollout.expert_BTM)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, expected)
    cut = after(rollout.expert_BTM % 256)
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), cut, expected)
    assert max(jax.tree.leaves(apart)) > 1e-2


def test_it_is_on_in_bfloat16_alone(mixture, model):
    narrow, asked = replace(mixture, dtype="bfloat16"), SampleConfig(router_replay=True)
    plain, never = SampleConfig(), SampleConfig(router_replay=False)
    assert replays(narrow, plain)
    assert not replays(mixture, plain)
    assert replays(mixture, asked)
    assert not replays(narrow, never)
    assert not replays(replace(model, dtype="bfloat16"), plain)
    with pytest.raises(InputError, match=r"sample\.router_replay=true: the model is no mixture"):
        replays(model, asked)
