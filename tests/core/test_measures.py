"""Measures of completions, by hand and against brute force."""

import itertools
import math

import numpy as np
import pytest

from jaxrlhf.core.stats import (
    best_of_n,
    best_of_n_nats,
    maj_at_k,
    n_at_kl,
    order_weights,
    pass_at_k,
    powers_of_two,
    repetition,
    win_rate,
)

NAN = np.nan


def test_win_rate_by_hand():
    ours_QN = np.array([[1.0, 3.0], [2.0, 2.0], [NAN, 5.0], [NAN, NAN]])
    theirs_QM = np.array([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0], [4.0, NAN, 6.0], [1.0, 2.0, 3.0]])
    # 1 against 0, 1, 3: 1 + ½ + 0; 3 against them: 1 + 1 + ½
    np.testing.assert_allclose(win_rate(ours_QN, theirs_QM), [4 / 6, 0.5, 0.5, NAN])


def test_win_rate_of_both_sides_sums_to_one():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 3, (2, 5, 4)).astype(float)
    np.testing.assert_allclose(win_rate(ours, theirs) + win_rate(theirs, ours), 1)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_pass_at_k_against_subsets(k):
    correct_QN = np.array([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1.0]])
    subsets = list(itertools.combinations(range(5), k))
    expected = [np.mean([row[list(s)].max() for s in subsets]) for row in correct_QN]
    np.testing.assert_allclose(pass_at_k(correct_QN, k), expected)


def test_pass_at_k_by_hand_and_unknown():
    # c = 2 of n = 4 known: 1 − C(2, 2)/C(4, 2) = 5/6
    correct_QN = np.array([[1, NAN, 0, 1, 0], [1, NAN, NAN, NAN, NAN]])
    np.testing.assert_allclose(pass_at_k(correct_QN, 2), [5 / 6, NAN])
    with pytest.raises(ValueError, match="n=0: at least 1"):
        pass_at_k(correct_QN, 0)


def test_maj_at_k_by_hand():
    answers = [["a", "b", "a", "c"], ["a", "b", None, None], [None, None, None, "a"]]
    correct = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    # four votes: a wins; a and b tie; a alone votes
    np.testing.assert_allclose(maj_at_k(answers, correct, 4), [1, 0.5, 1])
    # two votes, twice: ties of a with b and of a with c; a tie, then no vote; no vote, then a
    np.testing.assert_allclose(maj_at_k(answers, correct, 2), [0.5, 0.25, 0.5])
    np.testing.assert_allclose(maj_at_k(answers, correct, 1), [0.5, 0.25, 0.25])
    assert np.isnan(maj_at_k(answers, correct, 5)).all()


def test_maj_at_k_leaves_out_unknown():
    answers = [["b", "a", "b", "a"]]
    assert maj_at_k(answers, np.array([[NAN, 1, 0, 1.0]]), 3) == [1.0]
    assert np.isnan(maj_at_k(answers, np.array([[NAN, 1, NAN, 1.0]]), 3)).all()


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_against_subsets(n):
    rng = np.random.default_rng(1)
    score_QN = rng.standard_normal((3, 6))
    score_QN[1] = [0, 1, 1, 0, 2, 1]  # ties: the winner among them is picked at random
    gold_QN = rng.standard_normal((3, 6))
    subsets = [list(s) for s in itertools.combinations(range(6), n)]

    def gold_of_best(q, s):
        best = score_QN[q, s].max()
        return gold_QN[q, s][score_QN[q, s] == best].mean()

    best = [np.mean([score_QN[q, s].max() for s in subsets]) for q in range(3)]
    gold = [np.mean([gold_of_best(q, s) for s in subsets]) for q in range(3)]
    np.testing.assert_allclose(best_of_n(score_QN, n), best)
    np.testing.assert_allclose(best_of_n(score_QN, n, gold_QN), gold)


def test_best_of_n_shares_the_weight_of_ties():
    # of two out of {0, 1, 1}: all three pairs have a 1; each 1 wins half of the time
    score_QN, gold_QN = np.array([[1.0, 0.0, 1.0]]), np.array([[4.0, 100.0, 8.0]])
    np.testing.assert_allclose(best_of_n(score_QN, 2, gold_QN), [6.0])


def test_best_of_n_leaves_out_unknown():
    score_QN = np.array([[1.0, NAN, 3.0], [1.0, NAN, NAN]])
    np.testing.assert_allclose(best_of_n(score_QN, 2), [3, NAN])
    gold_QN = np.array([[5.0, 0.0, NAN], [7.0, 0, 0]])
    np.testing.assert_allclose(best_of_n(score_QN, 1, gold_QN), [5, 7])
    with pytest.raises(ValueError, match="n=0: at least 1"):
        best_of_n(score_QN, 0)


@pytest.mark.parametrize("n", [1, 3, 40, 64])
def test_order_weights_against_comb(n):
    expected = [math.comb(i - 1, n - 1) / math.comb(64, n) for i in range(1, 65)]
    np.testing.assert_allclose(order_weights(64, n), expected, rtol=1e-12)


def test_powers_of_two():
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(1) == [1]
    assert powers_of_two(0) == []


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4]) == 0
    assert repetition([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # one of three
    assert repetition(["a", "b", "a", "b", "a"], 2) == 0.5  # ab ba of ab ba ab ba
    assert np.isnan(repetition([1, 2]))


@pytest.mark.parametrize("n", [1, 2, 5.5, 16])
def test_best_of_n_nats_of_scores_that_differ(n):
    score_QN = np.random.default_rng(0).standard_normal((2, 16))
    np.testing.assert_allclose(best_of_n_nats(score_QN, n), math.log(n) - (n - 1) / n, atol=1e-12)


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (2, 0.13081204), (16, 0.69296270)])
def test_best_of_n_nats_of_a_fair_coin(n, kl):
    """The best is a 1 with probability 1 − 2⁻ⁿ; log 2 is as far as that gets."""
    coin_QN = np.tile([0.0, 1.0], (1, 8))
    np.testing.assert_allclose(best_of_n_nats(coin_QN, n), kl, atol=1e-7)


def test_best_of_n_nats_against_the_law_of_a_table():
    score_QN = np.array([[0.0, 1, 1, 2, 2, 2, 2, 7], [0, 0, 0, 0, 0, 0, 0, 7], [NAN] * 7 + [2]])
    for n in (1, 2, 3.5, 8):
        law = {0: (1, 8), 1: (3, 8), 2: (7, 8), 7: (8, 8)}
        bounds = [0] + [count / total for count, total in law.values()]
        wanted = 0.0
        for low, high in itertools.pairwise(bounds):
            weight = high**n - low**n
            wanted += weight * math.log(weight / (high - low))
        rare = (7 / 8) ** n
        wanted_rare = rare * math.log(rare * 8 / 7) + (1 - rare) * math.log((1 - rare) * 8)
        last = 0 if n == 1 else NAN  # fewer samples than n
        np.testing.assert_allclose(
            best_of_n_nats(score_QN, n), [wanted, wanted_rare, last], atol=1e-12
        )
    assert best_of_n_nats(np.ones((1, 4)), 4) == 0
    with pytest.raises(ValueError, match="n=0: at least 1"):
        best_of_n_nats(score_QN, 0)


def test_best_of_n_nats_of_one_score_that_stands_out():
    """Ties at the bottom, one alone on top: between what either rule alone would say."""
    score_QN = np.array([[0.0] * 15 + [1.0]])
    for n in (2, 7, 16):
        below = (15 / 16) ** n
        counted = below * math.log(below * 16 / 15) + (1 - below) * math.log((1 - below) * 16)
        (nats,) = best_of_n_nats(score_QN, n)
        assert counted <= nats <= min(1.03 * counted, math.log(n) - (n - 1) / n)


def test_n_at_kl():
    distinct_QN = np.random.default_rng(0).standard_normal((3, 16))
    for n in (1, 2, 5.5, 16):
        kl = math.log(n) - (n - 1) / n
        assert n_at_kl(distinct_QN, kl - 1e-12, 16) == pytest.approx(n, abs=1e-5)
    assert n_at_kl(distinct_QN, -0.003, 16) == 1  # an estimate from samples may be below 0
    assert n_at_kl(distinct_QN, 2.0, 16) is None
    coin_QN = np.tile([0.0, 1.0], (2, 8))
    assert n_at_kl(coin_QN, 0.1308120, 16) == pytest.approx(2, abs=1e-5)
    assert n_at_kl(coin_QN, 0.6932, 16) is None
    assert n_at_kl(np.ones((2, 4)), 0.0, 4) == 1
    assert n_at_kl(np.ones((2, 4)), 0.1, 4) is None
    assert n_at_kl(np.zeros((0, 4)), 0.0, 4) is None


def test_best_of_n_between_whole_n():
    """Rising and without a jump, and a law for every n."""
    score_QN = np.random.default_rng(2).standard_normal((1, 8))
    n_K = np.linspace(1, 8, 141)
    best_K = np.array([best_of_n(score_QN, n)[0] for n in n_K])
    assert (np.diff(best_K) > 0).all()
    assert np.diff(best_K).max() < 0.1
    weight_KN = np.array([order_weights(8, n) for n in n_K])
    np.testing.assert_allclose(weight_KN.sum(1), 1, rtol=1e-12)
    assert (weight_KN >= 0).all()
