"""What holds for every algorithm that samples, whatever its settings."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import (
    BASELINE,
    LOGP,
    POLICIES,
    REF,
    REWARD,
    VALID,
    VALUE,
    assert_tree_close,
    batch_of,
    group_of,
    loss_of,
    rollout,
    targets,
)

from jaxrlhf.algorithms import (
    ALGORITHMS,
)
from jaxrlhf.config import (
    Config,
    DataConfig,
    ModelConfig,
    OnlineDPOConfig,
    RewardConfig,
    SampleConfig,
)
from jaxrlhf.core.types import Outputs

"""1 on the tokens of rows whose reward is known."""

ALL = pytest.mark.parametrize("name", sorted(POLICIES))

SAMPLED = pytest.mark.parametrize("name", [*sorted(POLICIES), "online_dpo"])

K3 = {"kl_in": "loss", "kl_estimator": "k3"}
BAD = (jnp.nan, jnp.inf, -jnp.inf)


def config_of(name):
    return OnlineDPOConfig() if name == "online_dpo" else POLICIES[name]


def run_of(algorithm):
    """A run of it that ``check`` has nothing else to say about."""
    return Config(
        algorithm=algorithm,
        model=ModelConfig(path="smollm2"),
        rewards=(RewardConfig(function="sentiment"),),
        data=DataConfig(train="prompts.jsonl"),
        sample=SampleConfig(n=2),
    )


def whole(name, **changes):
    """An algorithm with every term in its loss."""
    changes = {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1, **changes}
    return replace(POLICIES[name], **changes)


def outputs_of(seed=0):
    """Of a policy that has moved a little since it sampled."""
    noise = 0.3 * jax.random.normal(jax.random.key(seed), (3, 6, 4))
    return Outputs(LOGP + noise[0], jnp.exp(noise[1]), VALUE + noise[2])


def total(config, outputs, batch):
    """Policy loss and value loss, if it has one, and their metrics."""
    algorithm = ALGORITHMS[config.name](config)
    value, metrics = algorithm.loss(outputs, batch)
    if algorithm.value_loss is not None:
        more, other = algorithm.value_loss(outputs, batch)
        value, metrics = value + more, {**metrics, **other}
    return value, metrics


def columns(tree, change):
    """Every [B, T] array of a tree through ``change``."""
    return jax.tree.map(lambda x: change(x) if x.ndim == 2 else x, tree)


@pytest.mark.parametrize(
    ("name", "changes", "beta", "wanted"),
    [
        *((name, {}, 0.0, 5 / 2) for name in ("a2c", "reinforce", "rloo", "remax")),
        ("reinforce", {"baseline": "none"}, 0.0, 5 / 2),
        *((name, {}, 0.0, -0.0439754) for name in ("ppo", "reinforce_pp", "dapo")),
        ("dapo", K3, 0.1, -0.0404262),
        ("grpo", {}, 0.0, 0.1710059),
        ("grpo", {}, 0.1, 0.1740470),
        ("dr_grpo", {}, 0.0, -0.0366462),
        ("dr_grpo", K3, 0.1, -0.0336885),
        ("dr_grpo", {"length": 6, **K3}, 0.1, -0.0336885 / 2),  # twice the width of the rows
        # row ratios e^−.13333 with A = 1, and e^.2 with A = −1: no bound holds them
        ("gspo", {}, 0.0, 0.1731147),
        ("gspo", {"clip_low": 0.2, "clip_high": 0.2}, 0.0, 0.1731147),
        ("gspo", K3, 0.1, 0.1731147 + 0.1740470 - 0.1710059),  # the KL stays a token's
        # weights e^.1, e^−.5, 1 | 1, 1.2; log-probs −1, −2, −3 | −.5, −.5
        ("cispo", {}, 0.0, (1.1051709 + 2 * 0.6065307 + 3 - 0.5 - 0.6) / 5),
        ("cispo", K3, 0.1, 4.2182323 / 5 + 0.0439754 - 0.0404262),
    ],
)
def test_loss_hand_computed(rows, name, changes, beta, wanted):
    """Of the shared rows; where there is no ratio, −Σ A·log π a row: (6 − 1)/2."""
    config = replace(POLICIES[name], **changes)
    loss = loss_of(config, rows.logp, batch_of(rows, config, beta))
    np.testing.assert_allclose(loss, wanted, rtol=0, atol=6e-7)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "online_dpo"])
def test_targets_of_one_sample(name):
    with pytest.raises(ValueError, match=r"sample\.n=1: a group needs at least 2"):
        targets(config_of(name), rollout(n=1))


@SAMPLED
def test_record(name):
    """Only critics have a value loss; ReMax asks for the greedy response."""
    algorithm = ALGORITHMS[name](config_of(name))
    critic = name in ("ppo", "a2c")
    extra = {"value"} if critic else {"greedy"} if name == "remax" else set()
    assert algorithm.needs == {"reference", *extra}
    assert (algorithm.value_loss is not None) == critic
    assert algorithm.reads == ("pairs" if name == "online_dpo" else "outputs")
    if name != "online_dpo":
        assert ALGORITHMS[name](whole(name)).needs == {"reference", "entropy", *extra}


@SAMPLED
def test_targets_no_gradient(name):
    """Whatever the old policy, the reference, the rewards or the critic hold is a number."""

    def numbers(logp, ref, reward, value):
        roll = rollout(logp_BT=logp, sample_logp_BT=logp, value_BT=value)
        result = targets(config_of(name), roll, ref, reward)
        floats = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((x**2).sum() for x in floats)

    arguments = (LOGP, REF, REWARD, VALUE)
    for gradient in jax.grad(numbers, range(4))(*arguments):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


@ALL
def test_targets_unknown_rewards_are_finite(name):
    """One row without, with numbers that are none in it; then all rows without."""
    config = whole(name, mask_truncated=True, off_policy="token")
    roll = rollout(logp_BT=LOGP.at[4].set(jnp.nan), value_BT=VALUE.at[4].set(jnp.inf))
    wanted = targets(config)
    result = targets(config, roll, REF.at[4].set(jnp.nan))
    assert_tree_close(result, wanted)
    nothing, metrics = targets(config, valid=jnp.zeros(6, bool))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((nothing, metrics)))
    assert (nothing.weight_BT == 0).all()
    loss, gradient = jax.value_and_grad(lambda o: total(config, o, nothing)[0])(outputs_of())
    assert loss == 0
    assert all((x == 0).all() for x in jax.tree.leaves(gradient))


@ALL
@pytest.mark.parametrize("kl_in", ["reward", "loss", "exact_loss"])
def test_targets_padding_changes_nothing(name, kl_in):
    """One column on the left and two on the right, of whatever they hold."""
    config = replace(whole(name, kl_in=kl_in), off_policy="sequence", length=3)

    def pad(x):
        bad = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 9
        return jnp.pad(x, ((0, 0), (1, 2)), constant_values=bad)

    clean, roll = rollout(), columns(rollout(), pad)
    zeros = {
        k: jnp.pad(getattr(clean, k), ((0, 0), (1, 2))) for k in ("mask_BT", "attention_mask_BT")
    }
    wanted, metrics = targets(config, clean)
    batch, same = targets(config, replace(roll, **zeros), pad(REF))
    assert_tree_close(same, metrics)
    assert_tree_close(
        columns(batch, lambda x: x[:, 1:-2]), replace(wanted, token_BT=batch.token_BT[:, 1:-2])
    )
    for array in (batch.mask_BT, batch.weight_BT, batch.advantage_BT):
        assert (array[:, [0, -2, -1]] == 0).all()
    loss = total(config, columns(outputs_of(), pad), batch)
    assert_tree_close(loss, total(config, outputs_of(), wanted))


@SAMPLED
@pytest.mark.parametrize(
    "row_B", [[3, 4, 5, 0, 1, 2], [2, 0, 1, 5, 3, 4]], ids=["prompts", "samples"]
)
def test_targets_permuted(name, row_B):
    """Prompts, and the samples of a prompt, in another order: the same for each row."""
    row_B = jnp.array(row_B)
    config = config_of(name)
    batch, metrics = targets(config)
    roll = jax.tree.map(lambda x: x[row_B], rollout())
    more = {"baseline_B": BASELINE[row_B]} if name == "remax" else {}
    moved, same = targets(config, roll, REF[row_B], REWARD[row_B], VALID[row_B], **more)
    assert_tree_close(same, metrics)
    if name == "online_dpo":  # its rows are prompts
        row_B = row_B[::3] // 3
    assert_tree_close(moved, jax.tree.map(lambda x: x[row_B], batch))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("rloo", [[1, -1, 0, 0], [0.5, 0, -1, 0.5]]),
        ("dr_grpo", [[0.5, -0.5, 0, 0], [1 / 3, 0, -2 / 3, 1 / 3]]),
        *((n, [[0.7071, -0.7071, 0, 0], [0.5773, 0, -1.1547, 0.5773]])
          for n in ("grpo", "dapo", "gspo", "cispo")),
    ],
)  # fmt: skip
def test_targets_of_groups(name, wanted):
    """Prompts A, A, B, B with rewards 1, 0, 1, 1; then one prompt, a reward of which is unknown."""
    roll, ref, reward, valid = group_of([1.0, 0, 1, 1])
    batch, _ = targets(POLICIES[name], replace(roll, n=2), ref, reward, valid)
    np.testing.assert_allclose(batch.advantage_BT, np.transpose([wanted[0]] * 2), atol=1e-4)
    reward, row = jnp.array([1, jnp.nan, 0, 1]), jnp.array([1, 0, 1, 1])
    batch, metrics = targets(POLICIES[name], roll, ref, reward, valid)
    np.testing.assert_allclose(batch.advantage_BT, np.transpose([wanted[1]] * 2), atol=1e-4)
    np.testing.assert_array_equal(batch.mask_BT, np.transpose([row] * 2))
    assert metrics["valid"] == 0.75


@ALL
@pytest.mark.parametrize("kl_in", ["loss", "exact_loss"])
def test_loss_no_gradient_into_the_batch(name, kl_in):
    """Exactly 0 for old log-probs, reference, advantages, returns and old values."""
    config = whole(name, kl_in=kl_in)
    batch, _ = targets(config)
    fields = ["old_logp_BT", "ref_logp_BT", "advantage_BT"]
    fields += ["return_BT", "old_value_BT"] if name in ("ppo", "a2c") else []

    def value(arrays):
        return total(config, outputs_of(), replace(batch, **arrays))[0]

    for gradient in jax.grad(value)({name: getattr(batch, name) for name in fields}).values():
        np.testing.assert_array_equal(gradient, jnp.zeros((6, 4)))


@ALL
@pytest.mark.parametrize("kl_in", ["loss", "exact_loss"])
def test_loss_columns_under_the_mask_are_never_read(name, kl_in):
    """NaN and infinities there, in what the model says and in the batch: not a bit changes."""
    config = whole(name, kl_in=kl_in)
    batch, _ = targets(config)
    floats = ("old_logp_BT", "ref_logp_BT", "advantage_BT", "return_BT", "old_value_BT")

    def both(outputs, batch):
        def value(outputs):
            return total(config, outputs, batch)

        return jax.value_and_grad(value, has_aux=True)(outputs)

    wanted = both(outputs_of(), batch)
    for bad in BAD:

        def spoil(x, bad=bad):
            return None if x is None else jnp.where(batch.mask_BT == 1, x, bad)

        outputs = jax.tree.map(spoil, outputs_of())
        spoilt = replace(batch, **{field: spoil(getattr(batch, field)) for field in floats})
        jax.tree.map(np.testing.assert_array_equal, both(outputs, spoilt), wanted)
    for gradient in jax.tree.leaves(wanted[1]):
        assert (gradient[batch.mask_BT == 0] == 0).all()


@ALL
@pytest.mark.parametrize("kl_in", ["loss", "exact_loss"])
def test_loss_microbatches_add_up(name, kl_in):
    """Rows under the weights of the whole: losses, metrics and gradients."""
    config = whole(name, kl_in=kl_in)
    batch, _ = targets(config)

    def both(rows):
        outputs, part = jax.tree.map(lambda x: x[rows], (outputs_of(), batch))
        return jax.value_and_grad(lambda o: total(config, o, part), has_aux=True)(outputs)

    (wanted, metrics), gradient = both(slice(None))
    parts, gradients = zip(*map(both, (slice(1), slice(1, 4), slice(4, 6))), strict=True)
    np.testing.assert_allclose(sum(part[0] for part in parts), wanted, rtol=1e-5, atol=1e-6)
    for key, value in metrics.items():
        join = max if key.endswith("_max") else sum
        np.testing.assert_allclose(join(p[1][key] for p in parts), value, rtol=1e-5, atol=1e-6)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *gradients)
    assert_tree_close(joined, gradient)
