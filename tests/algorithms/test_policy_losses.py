import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.algorithms import (
    cispo_loss,
    entropy_bonus,
    policy_gradient_loss,
    ppo_policy_loss,
)
from jaxrlhf.core import masked

AGGREGATIONS = ["token", "sequence", "sequence_sum", "fixed"]
BAD = jnp.array([jnp.nan, -jnp.inf, jnp.inf])


@pytest.mark.parametrize(
    ("aggregation", "length", "wanted"),
    [
        ("token", None, -0.0439754),
        ("sequence", None, 0.1710059),
        ("sequence_sum", None, -0.1099385),
        ("fixed", None, -0.0366462),
        ("fixed", 6, -0.0366462 / 2),
    ],
)
def test_ppo_policy_loss_hand_computed(rows, aggregation, length, wanted):
    loss, _ = ppo_policy_loss(
        rows.logp, rows.old, rows.advantage, rows.mask, aggregation=aggregation, length=length
    )
    np.testing.assert_allclose(loss, wanted, atol=1e-6)


def sequence_loss(logp, rows):
    return ppo_policy_loss(
        logp, rows.old, rows.advantage, rows.mask, aggregation="sequence", ratio="sequence"
    )[0]


def test_ppo_policy_loss_sequence_ratio(rows):
    np.testing.assert_allclose(sequence_loss(rows.logp, rows), 0.1731147, atol=1e-6)


def test_ppo_policy_loss_sequence_ratio_gradient(rows):
    """That of −mean over rows of exp(mean over tokens of the difference)·A; no row is clipped."""

    def plain(logp):
        mean_B = masked.mean(logp - rows.old, rows.mask, axis=1)
        return -(jnp.exp(mean_B) * rows.advantage[:, 0]).mean()

    gradient = jax.grad(sequence_loss)(rows.logp, rows)
    np.testing.assert_allclose(gradient, jax.grad(plain)(rows.logp), atol=1e-6)
    assert gradient[0, 0] < 0 < gradient[1, 0]


def test_ppo_policy_loss_unknown_ratio(rows):
    with pytest.raises(ValueError, match="ratio='row'"):
        ppo_policy_loss(rows.logp, rows.old, rows.advantage, rows.mask, ratio="row")


def one_token(log_ratio, advantage, **options):
    """Loss, its derivative by the log-prob, and metrics, of a single token."""

    def loss(logp):
        return ppo_policy_loss(
            logp, jnp.zeros((1, 1)), jnp.full((1, 1), advantage), jnp.ones((1, 1)), **options
        )

    (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(jnp.full((1, 1), log_ratio))
    return float(value), float(slope[0, 0]), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.1, 1.0, -1.1, -1.1, 0),
        (1.5, 1.0, -1.3, 0, 1),  # above the upper bound: nothing more to gain
        (0.5, 1.0, -0.5, -0.5, 0),
        (0.5, -1.0, 0.9, 0, 1),  # below the lower bound
        (1.5, -1.0, 1.5, 1.5, 0),
    ],
)
def test_ppo_policy_loss_clips_each_side(ratio, advantage, loss, slope, clipped):
    value, derivative, metrics = one_token(np.log(ratio), advantage, clip_low=0.1, clip_high=0.3)
    assert value == pytest.approx(loss, rel=1e-5)
    assert derivative == pytest.approx(slope, rel=1e-5)
    assert metrics["clip_fraction"] == clipped
    assert metrics["ratio_max"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize(
    ("advantage", "dual_clip", "loss", "slope"),
    [(-1.0, None, 10, 10), (-1.0, 3.0, 3, 0), (-2.0, 3.0, 6, 0), (1.0, 3.0, -1.2, 0)],
)
def test_ppo_policy_loss_dual_clip(advantage, dual_clip, loss, slope):
    value, derivative, _ = one_token(np.log(10.0), advantage, dual_clip=dual_clip)
    assert value == pytest.approx(loss, rel=1e-5)
    assert derivative == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, 21.0, 100.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_ppo_policy_loss_extreme_ratio_is_finite(log_ratio, advantage, ratio):
    value, slope, metrics = one_token(log_ratio, advantage, ratio=ratio)
    assert np.isfinite([value, slope, *metrics.values()]).all()
    if advantage < 0 < log_ratio:
        assert slope == pytest.approx(np.exp(20), rel=1e-5)  # still pulls the token down


def test_ppo_policy_loss_metrics_hand_computed(rows):
    _, metrics = ppo_policy_loss(rows.logp, rows.old, rows.advantage, rows.mask)
    d = np.array([0.1, -0.5, 0, 0, 0.4])
    assert metrics["approx_kl"] == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-5)
    assert metrics["clip_fraction"] == 0  # at −.5, A > 0 and at .4, A < 0 the free branch counts
    assert metrics["ratio_max"] == pytest.approx(np.exp(0.4), rel=1e-5)
    assert metrics["weight"] == pytest.approx(1)


def test_ppo_policy_loss_ratio_one_is_policy_gradient(rows):
    def ppo(logp):
        return ppo_policy_loss(logp, rows.logp, rows.advantage, rows.mask)[0]

    def plain(logp):
        return policy_gradient_loss(logp, rows.advantage, rows.mask)[0]

    np.testing.assert_allclose(jax.grad(ppo)(rows.logp), jax.grad(plain)(rows.logp), rtol=1e-6)


def test_ppo_policy_loss_all_masked_is_zero(rows):
    empty = jnp.zeros_like(rows.mask)

    def loss(logp):
        return ppo_policy_loss(logp, rows.old, rows.advantage, empty, aggregation="sequence")[0]

    value, gradient = jax.value_and_grad(loss)(rows.logp)
    assert value == 0
    assert (gradient == 0).all()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    aggregation=st.sampled_from(AGGREGATIONS),
    ratio=st.sampled_from(["token", "sequence"]),
    cut=st.integers(1, 3),
)
def test_ppo_policy_loss_microbatches_and_padding(seed, aggregation, ratio, cut):
    """Slices under the whole batch's weights add up to the whole, with padding of any content."""
    key = jax.random.split(jax.random.key(seed), 2)
    logp, old, advantage = jax.random.normal(key[0], (3, 4, 5))
    mask = jax.random.bernoulli(key[1], 0.7, (4, 5)).astype(jnp.float32)
    whole, metrics = ppo_policy_loss(
        logp, old, advantage, mask, aggregation=aggregation, length=7, ratio=ratio
    )
    weight = masked.weights(mask, aggregation, 7)
    pad = [(0, 0), (2, 1)]
    wide = [jnp.pad(x, pad, constant_values=9) for x in (logp, old, advantage)]
    arrays = (*wide, jnp.pad(mask, pad), jnp.pad(weight, pad))
    losses, parts = zip(
        *(
            ppo_policy_loss(*(x[rows] for x in arrays[:4]), weight_BT=arrays[4][rows], ratio=ratio)
            for rows in (slice(cut), slice(cut, None))
        ),
        strict=True,
    )
    np.testing.assert_allclose(sum(losses), whole, rtol=1e-4, atol=1e-5)
    for name, wanted in metrics.items():
        join = max if name.endswith("_max") else sum
        np.testing.assert_allclose(join(p[name] for p in parts), wanted, rtol=1e-4, atol=1e-5)


def test_policy_gradient_loss_hand_computed(rows):
    loss, metrics = policy_gradient_loss(rows.logp, rows.advantage, rows.mask)
    np.testing.assert_allclose(loss, (6 - 1) / 5, rtol=1e-6)
    np.testing.assert_allclose(metrics["logp"], -7 / 5, rtol=1e-6)
    loss, _ = policy_gradient_loss(rows.logp, rows.advantage, rows.mask, "sequence_sum")
    np.testing.assert_allclose(loss, (6 - 1) / 2, rtol=1e-6)


def test_policy_gradient_loss_gradient(rows):
    def loss(logp, advantage):
        return policy_gradient_loss(logp, advantage, rows.mask, weight_BT=jnp.full((2, 3), 0.5))[0]

    for bad in BAD:
        logp = rows.logp.at[1, 2].set(bad)
        value, (by_logp, by_advantage) = jax.value_and_grad(loss, (0, 1))(logp, rows.advantage)
        assert value == (6 - 1) / 2
        np.testing.assert_array_equal(by_logp, [[-0.5] * 3, [0.5, 0.5, 0]])
        assert (by_advantage == 0).all()


def test_entropy_bonus_masks_pads():
    entropy = jnp.array([[0.832396, 0.5, jnp.nan]])  # the first of logits [1, 2, 3]
    mask = jnp.array([[1, 1, 0]])
    bonus = entropy_bonus(entropy, mask, masked.weights(mask))
    np.testing.assert_allclose(bonus, (0.832396 + 0.5) / 2, rtol=1e-6)


def cispo(logp, rows, **options):
    return cispo_loss(logp, rows.old, rows.advantage, rows.mask, **options)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, [1.1051709, 0.6065307, 1, 1, 1.2]),
        ({"clip_low": 0.3}, [1.1051709, 0.7, 1, 1, 1.2]),
        ({"clip_high": 0.45}, [1.1051709, 0.6065307, 1, 1, 1.45]),
        ({"clip_high": 1.0}, [1.1051709, 0.6065307, 1, 1, 1.4918247]),
    ],
)
def test_cispo_loss_hand_computed(rows, options, weight):
    """−w·A·log π, log-probs −1, −2, −3 | −.5, −.5; the gradient is −w·A, clipped or not."""
    (loss, metrics), gradient = jax.value_and_grad(cispo, has_aux=True)(rows.logp, rows, **options)
    factor = np.array([-1, -2, -3, 0.5, 0.5])
    np.testing.assert_allclose(loss, -(weight * factor).sum() / 5, rtol=1e-6)
    wanted = [[-w / 5 for w in weight[:3]], [*(w / 5 for w in weight[3:]), 0]]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)
    free = [1.1051709, 0.6065307, 1, 1, 1.4918247]
    np.testing.assert_allclose(metrics["clip_fraction"], np.not_equal(weight, free).mean())
    d = np.array([0.1, -0.5, 0, 0, 0.4])
    np.testing.assert_allclose(metrics["approx_kl"], (np.exp(d) - 1 - d).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], 1.4918247, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("aggregation", "wanted"), [("sequence", (5.3182322 / 3 - 0.55) / 2), ("fixed", 4.2182322 / 14)]
)
def test_cispo_loss_aggregation(rows, aggregation, wanted):
    loss, _ = cispo(rows.logp, rows, aggregation=aggregation, length=7)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_cispo_loss_between_ppo_and_policy_gradient(rows):
    """Unclipped, PPO's gradient; weights clipped to 1, the loss of the policy gradient."""

    def ppo(logp):
        return ppo_policy_loss(
            logp, rows.old, rows.advantage, rows.mask, clip_low=1.0, clip_high=99.0
        )[0]

    free = jax.grad(lambda logp: cispo(logp, rows, clip_high=99.0)[0])(rows.logp)
    np.testing.assert_allclose(free, jax.grad(ppo)(rows.logp), rtol=1e-6)
    plain, _ = policy_gradient_loss(rows.logp, rows.advantage, rows.mask)
    np.testing.assert_allclose(cispo(rows.logp, rows, clip_low=0.0, clip_high=0.0)[0], plain)


@pytest.mark.parametrize("log_ratio", [-1e4, 21.0, 1e4])
def test_cispo_loss_extreme_ratio_is_finite(rows, log_ratio):
    old = rows.old.at[0, 0].set(-1 - log_ratio)
    result = jax.value_and_grad(
        lambda logp: cispo_loss(logp, old, rows.advantage, rows.mask), has_aux=True
    )(rows.logp)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))
    np.testing.assert_allclose(result[1][0, 0], -0.24 if log_ratio > 0 else 0, rtol=1e-6)


@pytest.mark.parametrize("loss", [ppo_policy_loss, cispo_loss])
def test_losses_masked_columns_of_weights_are_never_read(rows, loss):
    """Nor of anything else: not a bit changes."""
    arrays = (rows.logp, rows.old, rows.advantage, rows.mask / 5)

    def both(*arrays):
        def total(logp):
            return loss(logp, *arrays[1:3], rows.mask, weight_BT=arrays[3])

        return jax.value_and_grad(total, has_aux=True)(arrays[0])

    for bad in BAD:
        spoilt = both(*(jnp.where(rows.mask == 1, x, bad) for x in arrays))
        jax.tree.map(np.testing.assert_array_equal, spoilt, both(*arrays))
