"""Reward models of pairs, rankings, numbers and steps, and ensembles, by hand and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import (
    aggregate_steps,
    ensemble_score,
    listwise_reward_loss,
    listwise_reward_model,
    pairwise_reward_loss,
    pointwise_reward_loss,
    pointwise_reward_model,
    process_reward_loss,
    process_reward_model,
    ranked_accuracy,
    ranked_pairs_loss,
    reward_model,
)
from jaxrlhf.config import (
    ListwiseRewardModelConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
)
from jaxrlhf.core.types import PreferenceBatch


def pairs(margin, weight):
    count = len(weight)
    return PreferenceBatch(
        token_BCT=jnp.zeros((count, 2, 1), jnp.int32),
        attention_mask_BCT=jnp.ones((count, 2, 1), jnp.int32),
        margin_B=jnp.array(margin, jnp.float32),
        weight_B=jnp.array(weight, jnp.float32),
    )


def test_pairwise_reward_loss_hand_computed():
    loss = pairwise_reward_loss(jnp.array([1, 0]), jnp.array([0, 1]))
    np.testing.assert_allclose(loss.mean(), 0.8132617, rtol=1e-6)
    np.testing.assert_allclose(loss, [0.3132617, 1.3132617], rtol=1e-6)
    loss = pairwise_reward_loss(jnp.array([1.0]), jnp.array([0.0]), 0.5)
    np.testing.assert_allclose(loss, [0.4740770], rtol=1e-6)


def test_pairwise_reward_loss_extreme_scores_are_finite():
    def loss(chosen):
        return pairwise_reward_loss(chosen, jnp.zeros(2)).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.array([-1e4, 1e4]))
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [-1, 0])


def test_reward_model_loss_and_metrics():
    score = jnp.array([[1.0, 0], [0, 1], [2, 2], [jnp.nan, jnp.inf]])
    batch = pairs([0, 0, 0, jnp.nan], [1 / 3, 1 / 3, 1 / 3, 0])
    loss = reward_model(RewardModelConfig()).loss
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(score, batch)
    np.testing.assert_allclose(value, (2 * 0.8132617 + np.log(2)) / 3, rtol=1e-6)
    wanted = {"accuracy": 0.5, "margin": 0, "chosen": 1, "rejected": 1, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted)
    assert (gradient[:3, 0] < 0).all()
    np.testing.assert_allclose(gradient[:, 0], -gradient[:, 1])
    np.testing.assert_array_equal(gradient[3], 0)


@pytest.mark.parametrize(
    ("changes", "score", "added"),
    [({}, [1.0, 0], 0), ({"centre_coef": 0.1}, [1.0, 2], 0.9), ({"score_l2": 0.1}, [3.0, -1], 0.5)],
)
def test_reward_model_terms(changes, score, added):
    """−log σ(difference − ½), and what keeps scores in bounds; the margin stays a difference."""
    loss, metrics = reward_model(RewardModelConfig(**changes)).loss(
        jnp.array([score]), pairs([0.5], [1])
    )
    difference = score[0] - score[1]
    np.testing.assert_allclose(loss, np.log1p(np.exp(0.5 - difference)) + added, rtol=1e-6)
    assert metrics["margin"] == difference


def test_reward_model_label_smoothing():
    """A pair that is wrong with probability ε is the other pair, with the same margin."""
    loss = reward_model(RewardModelConfig(label_smoothing=0.25)).loss
    value, _ = loss(jnp.array([[1.0, 0]]), pairs([0.5], [1]))
    np.testing.assert_allclose(value, 0.75 * 0.4740770 + 0.25 * 1.7014133, rtol=1e-6)
    gradient = jax.grad(lambda s: loss(s, pairs([0], [1]))[0])(jnp.array([[np.log(3.0), 0]]))
    np.testing.assert_allclose(gradient, 0, atol=1e-7)  # σ(log 3) = 0.75: what it learns to say


def listwise_loss(score, rank, mask=None):
    """Of one row."""
    score, rank = jnp.array(score, jnp.float32), jnp.array(rank)
    mask = jnp.ones(len(score)) if mask is None else jnp.array(mask)
    return float(listwise_reward_loss(score[None], rank[None], mask[None])[0])


def test_listwise_reward_loss_hand_computed():
    """log(1 + e⁻¹ + e⁻²) + log(1 + e⁻¹); equal scores: log 3!."""
    score = jnp.array([[2, 1, 0], [5, 5, 5]])
    loss = listwise_reward_loss(score, jnp.array([[1, 2, 3], [3, 1, 2]]), jnp.ones((2, 3)))
    np.testing.assert_allclose(loss, [0.7208677, 1.7917595], rtol=1e-6)
    assert loss.dtype == jnp.float32


def test_listwise_reward_loss_of_two_is_bradley_terry():
    best, other = jax.random.normal(jax.random.key(0), (2, 6))
    pairwise = pairwise_reward_loss(best, other)
    mask = jnp.ones((6, 2))
    for order in ([best, other], [1, 2]), ([other, best], [2, 1]):
        score, rank = jnp.stack(order[0], axis=1), jnp.tile(jnp.array(order[1]), (6, 1))
        np.testing.assert_allclose(listwise_reward_loss(score, rank, mask), pairwise, rtol=1e-5)


def test_listwise_reward_loss_brute_force():
    """Draw the best from all, the next from the rest: probabilities of all rankings sum to 1."""
    score = np.array([0.3, -1.2, 2.0, 0.7])
    total = 0.0
    for order in itertools.permutations(range(4)):
        left, probability = list(order), 1.0
        while left:
            probability *= np.exp(score[left[0]]) / np.exp(score[left]).sum()
            left.pop(0)
        rank = np.argsort(order) + 1  # rank[i]: the place of candidate i
        assert np.exp(-listwise_loss(score, rank)) == pytest.approx(probability, rel=1e-5)
        total += probability
    assert total == pytest.approx(1)


def test_listwise_reward_loss_ties():
    """Breslow: each of a group against the whole group and all below."""
    assert listwise_loss([5.0, 5, 5], [1, 1, 1]) == pytest.approx(3 * np.log(3), rel=1e-6)
    both_ways = sum(listwise_loss([1.0, 0.2], rank) for rank in ([1, 2], [2, 1]))
    assert listwise_loss([1.0, 0.2], [1, 1]) == pytest.approx(both_ways, rel=1e-6)
    e = np.exp([2.0, 1, 0])  # the first two tie for best
    wanted = -np.log(e[0] / e.sum()) - np.log(e[1] / e.sum())
    assert listwise_loss([2.0, 1, 0], [1, 1, 2]) == pytest.approx(wanted, rel=1e-6)
    wanted = -np.log(e[0] / e.sum()) - np.log(e[1] / e[1:].sum()) - np.log(e[2] / e[1:].sum())
    assert listwise_loss([2.0, 1, 0], [1, 2, 2]) == pytest.approx(wanted, rel=1e-6)


def test_listwise_reward_loss_invariances():
    """Order of columns, a constant on all scores, and what numbers say the order."""
    score = jax.random.normal(jax.random.key(1), (3, 5))
    rank = jnp.array([[1, 2, 3, 4, 5], [2, 1, 1, 3, 2], [5, 4, 1, 3, 2]])
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
    loss = listwise_reward_loss(score, rank, mask)
    columns = jnp.array([3, 0, 4, 2, 1])
    shuffled = listwise_reward_loss(score[:, columns], rank[:, columns], mask[:, columns])
    np.testing.assert_allclose(shuffled, loss, rtol=1e-5)
    np.testing.assert_allclose(listwise_reward_loss(score + 7, rank, mask), loss, rtol=1e-5)
    np.testing.assert_allclose(listwise_reward_loss(score, rank**2 - 9, mask), loss, rtol=1e-6)


def test_listwise_reward_loss_absent_candidates():
    """As if they were not there, whatever score and rank they hold."""
    score = jnp.array([0.5, jnp.nan, -0.3, -jnp.inf, 1.1, jnp.inf])
    rank = jnp.array([2, 1, jnp.nan, 3, 1, 3])
    mask = jnp.array([1, 0, 0, 0, 1, 0])

    def total(score):
        return listwise_reward_loss(score[None], rank[None], mask[None])[0]

    value, gradient = jax.value_and_grad(total)(score)
    np.testing.assert_allclose(value, listwise_loss([0.5, 1.1], [2, 1]), rtol=1e-6)
    np.testing.assert_array_equal(gradient[jnp.array([1, 2, 3, 5])], [0] * 4)
    np.testing.assert_allclose(gradient[0], 0.3543437, rtol=1e-5)  # σ(−.6)
    np.testing.assert_allclose(gradient[4], -gradient[0], rtol=1e-5)


def test_listwise_reward_loss_fewer_than_two_candidates():
    score = jnp.array([[3.0, jnp.nan], [jnp.nan, -jnp.inf]])
    mask = jnp.array([[1, 0], [0, 0]])

    def total(score):
        return listwise_reward_loss(score, jnp.ones((2, 2)), mask)

    np.testing.assert_array_equal(total(score), [0, 0])
    for scores in (score, jnp.ones((2, 2))):
        gradient = jax.grad(lambda s: total(s).sum())(scores)
        np.testing.assert_array_equal(gradient, jnp.zeros((2, 2)))
    with jax.debug_nans(True):  # not one on the way either
        jax.grad(lambda s: total(s).sum())(jnp.ones((2, 2)))


def test_listwise_reward_loss_extreme_scores_are_finite():
    assert listwise_loss([-1e4, 1e4, 0], [1, 2, 3]) == pytest.approx(2e4)
    assert listwise_loss([1e4, 0, -1e4], [1, 2, 3]) == 0


def test_listwise_reward_loss_shapes():
    with pytest.raises(AssertionError):
        listwise_reward_loss(jnp.zeros(3), jnp.ones(3), jnp.ones(3))
    with pytest.raises(AssertionError):
        listwise_reward_loss(jnp.zeros((1, 3)), jnp.ones((1, 2)), jnp.ones((1, 3)))


def test_listwise_reward_loss_gradient_of_a_full_ranking():
    """Against −log of the one ordering's probability, drawn best first."""
    score = jax.random.normal(jax.random.key(7), (6, 4))
    rank = np.array([np.random.default_rng(i).permutation(4) + 1 for i in range(6)])

    def exact(score):
        drawn = jnp.exp(jnp.take_along_axis(score, jnp.argsort(rank, axis=1), axis=1))
        return -jnp.log(drawn / jnp.cumsum(drawn[:, ::-1], axis=1)[:, ::-1]).sum()

    def loss(score):
        return listwise_reward_loss(score, jnp.asarray(rank), jnp.ones((6, 4))).sum()

    np.testing.assert_allclose(loss(score), exact(score), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(score), jax.grad(exact)(score), atol=1e-5)


RANKED_SCORE = jnp.array([[2.0, 0, 1, jnp.nan], [1, 1, 0, jnp.inf], [3, 4, jnp.nan, jnp.nan]])

RANK = jnp.array([[1, 2, 3, 1], [1, 1, 2, 1], [5, 5, jnp.nan, 1]])

RANKED_MASK = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])


def test_ranked_pairs_loss_hand_computed():
    """Row 0: differences 2, 1 and −1; row 1: 1 and 1, its tie left out; row 2: but a tie."""
    loss = ranked_pairs_loss(RANKED_SCORE, RANK, RANKED_MASK)
    wanted = [np.mean([0.1269280, 0.3132617, 1.3132617]), 0.3132617, 0]
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    gradient = jax.grad(lambda s: ranked_pairs_loss(s, RANK, RANKED_MASK).sum())(RANKED_SCORE)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0)


def test_ranked_accuracy_hand_computed():
    np.testing.assert_allclose(
        ranked_accuracy(RANKED_SCORE, RANK, RANKED_MASK), [2 / 3, 1, 0.5], rtol=1e-6
    )


def rankings(weight):
    empty = jnp.zeros((3, 4, 1), jnp.int32)
    return PreferenceBatch(
        empty, empty, jnp.zeros(3), jnp.array(weight), rank_BC=RANK, candidate_mask_BC=RANKED_MASK
    )


@pytest.mark.parametrize("as_pairs", [False, True])
def test_listwise_reward_model_loss_and_metrics(as_pairs):
    config = ListwiseRewardModelConfig(as_pairs=as_pairs, score_l2=0.3)
    loss = listwise_reward_model(config).loss
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
        RANKED_SCORE, rankings([0.5, 0.5, 0])
    )
    one = (ranked_pairs_loss if as_pairs else listwise_reward_loss)(RANKED_SCORE, RANK, RANKED_MASK)
    np.testing.assert_allclose(value, (one[0] + one[1]) / 2 + 0.3 * (5 + 2) / 6, rtol=1e-6)
    wanted = {"accuracy": 5 / 6, "best": 1.5, "mean": (1 + 2 / 3) / 2, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0)  # a row of weight 0
    np.testing.assert_array_equal(gradient[:, 3], 0)  # absent


POINT_SCORE, POINT_TARGET = jnp.array([0.0, 2, -1]), jnp.array([0.5, 0, 1])


@pytest.mark.parametrize(
    ("kind", "delta", "wanted"),
    [
        ("mse", 1.0, [0.25, 4, 4]),
        ("huber", 1.0, [0.25, 3, 3]),  # beyond 1: 2·2 − 1
        ("huber", 0.5, [0.25, 1.75, 1.75]),  # 0.5·(2·2 − 0.5)
        ("binary", 1.0, [0.6931472, 2.1269280, 1.3132617]),
    ],
)
def test_pointwise_reward_loss_hand_computed(kind, delta, wanted):
    loss = pointwise_reward_loss(POINT_SCORE, POINT_TARGET, kind, delta)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert loss.dtype == jnp.float32


def test_pointwise_reward_loss_unknown_kind():
    with pytest.raises(ValueError, match="kind='mae': choose mse, huber or binary"):
        pointwise_reward_loss(POINT_SCORE, POINT_TARGET, "mae")


@pytest.mark.parametrize(
    ("kind", "loss", "error"), [("mse", 2.125, 1.25), ("binary", 1.4100376, 0.6903985)]
)
def test_pointwise_reward_model_loss_and_metrics(kind, loss, error):
    empty = jnp.zeros((3, 1, 1), jnp.int32)
    batch = PreferenceBatch(
        empty, empty, jnp.zeros(3), jnp.array([0.5, 0.5, 0]), label_B=jnp.array([0.5, 0, jnp.nan])
    )
    run = pointwise_reward_model(PointwiseRewardModelConfig(kind=kind, score_l2=0.1)).loss
    score = jnp.array([[0.0], [2], [jnp.inf]])
    (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(score, batch)
    np.testing.assert_allclose(value, loss + 0.2, rtol=1e-6)
    wanted = {"error": error if kind == "mse" else (0 + 0.8807971) / 2}
    wanted |= {"score": 1, "target": 0.25, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted)
    assert gradient[2] == 0


NAN = jnp.nan

STEP_SCORE = jnp.array([[NAN, 0.0, NAN, 2.0], [1.0, NAN, -1.0, NAN], [NAN, NAN, NAN, NAN]])

STEP_LABEL = jnp.array([[NAN, 0.5, NAN, 1.0], [1.0, NAN, 0.0, NAN], [NAN, NAN, NAN, NAN]])

STEP = jnp.array([[0, 1.0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]])

P2, P1 = 0.8807971, 0.7310586  # σ(2), σ(1)


def test_process_reward_loss_hand_computed():
    loss = process_reward_loss(STEP_SCORE, STEP_LABEL, STEP)
    np.testing.assert_allclose(loss, [(0.6931472 + 0.1269280) / 2, 0.3132617, 0], rtol=1e-6)
    gradient = jax.grad(lambda s: process_reward_loss(s, STEP_LABEL, STEP).sum())(STEP_SCORE)
    wanted = [[0, 0, 0, (P2 - 1) / 2], [(P1 - 1) / 2, 0, (1 - P1) / 2, 0], [0] * 4]
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("min", [0.5, 1 - P1]), ("product", [0.5 * P2, P1 * (1 - P1)]), ("last", [P2, 1 - P1])],
)
def test_aggregate_steps_hand_computed(how, wanted):
    np.testing.assert_allclose(aggregate_steps(STEP_SCORE, STEP, how), [*wanted, NAN], rtol=1e-6)


def test_aggregate_steps_unknown():
    with pytest.raises(ValueError, match="how='max': choose min, product or last"):
        aggregate_steps(STEP_SCORE, STEP, "max")


def test_process_reward_model_loss_and_metrics():
    empty = jnp.zeros((3, 1, 4), jnp.int32)
    batch = PreferenceBatch(
        empty,
        empty,
        jnp.zeros(3),
        jnp.array([0.5, 0.5, 0]),
        step_mask_BCT=STEP[:, None],
        label_BCT=STEP_LABEL[:, None],
    )
    loss = process_reward_model(ProcessRewardModelConfig(score_l2=0.1)).loss
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(STEP_SCORE[:, None], batch)
    plain = ((0.6931472 + 0.1269280) / 2 + 0.3132617) / 2
    np.testing.assert_allclose(value, plain + 0.1 * (2 + 1) / 2, rtol=1e-6)
    wanted = {"accuracy": 1, "reward": (0.5 + 1 - P1) / 2, "steps": 2, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted)
    assert np.isfinite(gradient).all()


MEMBER_SCORE = jnp.array([[1.0, 5, 0], [3, 5, jnp.nan]])


@pytest.mark.parametrize(
    ("combine", "k", "wanted"),
    [("mean", 1, [2, 5]), ("min", 1, [1, 5]), ("lcb", 1, [1, 5]), ("lcb", 0.5, [1.5, 5])],
)
def test_ensemble_score_hand_computed(combine, k, wanted):
    np.testing.assert_allclose(ensemble_score(MEMBER_SCORE, combine, k), [*wanted, np.nan])


def test_ensemble_score_unknown():
    with pytest.raises(ValueError, match="combine='max': choose mean, min or lcb"):
        ensemble_score(MEMBER_SCORE, "max")


def test_reward_models_microbatches_add_up():
    noise, six = jax.random.normal(jax.random.key(0), (6, 2)), pairs([0.1] * 6, [1 / 6] * 6)
    for loss, score, batch in (
        (reward_model(RewardModelConfig(centre_coef=0.01)).loss, noise, six),
        (
            listwise_reward_model(ListwiseRewardModelConfig()).loss,
            RANKED_SCORE,
            rankings([0.2, 0.3, 0.5]),
        ),
    ):
        parts = [
            loss(score[r], jax.tree.map(lambda x, r=r: x[r], batch))
            for r in (slice(2), slice(2, None))
        ]
        jax.tree.map(
            lambda whole, *part: np.testing.assert_allclose(sum(part), whole, rtol=1e-6, atol=1e-7),
            loss(score, batch),
            *parts,
        )
