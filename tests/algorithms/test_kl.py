"""KL to the reference: each estimator and whose gradient it has, token rewards, controllers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.algorithms import (
    adaptive_kl,
    bounded_exp,
    fixed_kl,
    kl_estimate,
    kl_kind,
    kl_loss,
    token_rewards,
)
from jaxrlhf.config import DAPOConfig, GRPOConfig, PPOConfig
from jaxrlhf.core.errors import InputError


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("k1", [0.5, -1]), ("k2", [0.125, 0.5]), ("k3", [0.1065307, 0.7182817])],
)
def test_kl_estimate_hand_computed(kind, wanted):
    estimate = kl_estimate(jnp.array([-1.0, -2]), jnp.array([-1.5, -1]), kind)
    np.testing.assert_allclose(estimate, wanted, rtol=1e-6)
    assert estimate.dtype == jnp.float32


def test_kl_estimate_unknown_kind():
    with pytest.raises(ValueError, match="kind='k4'"):
        kl_estimate(jnp.zeros(2), jnp.zeros(2), "k4")


def test_kl_estimate_k3_exact_up_to_20_nats():
    d = np.array([-12.0, -20.0])
    estimate = kl_estimate(jnp.array(d), jnp.zeros(2), "k3")
    np.testing.assert_allclose(estimate, np.exp(-d) - 1 + d, rtol=1e-6)
    np.testing.assert_allclose(estimate[0], 162741.79, rtol=1e-6)


def test_kl_estimate_k3_tangent_beyond_20_nats():
    d = np.array([-21.0, -100, -1e6])
    estimate, slope = jax.vmap(jax.value_and_grad(lambda x: kl_estimate(x, jnp.zeros(()), "k3")))(
        jnp.array(d)
    )
    np.testing.assert_allclose(estimate, np.exp(20.0) * (1 - d - 20) - 1 + d, rtol=1e-5)
    np.testing.assert_allclose(slope, np.full(3, 1 - np.exp(20.0)), rtol=1e-5)


def test_kl_estimate_k3_small_differences_keep_their_digits():
    estimate = kl_estimate(jnp.array([1e-3, -1e-3]), jnp.zeros(2), "k3")
    np.testing.assert_allclose(estimate, [4.998333e-7, 5.001667e-7], rtol=1e-3)


def test_kl_estimate_no_gradient_into_reference():
    for kind in ("k1", "k2", "k3"):
        gradient = jax.grad(lambda ref, k=kind: kl_estimate(jnp.ones(2), ref, k).sum())(
            jnp.zeros(2)
        )
        assert (gradient == 0).all()


@settings(max_examples=30, deadline=None)
@given(d=st.floats(-1e4, 1e4, width=32))
def test_kl_estimate_k3_never_negative(d):
    estimate, slope = jax.value_and_grad(lambda x: kl_estimate(x, jnp.zeros(()), "k3"))(d)
    assert np.isfinite(estimate)
    assert estimate >= -1e-6 * abs(d)
    assert np.sign(slope) == np.sign(d) or abs(d) < 1e-6


LOGITS, REF = jnp.array([1.0, 0, -1, 0.5]), jax.nn.log_softmax(jnp.array([0.2, 0.1, 0, -0.3]))


def of_policy(logits):
    """KL(π‖π_ref)."""
    logp = jax.nn.log_softmax(logits)
    return (jnp.exp(logp) * (logp - REF)).sum()


def test_kl_estimate_averages():
    """E[k1] = E[k3] = KL; the gradient of E[k2] is the KL's, that of E[k1] is 0."""

    def estimated(logits, kind):
        logp = jax.nn.log_softmax(logits)
        return (jax.lax.stop_gradient(jnp.exp(logp)) * kl_estimate(logp, REF, kind)).sum()

    for kind in ("k1", "k3"):
        np.testing.assert_allclose(estimated(LOGITS, kind), of_policy(LOGITS), rtol=1e-5)
    wanted = jax.grad(of_policy)(LOGITS)
    np.testing.assert_allclose(jax.grad(estimated)(LOGITS, "k2"), wanted, atol=1e-6)
    np.testing.assert_allclose(jax.grad(estimated)(LOGITS, "k1"), 0, atol=1e-6)


def test_kl_estimate_as_a_reward():
    """E[∇log π·k1] is ∇KL(π‖π_ref), E[∇log π·k3] that minus ∇KL(π_ref‖π)."""

    def of_reference(logits):
        return (jnp.exp(REF) * (REF - jax.nn.log_softmax(logits))).sum()

    def credited(logits, kind):
        logp = jax.nn.log_softmax(logits)
        kl = kl_estimate(logp, REF, kind)
        return (jax.lax.stop_gradient(jnp.exp(logp) * kl) * logp).sum()

    forward, reverse = jax.grad(of_policy)(LOGITS), jax.grad(of_reference)(LOGITS)
    np.testing.assert_allclose(jax.grad(credited)(LOGITS, "k1"), forward, atol=1e-6)
    np.testing.assert_allclose(jax.grad(credited)(LOGITS, "k3"), forward - reverse, atol=1e-6)


@pytest.mark.parametrize("config", [PPOConfig, GRPOConfig, DAPOConfig])
def test_kl_kind(config):
    """k1 in the reward and k3 in the loss, whatever the algorithm's own default place is."""
    kinds = {place: kl_kind(config(kl_in=place)) for place in ("reward", "loss", "exact_loss")}
    assert kinds == {"reward": "k1", "loss": "k3", "exact_loss": "k3"}
    for place in kinds:
        assert kl_kind(config(kl_in=place, kl_estimator="k2")) == "k2"
    assert kl_kind(PPOConfig()) == "k1"
    assert kl_kind(GRPOConfig()) == "k3"


def test_bounded_exp_is_exp_then_its_tangent():
    x = np.array([-1e4, -3.0, 0, 20, 21, 1e6])
    y, slope = jax.vmap(jax.value_and_grad(bounded_exp))(jnp.array(x))
    np.testing.assert_allclose(y[:4], np.exp(x[:4]), rtol=1e-6)
    np.testing.assert_allclose(y[4:], np.exp(20.0) * (x[4:] - 19), rtol=1e-5)
    np.testing.assert_allclose(slope, np.exp(np.minimum(x, 20)), rtol=1e-6)


def test_token_rewards_kl_on_every_token_score_on_the_last():
    mask = jnp.array([[0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    kl = jnp.where(mask == 1, 0.5, jnp.nan)  # log-probs −1 and −1.5
    rewards = token_rewards(jnp.array([2.0, 3, jnp.nan]), kl, mask, 0.05)
    wanted = [[0, -0.025, -0.025, 1.975, 0], [0, -0.025, 0, 2.975, 0], [0] * 5]
    np.testing.assert_allclose(rewards, wanted, rtol=1e-6)


def test_token_rewards_integers_become_floats():
    mask = jnp.ones((1, 2), jnp.int32)
    rewards = token_rewards(jnp.array([1], jnp.int32), jnp.full((1, 2), 0.3), mask, 1.0)
    np.testing.assert_allclose(rewards, [[-0.3, 0.7]], rtol=1e-6)
    assert rewards.dtype == jnp.float32


def test_adaptive_kl_hand_computed():
    assert adaptive_kl(0.2, 12.0, 6.0, 256, 1e4) == pytest.approx(0.201024)
    assert adaptive_kl(0.2, 1.0, 6.0, 256, 1e4) == pytest.approx(0.198976)
    assert adaptive_kl(0.2, 6.6, 6.0, 100, 1e4) == pytest.approx(0.2 * 1.001)
    assert type(adaptive_kl(0.2, 12.0, 6.0, 256, 1e4)) is float


def test_adaptive_kl_settles_on_target():
    beta = 10.0
    for _ in range(2000):  # a policy whose KL is 1/β
        beta = adaptive_kl(beta, 1 / beta, 4.0, 64, 1000)
    assert 1 / beta == pytest.approx(4.0, rel=1e-3)


def test_adaptive_kl_not_finite_holds():
    for kl in (float("nan"), float("inf")):
        assert adaptive_kl(0.2, kl, 6.0, 256, 1e4) == 0.2


def test_adaptive_kl_short_horizon():
    with pytest.raises(InputError, match=r"kl_horizon=10: must exceed 12\.8"):
        adaptive_kl(0.2, 1.0, 6.0, 64, 10)


def test_fixed_kl_holds():
    assert fixed_kl(0.2, 12.0, 6.0, 256, 1e4) == 0.2


@pytest.mark.parametrize(
    ("kind", "exact", "wanted"),
    [("k2", False, 0.031), ("k3", False, 0.0354921), ("k1", True, -0.06), ("k3", True, 0.0354921)],
)
def test_kl_loss_hand_computed(rows, kind, exact, wanted):
    """Differences .2, 0, −.5 | −.1, .1; mean over five tokens."""
    loss = kl_loss(rows.logp, rows.ref, rows.old, rows.mask, rows.mask / 5, kind, exact)
    np.testing.assert_allclose(loss, wanted, atol=1e-7)
    assert loss.dtype == jnp.float32


def test_kl_loss_k1_needs_exact(rows):
    with pytest.raises(ValueError, match="kind='k1': its gradient is 0 on average"):
        kl_loss(rows.logp, rows.ref, rows.old, rows.mask, rows.mask, "k1")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_kl_loss_masked_columns_are_never_read(rows, exact, bad):
    def both(*arrays):
        def loss(logp):
            return kl_loss(logp, *arrays[1:3], rows.mask, arrays[3], "k3", exact)

        return jax.value_and_grad(loss)(arrays[0])

    arrays = (rows.logp, rows.ref, rows.old, rows.mask / 5)
    wanted = both(*arrays)
    spoilt = both(*(jnp.where(rows.mask == 1, x, bad) for x in arrays))
    jax.tree.map(np.testing.assert_array_equal, spoilt, wanted)


def test_kl_loss_exact_gradient_hand_computed(rows):
    """w·ρ·Σ d, whatever the estimator: Σ d is −.3 and 0, ρ e^.1, e^−.5, 1."""
    wanted = [[-0.06 * x for x in (1.1051709, 0.6065307, 1)], [0, 0, 0]]
    for kind in ("k1", "k2", "k3"):
        gradient = jax.grad(kl_loss)(
            rows.logp, rows.ref, rows.old, rows.mask, rows.mask / 5, kind, True
        )
        np.testing.assert_allclose(gradient, wanted, atol=1e-7)


def sequences():
    """All pairs of 3 tokens [9, 2], and logits → log-probs [9, 2]; the second sees the first."""
    token_BT = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 2, indexing="ij"), -1).reshape(9, 2)

    def logp_of(logits):
        first, second = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1:])
        return jnp.stack([first[token_BT[:, 0]], second[token_BT[:, 0], token_BT[:, 1]]], 1)

    return logp_of


def gradient_of_kl_loss(logits, ref, old, kind, exact):
    """Its mean over sequences drawn from the old policy, weights 1."""
    chance_B1 = jnp.exp(old.sum(1, keepdims=True))
    ones = jnp.ones((9, 2))

    def loss(logits):
        return kl_loss(sequences()(logits), ref, old, ones, chance_B1 * ones, kind, exact)

    return jax.grad(loss)(logits)


def test_kl_loss_exact_gradient_is_that_of_the_sequence_kl():
    """Over all sequences, on policy; each estimator alone is off by what it says."""
    logp_of, logits = sequences(), jax.random.normal(jax.random.key(0), (3, 4, 3))
    ref, policy = logp_of(logits[1]), logp_of(logits[0])

    def kl(logits):
        logp = logp_of(logits)
        return (jnp.exp(logp.sum(1)) * (logp - ref).sum(1)).sum()

    wanted = jax.grad(kl)(logits[0])
    for kind in ("k1", "k2", "k3"):
        gradient = gradient_of_kl_loss(logits[0], ref, policy, kind, True)
        np.testing.assert_allclose(gradient, wanted, atol=1e-6)
    k2 = gradient_of_kl_loss(logits[0], ref, policy, "k2", False)
    np.testing.assert_allclose(k2[1:], wanted[1:], atol=1e-6)  # the last choice has none later
    assert jnp.abs(k2[0] - wanted[0]).max() > 0.01
    k3 = gradient_of_kl_loss(logits[0], ref, policy, "k3", False)
    reverse = jax.nn.softmax(logits[0, 0]) - jax.nn.softmax(logits[1, 0])  # of KL(π_ref‖π)
    np.testing.assert_allclose(k3[0], reverse, atol=1e-6)


def test_kl_loss_exact_gradient_of_a_policy_that_moved():
    """The ratio of the token alone: exact where later tokens are still drawn from the policy."""
    logp_of, logits = sequences(), jax.random.normal(jax.random.key(1), (3, 4, 3))
    ref = logp_of(logits[1])
    before = logits[0].at[0].set(logits[2, 0])  # the first token's choice has moved since
    old = logp_of(before)

    def kl(logits):
        logp = logp_of(logits)
        return (jnp.exp(logp.sum(1)) * (logp - ref).sum(1)).sum()

    wanted = jax.grad(kl)(logits[0])
    gradient = gradient_of_kl_loss(logits[0], ref, old, "k1", True)
    np.testing.assert_allclose(gradient[0], wanted[0], atol=1e-6)
