from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.preference_losses import bco_loss, bco_shift, kto_loss

LOGP, REF = jnp.array([-1.0, -2]), jnp.array([-1.5, -1.5])
"""log-ratios ½ and −½."""

KL_LOGP, KL_REF = jnp.array([-1.0, -3]), jnp.array([-2.0, -2.5])
"""log-ratios 1 and −½: z₀ = ¼."""

DESIRABLE = jnp.array([1, 0])


def test_kto_loss_hand_computed():
    """σ(−.1·(½ − ¼)) and σ(.1·(−½ − ¼)), times their weights."""
    loss, metrics = kto_loss(LOGP, REF, DESIRABLE, KL_LOGP, KL_REF, 0.1)
    np.testing.assert_allclose(loss, [0.4937503, 0.4812588], rtol=1e-6)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(metrics["kl"], [0.25, 0.25])
    loss, _ = kto_loss(LOGP, REF, DESIRABLE, KL_LOGP, KL_REF, 0.1, 2.0, 3.0)
    np.testing.assert_allclose(loss, [2 * 0.4937503, 3 * 0.4812588], rtol=1e-6)


def test_kto_loss_reference_point_is_never_negative():
    """Mean −¼ counts as 0: σ(−.05) on both rows."""
    loss, metrics = kto_loss(LOGP, REF, DESIRABLE, KL_REF, KL_LOGP, 0.1)
    np.testing.assert_allclose(loss, [0.4875026] * 2, rtol=1e-6)
    np.testing.assert_array_equal(metrics["kl"], [0, 0])


def test_kto_loss_gradients():
    """At the reference: −λβ/4 on desirable rows, λβ/4 on the others; none into the rest."""

    def total(logp, ref, kl_logp, kl_ref):
        return kto_loss(logp, ref, DESIRABLE, kl_logp, kl_ref, 0.1, 2.0, 3.0)[0].sum()

    same = total(REF, REF, REF, REF)
    np.testing.assert_allclose(same, 2.5, rtol=1e-6)  # λ/2 each
    slope, *others = jax.grad(total, (0, 1, 2, 3))(REF, REF, REF, REF)
    np.testing.assert_allclose(slope, [-0.05, 0.075], rtol=1e-6)
    slope, *others = jax.grad(total, (0, 1, 2, 3))(LOGP, REF, KL_LOGP, KL_REF)
    assert slope[0] < 0 < slope[1]
    for other in others:
        np.testing.assert_array_equal(other, [0, 0])


def test_kto_loss_is_bounded_and_finite():
    extreme = jnp.array([-1e4, 0.0])
    for desirable in (jnp.ones(2), jnp.zeros(2)):
        loss, slope = jax.vjp(
            lambda logp, d=desirable: kto_loss(logp, extreme[::-1], d, KL_LOGP, KL_REF, 0.1)[0],
            extreme,
        )
        assert ((loss >= 0) & (loss <= 1)).all()
        np.testing.assert_allclose(slope(jnp.ones(2))[0], 0, atol=1e-6)


def test_bco_loss_hand_computed():
    """Rewards .05 and −.05, δ = .02: −log σ(.03) and −log σ(.07)."""
    loss, _ = bco_loss(LOGP, REF, DESIRABLE, 0.1, 0.02)
    np.testing.assert_allclose(loss, [0.6782597, 0.6587596], rtol=1e-6)
    assert loss.dtype == jnp.float32


def test_bco_loss_gradients():
    """At reward = δ: ln 2 and ∓β/2; none into the reference or the shift."""

    def total(logp, ref, shift):
        return bco_loss(logp, ref, DESIRABLE, 0.1, shift)[0].sum()

    value, (slope, *others) = jax.value_and_grad(total, (0, 1, 2))(REF + 2, REF, 0.2)
    np.testing.assert_allclose(value, 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(slope, [-0.05, 0.05], rtol=1e-5)
    for other in others:
        np.testing.assert_array_equal(other, jnp.zeros_like(other))


def test_bco_loss_extreme_log_probs_are_finite():
    extreme = jnp.array([-1e4, 0.0])
    value, slope = jax.value_and_grad(
        lambda logp: bco_loss(logp, extreme[::-1], DESIRABLE, 0.1, 0.0)[0].sum()
    )(extreme)
    np.testing.assert_allclose(value, 2000, rtol=1e-5)
    np.testing.assert_allclose(slope, [-0.1, 0.1], rtol=1e-5)


def test_bco_shift_weighs_classes_equally():
    """Rewards .05, .15 | −.05: (.1 − .05)/2, which is not the mean of the three."""
    logp = jnp.array([-1.0, -2, 0])
    ref = jnp.array([-1.5, -1.5, -1.5])
    shift = bco_shift(logp, ref, jnp.array([1, 0, 1]), 0.1)
    np.testing.assert_allclose(shift, 0.025, rtol=1e-5)
    assert shift.dtype == jnp.float32


def test_bco_shift_of_one_class_is_its_mean():
    logp, ref = jnp.array([-1.0, 0]), jnp.array([-1.5, -1.5])
    for desirable in (jnp.ones(2), jnp.zeros(2)):
        np.testing.assert_allclose(bco_shift(logp, ref, desirable, 0.1), 0.1, rtol=1e-5)
    assert bco_shift(logp, ref, jnp.ones(2), 0.1, jnp.zeros(2)) == 0


def test_bco_shift_no_gradient():
    gradient = jax.grad(lambda x: bco_shift(x, REF, DESIRABLE, 0.1))(LOGP)
    np.testing.assert_array_equal(gradient, [0, 0])


KTO = partial(kto_loss, beta=0.1)


def bco(logp, ref, desirable, kl_logp, kl_ref, valid_B=None):
    del kl_logp, kl_ref
    shift = bco_shift(logp, ref, desirable, 0.1, valid_B)
    return bco_loss(logp, ref, desirable, 0.1, shift, valid_B)


@pytest.mark.parametrize("loss", [KTO, bco], ids=["kto", "bco"])
def test_unpaired_losses_rows_that_do_not_count(loss):
    """What they hold changes nothing, in other rows either; losses, metrics and gradients are 0."""
    keys = jax.random.split(jax.random.key(0), 4)
    logp, ref, kl_logp, kl_ref = (jax.random.normal(key, (4,)) for key in keys)
    desirable, valid = jnp.array([1, 0, 1, 0]), jnp.array([1, 1, 0, 0])
    bad = jnp.array([0, 0, jnp.nan, -jnp.inf])

    def total(logp):
        args = (logp + bad, ref + bad, desirable, kl_logp + bad, kl_ref + bad)
        loss_B, metrics = loss(*args, valid_B=valid)
        return loss_B.sum(), (loss_B, metrics)

    gradient, (loss_B, metrics) = jax.grad(total, has_aux=True)(logp)
    wanted_B, wanted = loss(logp[:2], ref[:2], desirable[:2], kl_logp[:2], kl_ref[:2])
    np.testing.assert_allclose(loss_B, [*wanted_B, 0, 0], rtol=1e-6)
    assert set(metrics) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], [*value, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(gradient[2:], [0, 0])
    assert gradient[0] < 0 < gradient[1]


@pytest.mark.parametrize("loss", [KTO, bco], ids=["kto", "bco"])
def test_unpaired_losses_metrics(loss):
    _, metrics = loss(LOGP, REF, DESIRABLE, KL_LOGP, KL_REF)
    np.testing.assert_allclose(metrics["reward"], [0.05, -0.05], rtol=1e-5)
    np.testing.assert_allclose(metrics["desirable_reward"], [0.05, 0], rtol=1e-5)
    np.testing.assert_allclose(metrics["undesirable_reward"], [0, -0.05], rtol=1e-5)
    np.testing.assert_array_equal(metrics["desirable"], [1, 0])


def test_unpaired_losses_shapes():
    with pytest.raises(AssertionError):
        kto_loss(LOGP, REF, DESIRABLE, KL_LOGP[:1], KL_REF, 0.1)
    with pytest.raises(AssertionError):
        bco_loss(LOGP[:, None], REF[:, None], DESIRABLE[:, None], 0.1, 0.0)
    with pytest.raises(AssertionError):
        bco_shift(LOGP, REF, DESIRABLE, 0.1, jnp.ones(3))
