"""Losses on whole answers by hand: their limits, slopes and optima, and what they must not read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.optimal_policy import optimal_policy
from jaxrlhf.algorithms.preference_losses import (
    PREFERENCE_KINDS,
    SMOOTHED_KINDS,
    bco_loss,
    bco_shift,
    cpo_loss,
    kto_loss,
    orpo_loss,
    preference_loss,
    simpo_loss,
)

CHOSEN_BT = jnp.array([[-0.4, -0.6]])

REJECTED_BT = jnp.array([[-1.0, -1.0]])

REF_BT = jnp.array([[-0.75, -0.75]])
"""Two tokens an answer. Sums: −1, −2, and −1.5 for the reference of either answer."""

SUMS = tuple(x.sum(1) for x in (CHOSEN_BT, REJECTED_BT, REF_BT, REF_BT))

MEANS = tuple(x.mean(1) for x in (CHOSEN_BT, REJECTED_BT, REF_BT, REF_BT))

ALL = pytest.mark.parametrize("kind", list(PREFERENCE_KINDS))


def loss_of(*logp_B, kind, beta=0.1):
    smoothing = 0.1 if kind in SMOOTHED_KINDS else 0.0
    return preference_loss(*logp_B, beta, kind, smoothing)[0]


def gradients(kind, *logp_B, beta=0.1):
    def total(*args):
        return loss_of(*args, kind=kind, beta=beta).sum()

    return jax.grad(total, argnums=(0, 1, 2, 3))(*(jnp.array(x, jnp.float32) for x in logp_B))


@pytest.mark.parametrize(
    ("kind", "smoothing", "wanted"),
    [
        ("sigmoid", 0.0, 0.6443967),
        ("sigmoid", 0.1, 0.6543967),  # cDPO
        ("robust", 0.0, 0.6443967),
        ("robust", 0.1, 0.6318967),
        ("ipo", 0.0, 16.0),
        ("hinge", 0.0, 0.9),
        ("exo_pair", 0.1, 0.4571891),
        ("sppo_hard", 0.0, 40.5),
        ("apo_zero", 0.0, 0.9750053),
        ("apo_down", 0.0, 0.9875182),
    ],
)
def test_preference_loss_hand_computed_on_sums(kind, smoothing, wanted):
    """log-ratios are sums over tokens: ½ for the chosen answer, −½ for the rejected, β = .1."""
    loss, _ = preference_loss(*SUMS, 0.1, kind, smoothing)
    np.testing.assert_allclose(loss, [wanted], rtol=1e-5)
    assert loss.dtype == jnp.float32


def test_preference_loss_ipo_per_token():
    """Means over tokens: log-ratios ¼ and −¼, (½ − 5)² where sums give (1 − 5)²."""
    loss, _ = preference_loss(*MEANS, 0.1, "ipo")
    np.testing.assert_allclose(loss, [20.25], rtol=1e-5)


def test_preference_loss_metrics():
    """A pair that is right, one that is wrong, one that ties."""
    chosen, rejected = jnp.array([-1.0, -2, -1]), jnp.array([-2.0, -1, -1])
    _, metrics = preference_loss(chosen, rejected, jnp.full(3, -1.5), jnp.full(3, -1.5), 0.1)
    assert set(metrics) == {"chosen_reward", "rejected_reward", "margin", "accuracy"}
    np.testing.assert_allclose(metrics["chosen_reward"], [0.05, -0.05, 0.05], rtol=1e-5)
    np.testing.assert_allclose(metrics["rejected_reward"], [-0.05, 0.05, 0.05], rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], [0.1, -0.1, 0], rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], [1, 0, 0.5])


@ALL
def test_preference_loss_gradients(kind):
    """None into the reference. The rejected answer goes down; the chosen up, except in apo_down."""
    chosen, rejected, *references = gradients(kind, [-1.0], [-2.0], [-1.5], [-1.5])
    for reference in references:
        np.testing.assert_array_equal(reference, [0])
    assert rejected > 0
    assert chosen > 0 if kind == "apo_down" else chosen < 0


@ALL
def test_preference_loss_reads_only_log_ratios(kind):
    """The same added to policy and reference of an answer changes nothing."""
    chosen, rejected, ref_chosen, ref_rejected = SUMS
    shifted = loss_of(chosen + 7, rejected - 3, ref_chosen + 7, ref_rejected - 3, kind=kind)
    np.testing.assert_allclose(shifted, loss_of(*SUMS, kind=kind), rtol=1e-5)


@ALL
def test_preference_loss_reads_only_the_difference_of_answers(kind):
    """All but those that look at each answer on its own: a constant of the prompt cancels."""
    chosen, rejected, *references = SUMS
    shifted = loss_of(chosen + 2, rejected + 2, *references, kind=kind)
    absolute = kind in ("sppo_hard", "apo_zero", "apo_down")
    assert np.allclose(shifted, loss_of(*SUMS, kind=kind), rtol=1e-4) is not absolute


@ALL
def test_preference_loss_extreme_log_probs_are_finite(kind):
    extreme = ([-1e4, 0.0, -1e4, 0], [0.0, -1e4, -1e4, 0], [0.0, 0, 0, 0], [0.0, 0, 0, 0])
    assert np.isfinite(loss_of(*map(jnp.array, extreme), kind=kind)).all()
    for gradient in gradients(kind, *extreme):
        assert np.isfinite(gradient).all()


@ALL
def test_preference_loss_rows_traced_beta_and_half_precision(kind):
    """Rows do not see each other; β may be traced; bfloat16 comes out as float32."""
    logp = jax.random.normal(jax.random.key(0), (4, 5)).astype(jnp.bfloat16)
    together = jax.jit(lambda beta: loss_of(*logp, kind=kind, beta=beta))(0.3)
    alone = [loss_of(*logp[:, i : i + 1], kind=kind, beta=0.3)[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert together.dtype == jnp.float32


def test_sigmoid_limits():
    """β → 0: ln 2 − β·m/2. A wrong order by m nats: β·m. A right one: 0."""
    zero = jnp.zeros(1)
    for m in (3.0, -3.0):
        loss, _ = preference_loss(jnp.full(1, m), zero, zero, zero, 1e-3)
        np.testing.assert_allclose(loss, [np.log(2) - 1e-3 * m / 2], atol=2e-6)
    wrong, _ = preference_loss(zero, jnp.full(1, 5e3), zero, zero, 0.1)
    right, _ = preference_loss(jnp.full(1, 5e3), zero, zero, zero, 0.1)
    np.testing.assert_array_equal([wrong[0], right[0]], [500, 0])


def test_sigmoid_and_exo_pair_share_their_minimum():
    """σ(c − r) = 1 − ε: at ln 9 for ε = .1. There exo is 0 and cDPO the entropy of ε."""
    margin, zero = np.log(9) / 0.1, [0.0]
    for kind in ("sigmoid", "exo_pair"):
        chosen, rejected, *_ = gradients(kind, [margin], zero, zero, zero)
        np.testing.assert_allclose([chosen, rejected], 0, atol=1e-6)
        for side in (-1, 1):  # downhill towards the minimum from either side
            slope = gradients(kind, [margin + side], zero, zero, zero)[0]
            assert np.sign(slope) == side
    logp = (jnp.array([margin]), *[jnp.zeros(1)] * 3)
    np.testing.assert_allclose(loss_of(*logp, kind="exo_pair"), 0, atol=1e-6)
    np.testing.assert_allclose(loss_of(*logp, kind="sigmoid"), 0.3250830, rtol=1e-5)


def test_robust_is_unbiased_under_flipped_labels():
    chosen, rejected, ref_chosen, ref_rejected = SUMS
    right = loss_of(*SUMS, kind="robust")
    flipped = loss_of(rejected, chosen, ref_rejected, ref_chosen, kind="robust")
    np.testing.assert_allclose(0.9 * right + 0.1 * flipped, [0.6443967], rtol=1e-5)


def test_ipo_minimum_is_half_over_beta():
    """5 nats for β = .1; quadratic around it; towards 0 for large β."""
    zero = [0.0]
    for margin, loss, slope in ((5.0, 0, 0), (6.0, 1, 2), (3.0, 4, -4)):
        logp = (jnp.array([margin]), *[jnp.zeros(1)] * 3)
        np.testing.assert_allclose(loss_of(*logp, kind="ipo"), [loss], atol=1e-4)
        np.testing.assert_allclose(
            gradients("ipo", [margin], zero, zero, zero)[0], [slope], atol=1e-4
        )
    loss, _ = preference_loss(jnp.array([3.0]), *[jnp.zeros(1)] * 3, 1e4, "ipo")
    np.testing.assert_allclose(loss, [9], rtol=1e-3)


def test_hinge_is_zero_beyond_its_margin():
    """10 nats for β = .1."""
    chosen, rejected, *_ = gradients("hinge", [9.0, 11.0], [0.0] * 2, [0.0] * 2, [0.0] * 2)
    np.testing.assert_allclose(chosen, [-0.1, 0], rtol=1e-6)
    np.testing.assert_allclose(rejected, [0.1, 0], rtol=1e-6)
    logp = (jnp.array([9.0, 11.0]), *[jnp.zeros(2)] * 3)
    np.testing.assert_allclose(loss_of(*logp, kind="hinge"), [0.1, 0], atol=1e-6)


def test_sigmoid_is_stationary_at_the_optimal_policy():
    """On exact Bradley-Terry preferences of r, DPO's gradient vanishes at π* and only there."""
    beta, reward = 0.5, jnp.array([1.0, -0.5, 0.2, 0.7])
    ref = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.8, 0.0]))
    chosen, rejected = (x.reshape(-1) for x in jnp.meshgrid(*[jnp.arange(4)] * 2))
    share = jax.nn.sigmoid(reward[chosen] - reward[rejected])

    def expected(logits):
        logp = jax.nn.log_softmax(logits)
        pair = (logp[chosen], logp[rejected], ref[chosen], ref[rejected])
        return (share * preference_loss(*pair, beta)[0]).sum()

    optimum, _ = optimal_policy(ref, reward, beta)
    np.testing.assert_allclose(jax.grad(expected)(optimum), 0, atol=1e-6)
    assert jnp.abs(jax.grad(expected)(ref)).max() > 0.1
    assert expected(optimum) < expected(ref)


def test_preference_loss_unknown_kind_names_the_choices():
    with pytest.raises(ValueError, match="kind='dpo': choose sigmoid, robust, ipo, hinge, exo_p"):
        preference_loss(*SUMS, 0.1, "dpo")


@ALL
def test_preference_loss_label_smoothing_is_read_or_refused(kind):
    if kind in SMOOTHED_KINDS:
        losses = [preference_loss(*SUMS, 0.1, kind, smoothing)[0] for smoothing in (0.1, 0.2)]
        assert losses[0] != losses[1]
    else:
        with pytest.raises(ValueError, match=r"label_smoothing=0\.1: .*exo_pair, robust, sigmoid"):
            preference_loss(*SUMS, 0.1, kind, 0.1)


def test_preference_loss_label_smoothing_out_of_range():
    for smoothing in (-0.1, 0.5, float("nan")):
        with pytest.raises(ValueError, match="choose from 0"):
            preference_loss(*SUMS, 0.1, "robust", smoothing)
    with pytest.raises(ValueError, match="exo_pair needs it to be > 0"):
        preference_loss(*SUMS, 0.1, "exo_pair")


def test_preference_loss_shapes():
    with pytest.raises(AssertionError):
        preference_loss(CHOSEN_BT, REJECTED_BT, REF_BT, REF_BT, 0.1)
    with pytest.raises(AssertionError):
        preference_loss(*SUMS[:3], jnp.zeros(2), 0.1)


MEAN_PAIR = (jnp.array([-0.5]), jnp.array([-1.0]))


def test_orpo_loss_hand_computed():
    """The ratio of the odds at e^−½ and e^−1 is 1 + √e = 2.648721, σ of its log .725931."""
    loss, metrics = orpo_loss(*MEAN_PAIR, 0.1)
    np.testing.assert_allclose(metrics["log_odds_ratio"], [0.9740770], rtol=1e-6)
    np.testing.assert_allclose(loss, [-0.1 * np.log(0.7259313)], rtol=1e-6)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("logp", [-1e-5, -1e-3, -0.6, -0.7, -3.0, -20.0, -80.0])
def test_orpo_loss_log_odds_keep_their_digits(logp):
    """At log-probs near 0, where 1 − exp cancels, and far from it."""
    _, metrics = orpo_loss(jnp.array([logp]), jnp.array([-np.log(2)]), 1.0)  # odds of 1
    x = np.float64(np.float32(logp))
    np.testing.assert_allclose(metrics["log_odds_ratio"], [x - np.log(-np.expm1(x))], rtol=1e-5)


def test_orpo_loss_certain_answers_are_finite():
    mean = jnp.array([0.0, -1e-9, 1e-7, -1e4])
    for pair in ((mean, mean[::-1]), (mean[::-1], mean), (mean, mean)):
        loss, metrics = orpo_loss(*pair, 0.1)
        gradients = jax.grad(lambda c, r: orpo_loss(c, r, 0.1)[0].sum(), (0, 1))(*pair)
        for x in (loss, *metrics.values(), *gradients):
            assert np.isfinite(x).all()


def test_simpo_loss_hand_computed():
    """2·(−½ + 1) − ½ = ½: −log σ(½)."""
    loss, _ = simpo_loss(*MEAN_PAIR, 2.0, 0.5)
    np.testing.assert_allclose(loss, [0.4740770], rtol=1e-6)
    assert loss.dtype == jnp.float32


def test_simpo_loss_gamma_is_in_reward_units():
    """At a difference of γ/β nats a token: ln 2."""
    for beta, gamma in ((2.0, 0.5), (10.0, 3.0)):
        loss, _ = simpo_loss(jnp.array([gamma / beta]), jnp.zeros(1), beta, gamma)
        np.testing.assert_allclose(loss, [np.log(2)], rtol=1e-6)


def test_cpo_loss_hand_computed():
    """Sums −1 and −2, β = .1: as DPO with equal reference log-probs, whatever they are."""
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
        cpo_loss(*MEAN_PAIR, 0.1, 0.5)
    for smoothing, wanted in ((0.0, 0.6443967), (0.1, 0.6543967)):
        loss, _ = cpo_loss(jnp.array([-1.0]), jnp.array([-2.0]), 0.1, smoothing)
        np.testing.assert_allclose(loss, [wanted], rtol=1e-6)
        assert loss.dtype == jnp.float32
        uniform = jnp.array([-1.5])
        dpo, _ = preference_loss(
            jnp.array([-1.0]), jnp.array([-2.0]), uniform, uniform, 0.1, "sigmoid", smoothing
        )
        np.testing.assert_allclose(loss, dpo, rtol=1e-6)


LOSSES = pytest.mark.parametrize(
    "loss",
    [
        lambda c, r, beta=0.1: orpo_loss(c, r, beta),
        lambda c, r, beta=0.1: simpo_loss(c, r, beta, 0.3),
        lambda c, r, beta=0.1: cpo_loss(c, r, beta),
    ],
    ids=["orpo", "simpo", "cpo"],
)


@LOSSES
def test_reference_free_losses_gradient_signs(loss):
    chosen, rejected = jax.grad(lambda c, r: loss(c, r)[0].sum(), (0, 1))(*MEAN_PAIR)
    assert chosen < 0 < rejected


@LOSSES
def test_reference_free_losses_metrics(loss):
    """Rewards are β·log-prob; the margin leaves out γ; a tie counts one half."""
    chosen, rejected = jnp.array([-0.5, -1, -2]), jnp.array([-1.0, -0.5, -2])
    _, metrics = loss(chosen, rejected)
    np.testing.assert_allclose(metrics["chosen_reward"], [-0.05, -0.1, -0.2], rtol=1e-5)
    np.testing.assert_allclose(metrics["rejected_reward"], [-0.1, -0.05, -0.2], rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], [0.05, -0.05, 0], rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], [1, 0, 0.5])


@LOSSES
def test_reference_free_losses_rows_traced_beta_and_half_precision(loss):
    pair = -jnp.exp(jax.random.normal(jax.random.key(0), (2, 5))).astype(jnp.bfloat16)
    together = jax.jit(lambda beta: loss(*pair, beta)[0])(0.3)
    alone = [loss(*pair[:, i : i + 1], 0.3)[0][0] for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert together.dtype == jnp.float32


@LOSSES
def test_reference_free_losses_shapes(loss):
    with pytest.raises(AssertionError):
        loss(MEAN_PAIR[0], jnp.zeros(2))
    with pytest.raises(AssertionError):
        loss(*(x[None] for x in MEAN_PAIR))


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
