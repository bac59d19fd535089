"""What completions are measured by: win rates, pass@k, majority votes, best-of-n, repetition.

Plain numpy on the host. Prompts come first: an array of N completions a prompt is [Q, N], NaN
where a number is unknown, and what comes out is one number a prompt, NaN where there is none: the
completions of a prompt are no independent draws of prompts, so intervals are taken over the latter.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def win_rate(ours_QN: np.ndarray, theirs_QM: np.ndarray) -> np.ndarray:
    """Pr(ours > theirs) + ½ Pr(ours = theirs), over all pairs of completions of a prompt.

    Each of the N is compared with each of the M, which has the mean of any one pairing and less
    variance. Ties count one half; a pair with an unknown score does not count.

    Args:
      ours_QN, theirs_QM: scores of completions of the same Q prompts, any unit.

    Returns:
      float64 [Q], in [0, 1].
    """
    difference_QNM = np.asarray(ours_QN)[:, :, None] - np.asarray(theirs_QM)[:, None, :]
    won_QNM = np.where(np.isnan(difference_QNM), np.nan, (np.sign(difference_QNM) + 1) / 2)
    return _mean(won_QNM.reshape(len(won_QNM), -1))


def pass_at_k(correct_QN: np.ndarray, k: int) -> np.ndarray:
    """1 − C(n−c, k)/C(n, k): unbiased Pr(one of k is correct), c of n being (arXiv:2107.03374).

    Args:
      correct_QN: 1 where a completion is correct, 0 where not; unknown ones do not count in n.
      k: completions that one of which has to be correct, at least 1.

    Returns:
      float64 [Q]; NaN for a prompt with fewer than k known completions.

    Raises:
      ValueError: if ``k`` is less than 1.
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
      correct_QN: as for ``pass_at_k``; completions of unknown correctness are left out.
      k: completions that vote, at least 1.

    Returns:
      float64 [Q]; NaN for a prompt with fewer than k known completions.

    Raises:
      ValueError: if ``k`` is less than 1.
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
    right = [
        np.mean([correct for given, correct in ballots if given == answer])
        for answer, count in counts.items()
        if count == most
    ]
    return float(np.mean(right)) if right else 0.0


def best_of_n(score_QN: np.ndarray, n: int, value_QN: np.ndarray | None = None) -> np.ndarray:
    """Expected value of the best of n by score, from N ≥ n samples, unbiased and without drawing.

    Of all C(N, n) subsets the i-th lowest score is the best in C(i−1, n−1), so the expectation is
    Σ_i C(i−1, n−1)/C(N, n) · value of the i-th. Samples of equal score share their weight, as when
    the winner among them is picked at random.

    Args:
      score_QN: what the best is chosen by; unknown ones are not among the samples.
      n: samples that one is chosen from, at least 1.
      value_QN: what is expected of the chosen one (a gold measure, say); None: the score. Samples
        of unknown value are not among the samples either.

    Returns:
      float64 [Q], in the unit of the values; NaN for a prompt with fewer than n samples.

    Raises:
      ValueError: if ``n`` is less than 1.
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


def _expected(score_N: np.ndarray, value_N: np.ndarray, n: int) -> float:
    _, rank_N = np.unique(score_N, return_inverse=True)
    count_R = np.bincount(rank_N)
    value_R = np.bincount(rank_N, value_N) / count_R
    weight_R = np.add.reduceat(order_weights(len(score_N), n), np.cumsum(count_R) - count_R)
    return float(weight_R @ value_R)


def order_weights(total: int, n: int) -> np.ndarray:
    """C(i−1, n−1)/C(N, n) for i = 1…N: how likely the i-th lowest of N is the best of n of them.

    Args:
      total: N, samples.
      n: of which n are drawn without replacement, 1 ≤ n ≤ N.

    Returns:
      float64 [N], which sums to 1.
    """
    weight_N = np.zeros(total)
    weight_N[-1] = n / total
    for i in range(total - 1, n - 1, -1):  # C(i−1, n−1) = C(i, n−1) · (i − n + 1)/i
        weight_N[i - 1] = weight_N[i] * (i - n + 1) / i
    return weight_N


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to ``most``, which ends the list also where it is no power of two."""
    powers = [2**i for i in range(most.bit_length())] if most > 0 else []
    return powers if not powers or powers[-1] == most else [*powers, most]


def repetition(tokens: Sequence[Hashable], n: int = 3) -> float:
    """Share of a completion's n-grams that have occurred in it before: 1 − distinct/all.

    0 where none comes twice, near 1 in a loop; NaN for a completion shorter than n.

    Args:
      tokens: token ids or words of one completion.
      n: tokens of an n-gram.
    """
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def at_equal_kl(kl_K: Sequence[float], value_K: Sequence[float], kl: float) -> float | None:
    """A curve's value at a KL, by linear interpolation; None where the curve does not reach.

    Args:
      kl_K: nats, rising.
      value_K: any unit.
      kl: nats.
    """
    kl = max(kl, 0.0)  # an estimate from samples may be just below
    if not kl_K or not kl_K[0] <= kl <= kl_K[-1]:
        return None
    return float(np.interp(kl, kl_K, value_K))


def _mean(x_QN: np.ndarray) -> np.ndarray:
    """Mean of the known numbers of each row; NaN for a row without one."""
    count_Q = np.isfinite(x_QN).sum(1)
    return np.nansum(x_QN, axis=1) / np.where(count_Q > 0, count_Q, np.nan)


def _check(n: int) -> None:
    if n < 1:
        raise ValueError(f"n={n}: at least 1")
