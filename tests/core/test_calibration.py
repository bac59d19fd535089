"""Calibration, accuracy by gap and correlations, against numbers worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from jaxrlhf.core.stats import (
    accuracy_by_gap,
    correlation,
    distribution,
    pair_reliability,
    rank_correlation,
    reliability,
    sigmoid,
)


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
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
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
