"""Statistics on the host, in numpy: intervals, win rates, pass@k, best of n, calibration.

An array of N completions of each of Q prompts is [Q, N], NaN where a number is unknown. A measure
of it is one number a prompt, NaN where there is none: completions of one prompt are no independent
draws of prompts, so intervals are taken over the latter (``over_prompts``).
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

# Means and their intervals


def mean_interval(x: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval): x̄ ± t · s/√n, with s² unbiased (ddof 1).

    t is Student's with n − 1 degrees of freedom: 2.26 for ten values, 1.96 for very many. The
    values should be independent: where a prompt has several completions, average over those first
    (arXiv:2411.00640). Too few values give NaN, the half width of one value included.

    Args:
      x: [n], in any unit; both results have that unit.
    """
    values = _one_dimension(x)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    return mean, student(n) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def share_interval(x: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of shares: win rates, or pass@k, one a prompt.

    Wilson's score interval (1927), with Student's t, for as many yes-or-no values as would scatter
    like these: p(1 − p)/s² · n (Kish's effective sample size). Unlike p ± t·s/√n it does not shrink
    to a point where all prompts agree. It is not symmetric: its farther end is what counts.

    Args:
      x: [n], in [0, 1], independent as for ``mean_interval``.
    """
    values = _one_dimension(x)
    n = len(values)
    if n < 2:
        return mean_interval(values)
    p, variance = float(values.mean()), float(values.var(ddof=1))
    low, high = wilson(p, p * (1 - p) / variance * n if variance > 0 else n, student(n))
    return p, max(high - p, p - low)


def wilson(p: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a probability, of which a share ``p`` of ``n`` was observed."""
    # (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    centre, scale = p + z**2 / (2 * n), 1 + z**2 / n
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / scale, (centre + half) / scale


def student(n: int) -> float:
    """Quantile 0.975 of Student's t with n − 1 degrees of freedom, n ≥ 2."""
    from scipy.special import stdtrit  # noqa: PLC0415 (a third of a second of a start)

    return float(stdtrit(n - 1, 0.975))


def over_prompts(
    x_B: np.ndarray, n: int, interval: Callable[..., tuple[float, float]] = mean_interval
) -> tuple[float, float]:
    """Mean of the prompts' means, and the half width of its 95 % interval.

    A completion without a number (NaN) is left out, a prompt without any likewise.

    Args:
      x_B: prompt-major; n completions of each prompt, which are averaged first.
    """
    x_QN = np.asarray(x_B, np.float64).reshape(-1, n)
    return interval(_known_mean(x_QN)[np.isfinite(x_QN).any(1)])


def _known_mean(x_QN: np.ndarray) -> np.ndarray:
    """Mean of the known numbers of each row; NaN for a row without one."""
    count_Q = np.isfinite(x_QN).sum(1)
    return np.nansum(x_QN, axis=1) / np.where(count_Q > 0, count_Q, np.nan)


def _one_dimension(x: Sequence[float] | np.ndarray) -> np.ndarray:
    if np.ndim(x) != 1:
        raise ValueError(f"x has shape {np.shape(x)}: pass one dimension")
    return np.asarray(x, np.float64)


# Repetition


def distinct_n(completions: Sequence[str | Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all completions (arXiv:1510.03055), in [0, 1].

    Near 0 where a policy repeats itself, within a completion or from one to the next. 0 if no
    completion is n long.

    Args:
      completions: token ids, or texts, which are split at white space.
      n: tokens (or words) of an n-gram, at least 1.
    """
    items = (x.split() if isinstance(x, str) else list(x) for x in completions)
    grams = [gram for each in items for gram in _grams(each, n)]
    return len(set(grams)) / max(len(grams), 1)


def repetition(tokens: Sequence[Hashable], n: int = 3) -> float:
    """Share of a completion's n-grams that have occurred in it before: 1 − distinct/all.

    0 where none comes twice, near 1 in a loop; NaN for a completion shorter than n.
    """
    grams = _grams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def _grams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return list(zip(*(items[i:] for i in range(n)), strict=False))


# Win rate, pass@k, majority votes, best of n. What is of k (or n) completions is float64 [Q], NaN
# for a prompt with fewer known ones, and a ValueError for k < 1.


def win_rate(ours_QN: np.ndarray, theirs_QM: np.ndarray) -> np.ndarray:
    """Pr(ours > theirs) + ½ Pr(ours = theirs), over all pairs of completions of a prompt.

    Each of the N is compared with each of the M, which has the mean of any one pairing and less
    variance. A pair with an unknown score does not count.

    Args:
      ours_QN, theirs_QM: scores of completions of the same Q prompts, any unit.
    """
    won_QNM = _right(np.asarray(ours_QN)[:, :, None] - np.asarray(theirs_QM)[:, None, :])
    return _known_mean(won_QNM.reshape(len(won_QNM), -1))


def _right(difference: np.ndarray) -> np.ndarray:
    """1 where it is above 0, 0 where below; a tie counts one half."""
    return (1 + np.sign(difference)) / 2


def pass_at_k(correct_QN: np.ndarray, k: int) -> np.ndarray:
    """1 − C(n−c, k)/C(n, k): unbiased Pr(one of k is correct), c of n being (arXiv:2107.03374).

    Args:
      correct_QN: 1 where a completion is correct, 0 where not; unknown ones do not count in n.
    """
    return best_of_n(correct_QN, k)  # the best of 0s and 1s


def maj_at_k(
    answers_QN: Sequence[Sequence[Hashable | None]], correct_QN: np.ndarray, k: int
) -> np.ndarray:
    """Pr(the commonest of k answers is correct) (self-consistency; arXiv:2203.11171).

    The mean over the ⌊n/k⌋ disjoint stretches of k completions, which is unbiased as they are
    independent. Where several answers are commonest, one is picked at random: their mean counts.

    Args:
      answers_QN: what each completion says, None where it has no answer: that one has no vote, and
        k without a vote are wrong.
      correct_QN: as for ``pass_at_k``.
    """
    _check(k)
    out_Q = np.full(len(answers_QN), np.nan)
    for q, (answers, correct) in enumerate(zip(answers_QN, correct_QN, strict=True)):
        known = [(a, c) for a, c in zip(answers, correct, strict=True) if not np.isnan(c)]
        votes = [_vote(known[i : i + k]) for i in range(0, len(known) - k + 1, k)]
        if votes:
            out_Q[q] = np.mean(votes)
    return out_Q


def _vote(ballots: Sequence[tuple[Hashable | None, float]]) -> float:
    counts = Counter(answer for answer, _ in ballots if answer is not None)
    most = max(counts.values(), default=0)
    # The same answer may be judged differently from one completion to the next: its mean counts.
    right = [
        np.mean([correct for given, correct in ballots if given == answer])
        for answer, count in counts.items()
        if count == most
    ]
    return float(np.mean(right)) if right else 0.0


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to ``most``, which ends the list also where it is no power of two."""
    powers = [2**i for i in range(most.bit_length())] if most > 0 else []
    return powers if not powers or powers[-1] == most else [*powers, most]


def best_of_n(score_QN: np.ndarray, n: float, value_QN: np.ndarray | None = None) -> np.ndarray:
    """Expected value of the best of n by score, from N ≥ n samples, unbiased and without drawing.

    Args:
      score_QN: what the best is chosen by; unknown ones are not among the samples.
      n: samples that one is chosen from. Between whole n: see ``order_weights``.
      value_QN: what is expected of the chosen one (a gold measure, say); None: the score. Samples
        of unknown value are not among the samples either.

    Returns:
      [Q], in the unit of the values.
    """
    _check(n)
    score_QN = np.asarray(score_QN, np.float64)
    value_QN = score_QN if value_QN is None else np.asarray(value_QN, np.float64)
    out_Q = np.full(len(score_QN), np.nan)
    for q, (score_N, value_N) in enumerate(zip(score_QN, value_QN, strict=True)):
        known_N = ~(np.isnan(score_N) | np.isnan(value_N))
        if known_N.sum() >= n:
            out_Q[q] = _expected(score_N[known_N], value_N[known_N], n)
    return out_Q


def _expected(score_N: np.ndarray, value_N: np.ndarray, n: float) -> float:
    # Of all C(N, n) subsets the i-th lowest score is the best in C(i−1, n−1), so the expectation is
    # Σ_i C(i−1, n−1)/C(N, n) · value of the i-th.
    _, rank_N = np.unique(score_N, return_inverse=True)
    count_R = np.bincount(rank_N)
    # Samples of equal score share their weight, as when the winner is picked at random among them.
    value_R = np.bincount(rank_N, value_N) / count_R
    weight_R = np.add.reduceat(order_weights(len(score_N), n), np.cumsum(count_R) - count_R)
    return float(weight_R @ value_R)


def order_weights(total: int, n: float) -> np.ndarray:
    """C(i−1, n−1)/C(N, n) for i = 1…N: how likely the i-th lowest of N is the best of n of them.

    C(i, n)/C(N, n), the chance that it or a lower one is, has a meaning for real n as well (0 up to
    i = n − 1): between two whole n the weights go from those of one to those of the other.

    Args:
      total: N samples, of which n are drawn without replacement, 1 ≤ n ≤ N.

    Returns:
      float64 [N], which sums to 1.
    """
    weight_N = np.zeros(total)
    reached = 1.0  # C(i, n)/C(N, n)
    for i in range(total, 0, -1):
        weight_N[i - 1] = reached * min(n / i, 1)
        reached *= max(1 - n / i, 0)  # C(i−1, n) = C(i, n) · (i − n)/i
    return weight_N


def best_of_n_nats(score_QN: np.ndarray, n: float) -> np.ndarray:
    """KL of the best of n by score to what the samples were drawn from, nats, for real n ≥ 1.

    With F(r) = Pr(score ≤ r) and F₋(r) = Pr(score < r) as a prompt's samples have them, the best
    has score r with probability w = Fⁿ − F₋ⁿ, and the KL is Σ_r w·log(w/(F − F₋))
    (arXiv:2401.01879). That is for scores that several samples have, of whatever prompts, such as 0
    and 1. A score that comes only once stands for a stretch of continuous ones,
    ∫ n·uⁿ⁻¹·log(n·uⁿ⁻¹) du from F₋ to F: where none comes twice that is log n − (n − 1)/n in all,
    and not the log N that N samples, counted, cannot exceed.
    """
    _check(n)
    return _nats(_levels(score_QN), n)


def n_at_kl(score_QN: np.ndarray, kl: float, most: int) -> float | None:
    """The real n, at most ``most``, at which the mean of ``best_of_n_nats`` is ``kl``.

    Args:
      kl: nats; one below 0, as an estimate from samples may be, counts as 0.

    Returns:
      The least such n; None where the best of ``most`` is nearer than that, or nothing is known.
    """
    levels = _levels(score_QN)

    def reaches(n: float) -> bool:
        nats_Q = _nats(levels, n)
        return bool(np.isfinite(nats_Q).any() and np.nanmean(nats_Q) >= max(kl, 0.0))

    if not reaches(most):
        return None
    if reaches(1.0):
        return 1.0
    below, above = 1.0, float(most)
    for _ in range(50):  # the KL rises with n: halve the stretch to the last bit
        middle = (below + above) / 2
        below, above = (below, middle) if reaches(middle) else (middle, above)
    return above


class _Levels(NamedTuple):
    """The scores of a prompt that differ, rising."""

    below_R: np.ndarray  # F₋ of each
    upto_R: np.ndarray  # F
    shared_R: np.ndarray  # whether other samples, of any prompt, have this score
    count: int  # known samples


def _levels(score_QN: np.ndarray) -> list[_Levels]:
    score_QN = np.asarray(score_QN, np.float64)
    level_L, count_L = np.unique(score_QN[~np.isnan(score_QN)], return_counts=True)
    shared_L = level_L[count_L > 1]
    out = []
    for score_N in score_QN:
        level_R, count_R = np.unique(score_N[~np.isnan(score_N)], return_counts=True)
        total, upto_R = int(count_R.sum()), np.cumsum(count_R)
        share = max(total, 1)
        below_R, shared_R = (upto_R - count_R) / share, np.isin(level_R, shared_L)
        out.append(_Levels(below_R, upto_R / share, shared_R, total))
    return out


def _nats(levels: Sequence[_Levels], n: float) -> np.ndarray:
    def log_part(u_R: np.ndarray) -> np.ndarray:
        # ∫ n·uⁿ⁻¹·log u du from 0: uⁿ·log u − uⁿ/n
        return u_R**n * (np.log(np.where(u_R > 0, u_R, 1)) - 1 / n)

    out_Q = np.full(len(levels), np.nan)
    for q, (below_R, upto_R, shared_R, count) in enumerate(levels):
        if count < n:
            continue
        weight_R = upto_R**n - below_R**n
        ratio_R = np.where(weight_R > 0, weight_R / (upto_R - below_R), 1)
        # log(n·uⁿ⁻¹) = log n + (n − 1)·log u
        stretch_R = weight_R * math.log(n) + (n - 1) * (log_part(upto_R) - log_part(below_R))
        out_Q[q] = np.where(shared_R, weight_R * np.log(ratio_R), stretch_R).sum()
    return out_Q


def _check(n: float) -> None:
    if n < 1:
        raise ValueError(f"n={n}: at least 1")


# How good a reward model's scores are


class Reliability(NamedTuple):
    """Predicted probabilities against what came true, bin by bin."""

    ece: float  # expected calibration error, in [0, 1]
    predicted: list[float]  # mean prediction of each bin, ascending
    observed: list[float]  # mean outcome there
    count: list[int]  # predictions there


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
    return reliability(sigmoid(np.abs(difference_N)), _right(difference_N), bins, 0.5)


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
    place_N, edges = _equal_mass(np.asarray(gap_N, float), bins)
    right_N = _right(np.asarray(difference_N, float))
    accuracy = [float(right_N[place_N == b].mean()) for b in range(len(edges))]
    return accuracy, edges.tolist()


def _equal_mass(x_N: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Each value's bin, by quantiles, and the bins' lower edges; equal values share a bin."""
    # Edges are values of x ("higher"), each once: so no bin is empty.
    edges = np.unique(np.quantile(x_N, np.arange(bins) / bins, method="higher"))
    return np.searchsorted(edges, x_N, side="right") - 1, edges


def distribution(score_N: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation (ddof 0) of scores, and their percentiles 5, 50 and 95."""
    score_N = np.asarray(score_N, float)
    return {
        "score_mean": float(score_N.mean()),
        "score_std": float(score_N.std()),
        **{f"score_p{p}": float(np.percentile(score_N, p)) for p in (5, 50, 95)},
    }


def correlation(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Pearson's correlation in [−1, 1]; NaN where one of the two does not vary."""
    x_N, y_N = (np.asarray(v, float) - np.mean(v) for v in (x_N, y_N))
    spread = np.sqrt((x_N**2).sum() * (y_N**2).sum())
    return float((x_N * y_N).sum() / spread) if spread > 0 else float("nan")


def rank_correlation(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Spearman's correlation, equal values with their mean rank; NaN as in ``correlation``."""
    return correlation(_ranks(x_N), _ranks(y_N))


def _ranks(x_N: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values with the mean of theirs."""
    _, place_N, count = np.unique(np.asarray(x_N), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place_N]


def sigmoid(x_N: np.ndarray) -> np.ndarray:
    """σ(x), float64, without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(x_N, float)))
