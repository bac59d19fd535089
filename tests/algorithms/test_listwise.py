import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.reward_models import (
    listwise_reward_loss,
    listwise_reward_model,
    pairwise_reward_loss,
    ranked_accuracy,
    ranked_pairs_loss,
)
from jaxrlhf.config import ListwiseRewardModelConfig
from jaxrlhf.core.types import PreferenceBatch


def loss_of(score, rank, mask=None):
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
        assert np.exp(-loss_of(score, rank)) == pytest.approx(probability, rel=1e-5)
        total += probability
    assert total == pytest.approx(1)


def test_listwise_reward_loss_ties():
    """Breslow: each of a group against the whole group and all below."""
    assert loss_of([5.0, 5, 5], [1, 1, 1]) == pytest.approx(3 * np.log(3), rel=1e-6)
    both_ways = sum(loss_of([1.0, 0.2], rank) for rank in ([1, 2], [2, 1]))
    assert loss_of([1.0, 0.2], [1, 1]) == pytest.approx(both_ways, rel=1e-6)
    e = np.exp([2.0, 1, 0])  # the first two tie for best
    wanted = -np.log(e[0] / e.sum()) - np.log(e[1] / e.sum())
    assert loss_of([2.0, 1, 0], [1, 1, 2]) == pytest.approx(wanted, rel=1e-6)
    wanted = -np.log(e[0] / e.sum()) - np.log(e[1] / e[1:].sum()) - np.log(e[2] / e[1:].sum())
    assert loss_of([2.0, 1, 0], [1, 2, 2]) == pytest.approx(wanted, rel=1e-6)


def test_listwise_reward_loss_ties_are_drawn_together():
    gradient = jax.grad(
        lambda s: listwise_reward_loss(s, jnp.array([[1, 1, 2]]), jnp.ones((1, 3))).sum()
    )(jnp.array([[1.0, 0, -1]]))[0]
    assert gradient[0] > gradient[1]  # the higher of the two gains less
    assert gradient[1] < 0 < gradient[2]


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
    np.testing.assert_allclose(value, loss_of([0.5, 1.1], [2, 1]), rtol=1e-6)
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
    assert loss_of([-1e4, 1e4, 0], [1, 2, 3]) == pytest.approx(2e4)
    assert loss_of([1e4, 0, -1e4], [1, 2, 3]) == 0


def test_listwise_reward_loss_shapes():
    with pytest.raises(AssertionError):
        listwise_reward_loss(jnp.zeros(3), jnp.ones(3), jnp.ones(3))
    with pytest.raises(AssertionError):
        listwise_reward_loss(jnp.zeros((1, 3)), jnp.ones((1, 2)), jnp.ones((1, 3)))


@pytest.mark.parametrize("best", [1, 2, 3])
def test_listwise_reward_loss_gradient_brute_force(best):
    """Of the ``best`` first places: loss and gradient of −log Σ over all orderings that agree."""
    score = jax.random.normal(jax.random.key(best), (5,), jnp.float32)
    orders = np.array([o for o in itertools.permutations(range(5)) if o[:best] == (3, 0, 4)[:best]])

    def exact(score):
        drawn = jnp.exp(score)[orders]
        left = jnp.cumsum(drawn[:, ::-1], axis=1)[:, ::-1]
        return -jnp.log(jnp.prod(drawn / left, axis=1).sum())

    def loss(score):
        """The places after ``best`` are one tie at the end, whose own terms are taken off."""
        rank = jnp.full(5, 9).at[jnp.array((3, 0, 4)[:best])].set(jnp.arange(best))
        tied = (rank == 9).astype(jnp.float32)
        whole = listwise_reward_loss(score[None], rank[None], jnp.ones((1, 5)))
        return (whole - listwise_reward_loss(score[None], rank[None], tied[None]))[0]

    np.testing.assert_allclose(loss(score), exact(score), atol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(score), jax.grad(exact)(score), atol=1e-5)


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


SCORE = jnp.array([[2.0, 0, 1, jnp.nan], [1, 1, 0, jnp.inf], [3, 4, jnp.nan, jnp.nan]])
RANK = jnp.array([[1, 2, 3, 1], [1, 1, 2, 1], [5, 5, jnp.nan, 1]])
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])


def test_ranked_pairs_loss_hand_computed():
    """Row 0: differences 2, 1 and −1; row 1: 1 and 1, its tie left out; row 2: but a tie."""
    loss = ranked_pairs_loss(SCORE, RANK, MASK)
    wanted = [np.mean([0.1269280, 0.3132617, 1.3132617]), 0.3132617, 0]
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    gradient = jax.grad(lambda s: ranked_pairs_loss(s, RANK, MASK).sum())(SCORE)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0)


def test_ranked_accuracy_hand_computed():
    np.testing.assert_allclose(ranked_accuracy(SCORE, RANK, MASK), [2 / 3, 1, 0.5], rtol=1e-6)


def rankings(weight):
    empty = jnp.zeros((3, 4, 1), jnp.int32)
    return PreferenceBatch(
        empty, empty, jnp.zeros(3), jnp.array(weight), rank_BC=RANK, candidate_mask_BC=MASK
    )


@pytest.mark.parametrize("as_pairs", [False, True])
def test_listwise_reward_model_loss_and_metrics(as_pairs):
    config = ListwiseRewardModelConfig(as_pairs=as_pairs, score_l2=0.3)
    loss = listwise_reward_model(config).loss
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
        SCORE, rankings([0.5, 0.5, 0])
    )
    one = (ranked_pairs_loss if as_pairs else listwise_reward_loss)(SCORE, RANK, MASK)
    np.testing.assert_allclose(value, (one[0] + one[1]) / 2 + 0.3 * (5 + 2) / 6, rtol=1e-6)
    wanted = {"accuracy": 5 / 6, "best": 1.5, "mean": (1 + 2 / 3) / 2, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0)  # a row of weight 0
    np.testing.assert_array_equal(gradient[:, 3], 0)  # absent


def test_listwise_reward_model_microbatches_add_up():
    loss, batch = listwise_reward_model(ListwiseRewardModelConfig()).loss, rankings([0.2, 0.3, 0.5])
    whole = loss(SCORE, batch)
    parts = [
        loss(SCORE[r], jax.tree.map(lambda x, r=r: x[r], batch)) for r in (slice(1), slice(1, 3))
    ]
    jax.tree.map(lambda w, *p: np.testing.assert_allclose(sum(p), w, rtol=1e-6), whole, *parts)
