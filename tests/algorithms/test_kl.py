import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.algorithms import adaptive_kl, bounded_exp, fixed_kl, kl_estimate, token_rewards
from jaxrlhf.errors import InputError


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


def test_kl_estimate_averages():
    """E[k1] = E[k3] = KL; the gradient of E[k2] is the KL's, that of E[k1] is 0."""
    logits, ref_logits = jnp.array([1.0, 0, -1, 0.5]), jnp.array([0.2, 0.1, 0, -0.3])
    ref = jax.nn.log_softmax(ref_logits)

    def exact(logits):
        logp = jax.nn.log_softmax(logits)
        return (jnp.exp(logp) * (logp - ref)).sum()

    def estimated(logits, kind):
        logp = jax.nn.log_softmax(logits)
        return (jax.lax.stop_gradient(jnp.exp(logp)) * kl_estimate(logp, ref, kind)).sum()

    for kind in ("k1", "k3"):
        np.testing.assert_allclose(estimated(logits, kind), exact(logits), rtol=1e-5)
    wanted = jax.grad(exact)(logits)
    np.testing.assert_allclose(jax.grad(estimated)(logits, "k2"), wanted, atol=1e-6)
    np.testing.assert_allclose(jax.grad(estimated)(logits, "k1"), 0, atol=1e-6)


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
