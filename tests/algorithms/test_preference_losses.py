import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.optimal_policy import optimal_policy
from jaxrlhf.algorithms.preference_losses import (
    PREFERENCE_KINDS,
    SMOOTHED_KINDS,
    check_label_smoothing,
    preference_loss,
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


def test_preference_loss_at_the_reference():
    """DPO there: ln 2, ∂/∂chosen = −β/2, ∂/∂rejected = β/2, even if the two answers differ."""
    ref = (jnp.array([-3.0, -70]), jnp.array([-9.0, -1]))
    loss, _ = preference_loss(*ref, *ref, 0.1)
    np.testing.assert_allclose(loss, [0.6931472] * 2, rtol=1e-6)
    slopes = jax.grad(lambda c, r: preference_loss(c, r, *ref, 0.1)[0].sum(), (0, 1))(*ref)
    np.testing.assert_allclose(slopes[0], [-0.05] * 2, rtol=1e-6)
    np.testing.assert_allclose(slopes[1], [0.05] * 2, rtol=1e-6)


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
            check_label_smoothing(smoothing)
        with pytest.raises(ValueError, match="choose from 0"):
            preference_loss(*SUMS, 0.1, "robust", smoothing)
    with pytest.raises(ValueError, match="exo_pair needs it to be > 0"):
        preference_loss(*SUMS, 0.1, "exo_pair")


def test_preference_loss_shapes():
    with pytest.raises(AssertionError):
        preference_loss(CHOSEN_BT, REJECTED_BT, REF_BT, REF_BT, 0.1)
    with pytest.raises(AssertionError):
        preference_loss(*SUMS[:3], jnp.zeros(2), 0.1)
