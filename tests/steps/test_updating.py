"""The update: additive over microbatches and devices, safe against NaN, and frozen where it is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms import ppo
from jaxrlhf.config import MeshConfig, OptimConfig, PPOConfig
from jaxrlhf.core import masked
from jaxrlhf.core.types import TrainState
from jaxrlhf.mesh.sharding import make_mesh, put_rows, shardings, train_state_shardings
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import combine, decays, make_optimizer, make_update, nothing, policy_loss

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


def test_make_update_skips_what_is_not_finite():
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
