"""Measures of completions, by hand and against brute force."""

import itertools
import math

import numpy as np
import pytest

from jaxrlhf.measures import (
    at_equal_kl,
    best_of_n,
    maj_at_k,
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


def test_at_equal_kl_of_an_estimate_below_0_is_the_start():
    assert at_equal_kl([0.0, 1.0], [0.5, 0.9], -0.003) == 0.5


def test_at_equal_kl():
    assert at_equal_kl([0, 1, 3], [0, 10, 20], 2) == 15
    assert at_equal_kl([0, 1, 3], [0, 10, 20], 3.1) is None
    assert at_equal_kl([0.5, 1, 3], [0, 10, 20], 0.4) is None
    assert at_equal_kl([], [], 0) is None
