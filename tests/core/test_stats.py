"""Statistics by hand, against brute force over subsets, and against scipy."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from jaxrlhf.core.stats import (
    accuracy_by_gap,
    best_of_n,
    best_of_n_nats,
    correlation,
    distinct_n,
    distribution,
    maj_at_k,
    mean_interval,
    n_at_kl,
    order_weights,
    over_prompts,
    pair_reliability,
    pass_at_k,
    powers_of_two,
    rank_correlation,
    reliability,
    repetition,
    share_interval,
    sigmoid,
    wilson,
    win_rate,
)

NAN = np.nan


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b", "a b"]) == 2 / 4  # ab ba ab ab
    assert distinct_n([[1, 2, 3], [4, 1, 2]]) == 3 / 4
    assert distinct_n([[1, 2, 3], (3, 2, 1)], n=1) == 3 / 6
    assert distinct_n([[1, 1, 1, 1]], n=3) == 1 / 2
    assert distinct_n(["one", ""]) == 0.0


def test_mean_interval_against_scipy():
    x = np.array([0.0, 1, 1, 4, 2.5])
    mean, half = mean_interval(x)
    low, high = scipy.stats.t.interval(0.95, 4, x.mean(), scipy.stats.sem(x))
    np.testing.assert_allclose((mean - half, mean + half), (low, high), rtol=1e-6)


def test_mean_interval_few():
    assert mean_interval([2.0])[0] == 2.0
    assert math.isnan(mean_interval([2.0])[1])
    assert all(map(math.isnan, mean_interval([])))
    assert mean_interval([1.0, 1.0]) == (1.0, 0.0)


def test_over_prompts_by_hand():
    """1; none known, so left out; and (2 + 4)/2."""
    x_B = [1.0, NAN, NAN, NAN, 2.0, 4.0]
    assert over_prompts(np.array(x_B), 2) == mean_interval([1.0, 3.0])
    assert over_prompts(np.array(x_B), 2, share_interval) == share_interval([1.0, 3.0])


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (10, 10), (50, 100)])
def test_wilson_against_scipy(wins, n):
    found = scipy.stats.binomtest(wins, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(wins / n, n), (found.low, found.high), atol=1e-6)


def test_share_interval_where_all_agree():
    """t = 2.262157: 1 − 1/(1 + t²/10) = 0.338509, where the normal interval is a point."""
    assert share_interval([1.0] * 10) == (1.0, pytest.approx(0.338509, abs=1e-6))
    assert share_interval([0.0] * 10) == (0.0, pytest.approx(0.338509, abs=1e-6))
    assert share_interval([1.0])[0] == 1.0
    assert math.isnan(share_interval([1.0])[1])


def test_share_interval_of_many_is_the_mean_interval():
    """Away from 0 and 1, and as narrow as the shares are alike."""
    x = np.random.default_rng(0).uniform(0.4, 0.8, 500)
    mean, half = share_interval(x)
    assert mean == pytest.approx(x.mean())
    assert half == pytest.approx(mean_interval(x)[1], rel=0.02)


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


def test_reliability_hand_computed():
    """Two bins of two: 0.1, 0.3 → mean 0.2, observed 0.5; 0.9, 1.0 → 0.95 and 1."""
    found = reliability(np.array([0.1, 0.9, 0.3, 1.0]), np.array([0, 1, 1, 1]), bins=2)
    assert found.predicted == pytest.approx([0.2, 0.95])
    assert found.observed == pytest.approx([0.5, 1])
    assert found.count == [2, 2]
    assert found.ece == pytest.approx(0.5 * 0.3 + 0.5 * 0.05)


def test_reliability_bins_hold_equally_many():
    """Crowded predictions, which bins of equal width would put into one; ties stay together."""
    p = np.concatenate([np.linspace(0.90, 0.95, 40), [0.99] * 20])
    found = reliability(p, np.ones(60))
    assert found.count == [10, 10, 10, 10, 20]
    assert found.predicted == sorted(found.predicted)
    assert reliability(np.full(60, 0.7), np.ones(60)).count == [60]
    assert reliability(np.array([0.0, 0.95]), np.array([0, 1])).count == [2]  # too few for two


def test_reliability_noise_is_as_stated():
    generator = np.random.default_rng(0)
    p = np.full(100, 0.5) + np.arange(100) * 1e-6
    ece = np.mean([reliability(p, generator.random(100) < 0.5).ece for _ in range(400)])
    assert ece == pytest.approx(np.sqrt(2 * 0.25 / (np.pi * 10)), rel=0.05)


def test_reliability_of_a_calibrated_forecast_is_small():
    generator = np.random.default_rng(0)
    p = generator.random(20000)
    assert reliability(p, generator.random(20000) < p).ece < 0.02
    assert reliability(p, generator.random(20000) < p**2).ece > 0.1


def test_reliability_bad_input():
    with pytest.raises(ValueError, match=r"outside of \[0.5, 1\]"):
        reliability(np.array([0.4]), np.array([1]), low=0.5)
    with pytest.raises(ValueError, match="pass N of each"):
        reliability(np.array([]), np.array([]))


def test_pair_reliability_hand_computed():
    """σ(|±log 3|) = 0.75, right once of twice; a tie predicts ½ and counts ½."""
    found = pair_reliability(np.array([np.log(3), -np.log(3), 0.0]), bins=2)
    assert found.predicted == pytest.approx([0.5, 0.75])
    assert found.observed == pytest.approx([0.5, 0.5])
    assert found.ece == pytest.approx(0.25 * 2 / 3)


def test_pair_reliability_extremes():
    found = pair_reliability(np.array([1e4, -1e4]))
    assert found.predicted == [1.0]
    assert found.ece == 0.5


def test_distribution_hand_computed():
    found = distribution(np.arange(101.0))
    wanted = {"score_mean": 50, "score_std": np.sqrt(850), "score_p5": 5, "score_p50": 50}
    assert found == pytest.approx({**wanted, "score_p95": 95})


def test_correlation_hand_computed():
    assert correlation(np.array([1, 2, 3]), np.array([2, 4, 6])) == pytest.approx(1)
    assert correlation(np.array([1, 2, 3]), np.array([1, 0, 1])) == pytest.approx(0)
    assert np.isnan(correlation(np.array([1, 2]), np.array([3, 3])))


def test_rank_correlation_is_scipys_with_ties():
    x, y = np.random.default_rng(0).integers(0, 6, (2, 40))
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)


def test_accuracy_by_gap_hand_computed():
    accuracy, edges = accuracy_by_gap(
        np.array([1.0, -1, 0, 2, 3, 4, -1, 5]), np.array([0, 1, 2, 3, 4, 5, 6, 7])
    )
    assert edges == [0, 2, 4, 6]
    assert accuracy == [0.5, 0.75, 1, 0.5]


def test_accuracy_by_gap_merges_bins_that_ties_would_empty():
    accuracy, edges = accuracy_by_gap(np.array([1.0, -1, 1]), np.array([2, 2, 2]))
    assert edges == [2]
    assert accuracy == pytest.approx([2 / 3])


def test_sigmoid_does_not_overflow():
    np.testing.assert_allclose(sigmoid(np.array([-1e4, 0, 1e4])), [0, 0.5, 1])
