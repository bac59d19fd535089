"""How good a reward model's scores are: calibration, distribution, correlations; NumPy only."""

from typing import NamedTuple

import numpy as np


class Reliability(NamedTuple):
    """Predicted probabilities against what came true, bin by bin."""

    ece: float
    """Expected calibration error in [0, 1]; see ``reliability``."""
    predicted: list[float]
    """Mean prediction of each bin, ascending."""
    observed: list[float]
    """Mean outcome there."""
    count: list[int]
    """Predictions there."""


def reliability(
    probability_N: np.ndarray, outcome_N: np.ndarray, bins: int | None = None, low: float = 0.0
) -> Reliability:
    """The reliability curve, and ECE = Σ_b n_b/N·|observed_b − predicted_b| (arXiv:1706.04599).

    Bins hold equally many predictions, as many as ties allow: that is less biased than bins of
    equal width (arXiv:2012.08668). An ECE is never below 0, so noise alone adds to it: perfectly
    calibrated predictions have about Σ_b n_b/N·√(2 p_b(1 − p_b)/(π n_b)), which at p = ½ is 0.04
    with 100 predictions a bin and 0.13 with 10. Compare it only between sets of one size.

    Args:
      probability_N: [N], predictions in [low, 1].
      outcome_N: [N], what they predict: 0 or 1, or a probability.
      bins: most of them; None: 15, or fewer of at least ten predictions each.
      low: 0.5 where the prediction is that of the likelier of two outcomes.

    Raises:
      ValueError: no prediction, one out of range, or shapes that differ.
    """
    probability_N, outcome_N = np.asarray(probability_N, float), np.asarray(outcome_N, float)
    if probability_N.ndim != 1 or probability_N.shape != outcome_N.shape or not len(probability_N):
        raise ValueError(f"shapes {probability_N.shape} and {outcome_N.shape}: pass N of each")
    if not ((probability_N >= low) & (probability_N <= 1)).all():
        raise ValueError(f"a probability is outside of [{low:g}, 1]")
    bins = min(15, max(len(probability_N) // 10, 1)) if bins is None else bins
    place_N, _ = _equal_mass(probability_N, bins)
    count = np.bincount(place_N)
    predicted = np.bincount(place_N, probability_N) / count
    observed = np.bincount(place_N, outcome_N) / count
    ece = float((count * np.abs(observed - predicted)).sum() / len(probability_N))
    return Reliability(ece, predicted.tolist(), observed.tolist(), count.tolist())


def pair_reliability(difference_N: np.ndarray, bins: int | None = None) -> Reliability:
    """Reliability of σ(|Δ|), the probability that the answer with the higher score is the better.

    Args:
      difference_N: [N], Δ = r_better − r_worse, reward units. It came true where Δ > 0; a tie
        predicts one half, and counts so.
      bins: as in ``reliability``.
    """
    difference_N = np.asarray(difference_N, float)
    return reliability(sigmoid(np.abs(difference_N)), (1 + np.sign(difference_N)) / 2, bins, 0.5)


def distribution(score_N: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation (ddof 0) of scores, and their percentiles 5, 50 and 95."""
    score_N = np.asarray(score_N, float)
    percentiles = np.percentile(score_N, [5, 50, 95])
    names = ("score_p5", "score_p50", "score_p95")
    return {
        "score_mean": float(score_N.mean()),
        "score_std": float(score_N.std()),
        **{name: float(x) for name, x in zip(names, percentiles, strict=True)},
    }


def correlation(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Pearson's correlation in [−1, 1]; NaN where one of the two does not vary."""
    x_N, y_N = (np.asarray(v, float) - np.mean(v) for v in (x_N, y_N))
    spread = np.sqrt((x_N**2).sum() * (y_N**2).sum())
    return float((x_N * y_N).sum() / spread) if spread > 0 else float("nan")


def rank_correlation(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Spearman's correlation, equal values with their mean rank; NaN as in ``correlation``."""
    return correlation(_ranks(x_N), _ranks(y_N))


def accuracy_by_gap(
    difference_N: np.ndarray, gap_N: np.ndarray, bins: int = 4
) -> tuple[list[float], list[float]]:
    """Fraction of pairs in the right order, by how far apart the answers are.

    Args:
      difference_N: [N], r_better − r_worse; 0 counts one half.
      gap_N: [N], how much better, in the units of whoever labelled.
      bins: quantiles of the gap, with as many pairs each as ties allow; fewer where gaps tie.

    Returns:
      The bins' accuracies, and their lower edges in units of the gap; ascending.
    """
    difference_N, gap_N = np.asarray(difference_N, float), np.asarray(gap_N, float)
    place_N, edges = _equal_mass(gap_N, bins)
    right_N = (1 + np.sign(difference_N)) / 2
    accuracy = [float(right_N[place_N == b].mean()) for b in range(len(edges))]
    return accuracy, edges.tolist()


def _equal_mass(x_N: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Each value's bin, by quantiles, and the bins' lower edges; equal values share a bin, and no
    bin is empty."""
    edges = np.unique(np.quantile(x_N, np.arange(bins) / bins, method="higher"))
    return np.searchsorted(edges, x_N, side="right") - 1, edges


def sigmoid(x_N: np.ndarray) -> np.ndarray:
    """σ(x), float64, without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(x_N, float)))


def _ranks(x_N: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values with the mean of theirs."""
    _, place_N, count = np.unique(np.asarray(x_N), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place_N]
