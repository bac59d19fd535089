"""Losses joined to a model, and one optimizer step: gradients, splits, skipped steps, layouts."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms import Algorithm, ppo, process_reward_model, reward_model, sft
from jaxrlhf.config import (
    MeshConfig,
    OptimConfig,
    PPOConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SFTConfig,
)
from jaxrlhf.core import masked
from jaxrlhf.core.types import PreferenceBatch, TokenBatch, TrainState
from jaxrlhf.data.batches import packed_batch, token_batch
from jaxrlhf.data.formats import Completion
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.mesh.sharding import make_mesh, put_rows, shardings, train_state_shardings
from jaxrlhf.steps.pieces import combine, nothing
from jaxrlhf.steps.score import reward, score
from jaxrlhf.steps.update import (
    at_position,
    candidate_logp,
    candidate_scores,
    candidate_token_scores,
    combine_params,
    combine_updates,
    critic_loss,
    decays,
    make_optimizer,
    make_update,
    pairs_loss,
    policy_loss,
    reward_model_loss,
    sft_loss,
)

P = 4
PPO = ppo(PPOConfig(entropy_coef=0.01))


score_rows = jax.jit(score, static_argnums=0)


def start(params, tx):
    """A state whose arrays may be donated."""
    return TrainState.create(jax.tree.map(jnp.copy, params), tx)


def close(left, right, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), left, right)


def checksum(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def weighted_sum(params, frozen, rows):
    """Σ weight·(scale·x): with ``scale`` 1, its gradient is the weighted mean itself."""
    x, weight = rows
    total = (weight * x).sum() * params["scale"]
    return total, {
        "total": total,
        "x_max": x.max(),
        "x_min": x.min(),
        "rows_max": jnp.array(len(x)),
    }


def weighted_update(x, mask, **settings):
    """Loss, gradient (from a step of plain SGD) and metrics of ``weighted_sum``."""
    x, mask = jnp.array(x)[:, None], jnp.array(mask)[:, None]
    tx = optax.sgd(1.0)
    update = make_update(tx, weighted_sum, **settings)
    state, metrics = update(start({"scale": jnp.ones(())}, tx), (x, masked.weights(mask)))
    return metrics, 1 - state.params["scale"]


# Learning rate and weight decay


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (OptimConfig(learning_rate=1.0), [1, 1, 1, 1]),
        (OptimConfig(learning_rate=1.0, warmup=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (OptimConfig(learning_rate=1.0, warmup=1), [1, 1, 1]),
        (OptimConfig(learning_rate=1.0, schedule="linear"), [1, 0.9, 0.8, 0.7]),
        (OptimConfig(learning_rate=1.0, schedule="linear", warmup=2), [0.5, 1, 1, 0.875, 0.75]),
        (
            OptimConfig(learning_rate=2.0, schedule="cosine"),
            [1 + np.cos(np.pi * t / 10) for t in range(10)],
        ),
    ],
    ids=["constant", "warmup", "warmup of one", "linear", "warmup linear", "cosine"],
)
def test_make_optimizer_schedule(config, rates):
    """A gradient that never changes moves adam by the learning rate each step."""
    tx = make_optimizer(replace(config, max_grad_norm=1e9), steps=10)
    step = jax.jit(tx.update)
    params = {"kernel": jnp.zeros(())}
    state = tx.init(params)
    for rate in rates:
        change, state = step({"kernel": jnp.ones(())}, state, params)
        np.testing.assert_allclose(change["kernel"], -rate, rtol=1e-4)


def test_make_optimizer_needs_steps_to_decay():
    with pytest.raises(ValueError, match=r"optim\.schedule=cosine: make_optimizer needs steps"):
        make_optimizer(OptimConfig(schedule="cosine"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_position_moves_the_schedule_alone(dtype):
    """A gradient that never changes moves adam by rate(t); its bias correction is of its steps."""
    config = OptimConfig(1.0, "linear", max_grad_norm=1e9, state_dtype=dtype)
    tx = make_optimizer(config, steps=10)
    grads, state = {"kernel": jnp.ones(())}, start({"kernel": jnp.zeros(())}, tx)
    for position, rate in [(0, 1.0), (7, 0.3), (7, 0.3), (2, 0.8), (10, 0.0)]:
        moved = at_position(state, position)
        adam = [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(x)]
        also = [x for x in jax.tree.leaves(moved.opt_state, is_leaf=is_adam) if is_adam(x)]
        jax.tree.map(np.testing.assert_array_equal, adam, also)
        assert jax.tree.structure(moved) == jax.tree.structure(state)
        change, opt_state = tx.update(grads, moved.opt_state, moved.params)
        np.testing.assert_allclose(change["kernel"], -rate, rtol=1e-2, atol=1e-7)
        state = replace(moved, opt_state=opt_state)
    assert adam[0].count == 4


def test_at_position_leaves_a_state_without_a_schedule():
    state = start({"kernel": jnp.zeros(())}, optax.sgd(0.1))
    jax.tree.map(np.testing.assert_array_equal, at_position(state, 3), state)


def test_combine_updates_keeps_the_last_rate():
    parts = [{"learning_rate": 1.0, "loss": 1.0}, {"learning_rate": 0.5, "loss": 2.0}]
    assert combine_updates(parts) == {"learning_rate": 0.5, "loss": 1.5}


def test_make_optimizer_eps_is_outside_the_root():
    tx = make_optimizer(OptimConfig(learning_rate=1.0, eps=1e-5, b2=0.999))
    params = {"kernel": jnp.zeros(())}
    change, _ = tx.update({"kernel": jnp.array(1e-6)}, tx.init(params), params)
    np.testing.assert_allclose(change["kernel"], -0.0909091, atol=1e-6)


def test_make_optimizer_clips_the_global_norm():
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    tx = make_optimizer(OptimConfig(learning_rate=1.0, eps=1.0, max_grad_norm=0.5))
    change, _ = tx.update({"a": jnp.array(3.0), "b": jnp.array(4.0)}, tx.init(params), params)
    np.testing.assert_allclose([change["a"], change["b"]], [-0.3 / 1.3, -0.4 / 1.4], rtol=1e-5)


def test_make_optimizer_decays_weights_alone(model, params, lora):
    tx = make_optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.5))
    tree = {**params, "lora": lora, "qkv": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, tree)
    change, _ = jax.jit(tx.update)(zero, tx.init(tree), tree)
    expected = jax.tree.map(lambda x, d: -0.05 * x if d else 0 * x, tree, decays(tree))
    close(change, expected, 1e-7)
    spared = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, decay in jax.tree_util.tree_leaves_with_path(decays(tree))
        if not decay
    }
    norms = {"norm.scale", "layers.attention_norm.scale", "layers.mlp_norm.scale"}
    assert spared == norms | {"head.kernel", "head.bias", "qkv.bias"}


# The state in another dtype


def test_keep_state_in_bfloat16_by_hand():
    """m = 0.1·g and v = 0.05·g² rounded to eight bits, and the second step from those."""
    config = OptimConfig(learning_rate=1.0, eps=1e-8, max_grad_norm=1e9, state_dtype="bfloat16")
    tx, params, g = make_optimizer(config), {"kernel": jnp.zeros(2)}, np.array([1.0, 3.0])
    state = tx.init(params)
    _, state = tx.update({"kernel": jnp.array(g, jnp.float32)}, state, params)
    adam = next(x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))
    assert {x.dtype.name for x in (*adam.mu.values(), *adam.nu.values())} == {"bfloat16"}
    assert adam.count.dtype == jnp.int32
    m, v = np.array([0.10009765625, 0.30078125]), np.array([0.050048828125, 0.44921875])
    np.testing.assert_array_equal(np.float32(adam.mu["kernel"]), np.float32(m))
    np.testing.assert_array_equal(np.float32(adam.nu["kernel"]), np.float32(v))
    change, _ = tx.update({"kernel": jnp.array(g, jnp.float32)}, state, params)
    m, v = (0.9 * m + 0.1 * g) / (1 - 0.9**2), (0.95 * v + 0.05 * g**2) / (1 - 0.95**2)
    np.testing.assert_allclose(change["kernel"], -m / np.sqrt(v), rtol=1e-6)


def test_keep_state_in_bfloat16_lies_as_its_parameters_do(model, params):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes, layout = jax.eval_shape(lambda: params), shardings(model.axes(True), mesh)
    tx = make_optimizer(OptimConfig(state_dtype="bfloat16"))
    where = train_state_shardings(tx, shapes, layout, mesh)
    state = jax.jit(lambda p: TrainState.create(p, tx), out_shardings=where)(params)
    adam = next(x for x in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(x))
    for moment in (adam.mu, adam.nu):
        for x, weight in zip(*map(jax.tree.leaves, (moment, state.params)), strict=True):
            assert (x.dtype, weight.dtype) == (jnp.bfloat16, jnp.float32)
            assert x.sharding == weight.sharding


def is_adam(x):
    return hasattr(x, "mu")


# Microbatches and devices


def test_make_update_token_mean_over_microbatches():
    """Four tokens of loss 1 and one of loss 5: a mean of two means would be 3."""
    x = [[1, 1, 1, 1], [5, 9, 9, 9]]
    mask = [[1, 1, 1, 1], [1, 0, 0, 0]]
    tx = optax.sgd(1.0)
    rows = jnp.array(x, jnp.float32), masked.weights(jnp.array(mask))
    update = make_update(tx, weighted_sum, microbatches=2)
    state, metrics = update(start({"scale": jnp.ones(())}, tx), rows)
    np.testing.assert_allclose(metrics["loss"], 1.8, atol=1e-6)
    np.testing.assert_allclose(1 - state.params["scale"], 1.8, atol=1e-6)


def test_make_update_metrics_of_microbatches():
    metrics, _ = weighted_update([1.0, 2, 3, 10, -1, 0], [1, 1, 1, 1, 0, 0], microbatches=3)
    np.testing.assert_allclose(metrics["total"], 4.0, rtol=1e-6)
    assert metrics["x_max"] == 10
    assert metrics["x_min"] == -1
    assert metrics["rows_max"] == 2
    np.testing.assert_allclose(metrics["grad_norm"], 4.0, rtol=1e-6)
    assert metrics["skipped"] == 0


def test_make_update_microbatches_must_divide():
    with pytest.raises(ValueError, match="4 rows % microbatches=3"):
        weighted_update([1.0, 2, 3, 4], [1] * 4, microbatches=3)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_make_update_mean_is_over_all_devices(microbatches):
    """[1, 2, 3, 10] with the 10 masked out, over four devices: 2, where their means give 1.5."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    x = np.repeat(np.array([1.0, 2, 3, 10], np.float32), 2)[:, None]
    weight = np.asarray(masked.weights(jnp.array(np.repeat([1, 1, 1, 0], 2)[:, None])))
    tx = optax.sgd(1.0)
    with jax.set_mesh(mesh):
        rows = put_rows((x, weight), mesh)
        assert len(rows[0].sharding.device_set) == 4
        update = make_update(tx, weighted_sum, microbatches)
        state, metrics = update(start({"scale": jnp.ones(())}, tx), rows)
    np.testing.assert_allclose(metrics["loss"], 2.0, atol=1e-6)
    np.testing.assert_allclose(1 - state.params["scale"], 2.0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
@pytest.mark.parametrize("name", ["x_max", "x_min", "x"])
def test_nothing_changes_no_metric(name, dtype):
    for x in (jnp.array(-3, dtype), jnp.array(4, dtype)):
        found = combine(name, nothing(name, x), x)
        assert (found, found.dtype) == (x, dtype)


def test_make_update_compiles_the_loss_once_for_all_microbatches():
    tx, seen = optax.sgd(1.0), []

    def loss(params, frozen, rows):
        seen.append(1)
        return weighted_sum(params, frozen, rows)

    rows = jnp.ones((4, 1)), jnp.full((4, 1), 0.25)
    update = make_update(tx, loss, microbatches=4)
    text = str(update.trace(start({"scale": jnp.ones(())}, tx), rows).jaxpr)
    assert text.count("scan[") == 1
    assert text.count("reduce_max") == 1
    assert len(seen) == 2  # once for its shapes


def test_combine_by_name():
    two, three = jnp.array(2.0), jnp.array(3.0)
    assert combine("ratio_max", two, three) == 3
    assert combine("ratio_min", two, three) == 2
    assert combine("max_ratio", two, three) == 5


def test_make_update_leaves_the_frozen_weights_alone(model, params, lora, batch):
    """Five donated updates later the frozen weights, and a reference copy, are bit for bit."""
    reference = jax.tree.map(jnp.copy, lora)
    before = checksum((params, reference))
    tx = make_optimizer(OptimConfig(learning_rate=1e-2))
    update = make_update(tx, policy_loss(model, PPO, 0.7, P, value_coef=0.3))
    state = start({"lora": lora, "head": params["head"]}, tx)
    first = state.params["lora"]
    for _ in range(5):
        state, _ = update(state, batch, params)
    assert checksum((params, reference)) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))  # they were donated
    assert checksum(state.params["lora"]) != checksum(lora)
    assert sorted(state.params) == ["head", "lora"]


def test_make_update_never_donates_the_frozen_weights():
    """Not even a scalar, in whose place a metric would fit."""
    tx = optax.sgd(0.1)
    update = make_update(tx, lambda p, frozen, x: (x * (p - frozen) ** 2, {}))
    frozen, state = jnp.array(3.0), start(jnp.zeros(()), tx)
    for _ in range(5):
        state, _ = update(state, jnp.ones(()), frozen)
    assert frozen == 3
    np.testing.assert_allclose(state.params, 3 * (1 - 0.8**5), rtol=1e-5)


# Gradients that are not finite


@pytest.mark.parametrize("devices", [1, 8])
def test_make_update_skips_what_is_not_finite(devices):
    """In a branch, which one CPU takes, and number by number."""
    with jax.set_mesh(make_mesh(MeshConfig())) if devices > 1 else nullcontext():
        skips()


def skips():
    """After a good step, four that are not finite change nothing, and another good one is taken."""
    tx = make_optimizer(OptimConfig(learning_rate=0.1))

    def loss(params, frozen, x):
        total = (params["kernel"] * x).sum() + frozen["offset"]
        return total + jnp.sqrt((params["kernel"] * frozen["scale"]).sum()), {}

    update = make_update(tx, loss, donate=False)
    good, bad = jnp.ones(3), jnp.array([1.0, jnp.nan, 1.0])
    fine = {"offset": jnp.zeros(()), "scale": jnp.ones(())}
    state, metrics = update(start({"kernel": jnp.ones(3)}, tx), good, fine)
    assert (int(state.step), int(state.skipped), float(metrics["skipped"])) == (1, 0, 0)
    before = checksum((state.params, state.opt_state))
    cases = [
        (bad, fine),
        (good * jnp.inf, fine),
        (good, {**fine, "offset": jnp.array(jnp.nan)}),  # the loss alone
        (good, {**fine, "scale": jnp.zeros(())}),  # the gradient alone: that of a root at 0
    ]
    for count, (x, frozen) in enumerate(cases, start=1):
        state, metrics = update(state, x, frozen)
        assert jnp.isfinite(metrics["loss"]) == (count == 4)
        assert checksum((state.params, state.opt_state)) == before
        assert (int(state.step), int(state.skipped), float(metrics["skipped"])) == (1, count, 1)
    state, metrics = update(state, good, fine)
    assert checksum(state.params) != before[:1]
    assert (int(state.step), int(state.skipped), float(metrics["skipped"])) == (2, 0, 0)


def test_make_update_copies_no_moment():
    """What a CPU would compute twice, with the parameters and for itself, it copied first."""
    tx, kernel = make_optimizer(OptimConfig()), jnp.ones((48, 80))

    def loss(params, frozen, x):
        return (params["kernel"] * x).sum(), {}

    state = start({"kernel": kernel}, tx)
    text = make_update(tx, loss).lower(state, kernel).compile().as_text()
    assert "f32[48,80]" in text
    assert not re.findall(r"= f32\[48,80\]\S* copy\(", text)


def test_policy_loss_microbatches_change_nothing(model, params, lora, batch):
    """The same step in one piece and in four, with adapters, entropy and a shared critic."""
    tx = optax.sgd(1.0)
    loss = policy_loss(model, PPO, 0.7, P, value_coef=0.3)
    trainable = {"lora": lora, "head": params["head"]}
    whole, four = (
        make_update(tx, loss, microbatches)(start(trainable, tx), batch, params)
        for microbatches in (1, 4)
    )
    assert whole[1]["grad_norm"] > 0.01
    close(whole[0].params, four[0].params, 1e-5)
    close(whole[1], four[1], 1e-5)


# What is learnt, and what is not


def test_policy_loss_is_the_algorithms_at_the_samplers_temperature(model, params, batch):
    """The ratio is 1 where old log-probs come from ``score``, over two passes at rate 0."""
    gap = Algorithm(
        targets=None,
        loss=lambda outputs, batch: (
            (outputs.logp_BT * batch.weight_BT).sum(),
            {"gap_max": jnp.abs((outputs.logp_BT - batch.old_logp_BT) * batch.mask_BT).max()},
        ),
    )
    tx = make_optimizer(OptimConfig(learning_rate=0.0))
    update = make_update(tx, policy_loss(model, gap, 0.7, P))
    old = score_rows(model, params, batch.token_BT, batch.attention_mask_BT, 0.7)
    batch = batch.replace(old_logp_BT=old)
    state = start(params, tx)
    for _ in range(2):
        for rows in (slice(0, 4), slice(4, 8)):
            state, metrics = update(state, jax.tree.map(lambda x, r=rows: x[r], batch))
            assert metrics["gap_max"] <= 1e-5
    assert state.step == 4


def test_policy_loss_value_coef(model, params, batch):
    """Policy loss plus ``value_coef`` times the value loss, both from one forward pass."""

    @jax.jit
    def losses(params):
        alone, _ = policy_loss(model, PPO, 0.7, P)(params, None, batch)
        both, metrics = policy_loss(model, PPO, 0.7, P, value_coef=0.3)(params, None, batch)
        value, _ = critic_loss(model, PPO)(params, None, batch)
        return alone, both, value, metrics["value_loss"]

    alone, both, value, metric = losses(params)
    np.testing.assert_allclose(both, alone + 0.3 * value, rtol=1e-5)
    np.testing.assert_allclose(metric, value, rtol=1e-5)
    assert value > 0.1


def test_policy_loss_has_no_gradient_in_its_targets(model, params, batch):
    loss = policy_loss(model, PPO, 0.7, P, value_coef=0.3)
    names = ["old_logp_BT", "advantage_BT", "return_BT", "old_value_BT"]

    def of_targets(targets):
        return loss(params, None, batch.replace(**targets))[0]

    grads = jax.jit(jax.grad(of_targets))({name: getattr(batch, name) for name in names})
    for name in names:
        assert (grads[name] == 0).all(), name


def test_critic_loss_head_only_holds_the_trunk(model, params, lora, batch):
    trainable = {"lora": lora, "head": params["head"]}

    @jax.jit
    def grads(trainable, frozen):
        loss = critic_loss(model, PPO, head_only=True)
        return jax.grad(lambda p, f: loss(p, f, batch)[0], argnums=(0, 1))(trainable, frozen)

    learnt, held = grads(trainable, params)
    assert jnp.abs(learnt["head"]["kernel"]).max() > 0.01
    for leaf in jax.tree.leaves((learnt["lora"], held)):
        assert (leaf == 0).all()


def test_combine_params(params, lora):
    head = {"kernel": jnp.ones(32), "bias": jnp.ones(())}
    assert combine_params(params, None) == (params, None)
    weights, adapters = combine_params({"lora": lora, "head": head}, params)
    assert weights["head"] is head
    assert weights["layers"] is params["layers"]
    assert adapters is lora
    assert params["head"] is not head
    with pytest.raises(ValueError, match="adapters need the frozen weights"):
        combine_params({"lora": lora}, None)


# Reward models and imitation


def test_reward_model_loss_scores_every_candidate(model, params, batch):
    """Candidates are rows of their own: [B, C, T] is scored as [B·C, T]."""
    token, real = batch.token_BT, batch.attention_mask_BT
    pairs = PreferenceBatch(
        token_BCT=token.reshape(4, 2, 10),
        attention_mask_BCT=real.reshape(4, 2, 10),
        margin_B=np.zeros(4, np.float32),
        weight_B=np.full(4, 0.25, np.float32),
    )
    alone = jax.jit(reward, static_argnums=0)(model, params, token, real).reshape(4, 2)
    scores = jax.jit(candidate_scores, static_argnums=0)(model, params, None, pairs)
    np.testing.assert_allclose(scores, alone, atol=1e-6)
    loss = jax.jit(reward_model_loss(model, reward_model(RewardModelConfig())))
    total, metrics = loss(params, None, pairs)
    chosen, rejected = np.asarray(alone, np.float64).T
    np.testing.assert_allclose(total, np.log1p(np.exp(rejected - chosen)).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (chosen > rejected).mean())


def test_reward_model_loss_reads_steps_at_their_tokens(model, params, batch):
    """The head at columns 5 and 7: p of the first is to be 1, of the second 0."""
    token, real = batch.token_BT[:, None], batch.attention_mask_BT[:, None]
    step, label = np.zeros((2, *token.shape), np.float32)
    step[..., [5, 7]] = label[..., 5] = 1
    rows = PreferenceBatch(
        token_BCT=token,
        attention_mask_BCT=real,
        margin_B=np.zeros(8, np.float32),
        weight_B=np.full(8, 1 / 8, np.float32),
        step_mask_BCT=step,
        label_BCT=label,
    )
    scores = jax.jit(candidate_token_scores, static_argnums=0)(model, params, None, rows)
    hidden, _ = model.apply(params, batch.token_BT, batch.attention_mask_BT)
    np.testing.assert_allclose(scores[:, 0], model.scalar(params, hidden), atol=1e-5)
    loss = jax.jit(reward_model_loss(model, process_reward_model(ProcessRewardModelConfig())))
    first, second = np.asarray(scores, np.float64)[:, 0, [5, 7]].T
    wanted = (np.log1p(np.exp(-first)) + np.log1p(np.exp(second))).mean() / 2
    np.testing.assert_allclose(loss(params, None, rows)[0], wanted, rtol=1e-5)


def test_sft_loss_is_the_mean_negative_logp(model, params, batch):
    rows = TokenBatch(batch.token_BT, batch.attention_mask_BT, batch.weight_BT)
    loss, _ = jax.jit(sft_loss(model, sft(SFTConfig())))(params, None, rows)
    logp = score_rows(model, params, batch.token_BT, batch.attention_mask_BT, 1.0)
    np.testing.assert_allclose(loss, -masked.mean(logp, batch.mask_BT), rtol=1e-5)


def test_sft_loss_packed_is_that_of_the_rows(model, params):
    """Seven rows, and the same seven in four packed rows: one loss, one gradient."""
    rng = np.random.default_rng(0)
    rows = [
        Encoded(
            rng.integers(0, model.decoder.vocab, p).tolist(),
            (rng.integers(0, model.decoder.vocab, a).tolist(),),
            Completion("", "", {}, "x:1"),
        )
        for p, a in ((1, 5), (4, 3), (2, 2), (3, 6), (1, 1), (5, 4), (2, 7))
    ]
    alone = token_batch(rows, 20, 0)
    packed = packed_batch([rows[:2], rows[2:5], rows[5:6], rows[6:]], 20, 0)
    assert packed.token_BT.shape == (4, 20)
    loss = sft_loss(model, sft(SFTConfig()))
    tx = optax.sgd(1.0)

    def step(batch, pieces):
        update = make_update(tx, loss, pieces)
        state, metrics = update(start(params, tx), jax.tree.map(jnp.asarray, batch))
        return state.params, metrics

    (apart, one), (together, other) = step(alone, 1), step(packed, 2)
    assert one["tokens"] == other["tokens"] == 28
    np.testing.assert_allclose(one["loss"], other["loss"], atol=1e-5)
    close(apart, together, 1e-5)


def test_pairs_loss_gives_the_log_probs_of_every_candidate(model, params, batch):
    """What an algorithm that reads pairs is handed: score's, reshaped, 0 on the first column."""
    seen = []

    def loss(logp_BCT, rows):
        seen.append(logp_BCT)
        return (logp_BCT * rows.mask_BCT).sum(), {}

    token = jnp.asarray(batch.token_BT).reshape(4, 2, 10)
    real = jnp.asarray(batch.attention_mask_BT).reshape(4, 2, 10)
    pairs = PreferenceBatch(
        token_BCT=token,
        attention_mask_BCT=real,
        margin_B=jnp.zeros(4),
        weight_B=jnp.full(4, 0.25),
        mask_BCT=jnp.asarray(batch.mask_BT).reshape(4, 2, 10),
    )
    algorithm = Algorithm(None, loss, reads="pairs")
    total, _ = pairs_loss(model, algorithm, temperature=0.7)(params, None, pairs)
    rows = score(model, params, batch.token_BT, batch.attention_mask_BT, 0.7)
    np.testing.assert_allclose(seen[0], rows.reshape(4, 2, 10), atol=1e-6)
    np.testing.assert_allclose(total, (rows * batch.mask_BT).sum(), rtol=1e-5)
    again = candidate_logp(model, params, pairs, temperature=0.7, first=P)
    np.testing.assert_allclose(again[..., P:], rows.reshape(4, 2, 10)[..., P:], atol=1e-6)
    assert (again[..., :P] == 0).all()


def test_combine_updates_rule():
    got = combine_updates(
        [
            {"loss": jnp.float32(1), "ratio_max": 1.5, "ratio_min": 0.5, "max_kl": 1.0},
            {"loss": 2, "ratio_max": np.float32(1.25), "ratio_min": 0.25, "max_kl": 2.0},
            {"loss": 6, "extra": 4.0},
        ]
    )
    want = {"loss": 3, "ratio_max": 1.5, "ratio_min": 0.25, "max_kl": 1.5, "extra": 4}
    assert got == want
    assert all(type(x) is float for x in got.values())
    assert combine_updates([]) == {}


def test_combine_updates_nan_is_seen():
    got = combine_updates([{"x": 1.0, "x_max": 1.0}, {"x": math.nan, "x_max": math.nan}])
    assert math.isnan(got["x"])
    assert math.isnan(got["x_max"])
