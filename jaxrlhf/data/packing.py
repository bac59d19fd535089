"""Which short rows share a row of a batch: first-fit-decreasing, as a function of the step alone.

``batches.packed_batch`` makes the arrays, in which rows are told apart by segment numbers.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.batches import permutation

WINDOW = 1024
"""Rows of an epoch's order that are packed together: enough to leave little room empty."""

Bins = tuple[tuple[int, ...], ...]
"""The rows (their numbers in the dataset) of each packed row."""


def packing(
    length_R: np.ndarray, width: int, batch_size: int, seed: int
) -> Callable[[int], list[tuple[int, ...]]]:
    """The rows of each packed row of a training step, as a function of the step.

    An epoch's order is that of ``batches.order``. Every ``WINDOW`` rows of it are packed by
    first-fit-decreasing (each row, from the longest to the shortest, goes into the first packed row
    with room for it), and the packed rows shuffled. Laid end to end, the epochs are cut into slices
    of ``batch_size`` packed rows; step s is slice s. So each row is used exactly once an epoch, and
    what a step consumes follows from (seed, step) alone: there is nothing to save.

    Args:
      length_R: tokens of each row of the dataset.
      width: tokens of a packed row (data.max_tokens).
      batch_size: packed rows a step.

    Returns:
      Steps taken before this one → ``batch_size`` tuples of numbers in [0, R).

    Raises:
      InputError: no rows, or one longer than ``width``.
    """
    longest = int(np.max(length_R, initial=0))
    if len(length_R) < 1 or longest > width:
        raise InputError(
            f"data.max_tokens={width}: the longest of {len(length_R)} rows has {longest} tokens; "
            "raise it, or give rows"
        )
    # Bytes can be hashed, so that epochs are packed once and kept by their lengths.
    key = np.asarray(length_R, np.int64).tobytes()

    def rows_of(step: int) -> list[tuple[int, ...]]:
        # Epochs pack into different numbers of rows, so those before this one are counted off.
        skip, epoch = step * batch_size, 0
        while (count := _count(key, width, seed, epoch)) <= skip:
            skip, epoch = skip - count, epoch + 1
        chosen: list[tuple[int, ...]] = []
        while len(chosen) < batch_size:
            chosen += _epoch(key, width, seed, epoch)[skip : skip + batch_size - len(chosen)]
            skip, epoch = 0, epoch + 1
        return chosen

    return rows_of


def first_fit_decreasing(length_N: np.ndarray, width: int) -> list[list[int]]:
    """Items of the given lengths in as few bins of ``width`` as the greedy rule finds.

    At most 11/9 of the fewest possible, and 2/3 more (Dósa 2007). Of two items of one length, the
    earlier goes first.
    """
    bins: list[list[int]] = []
    room = np.full(len(length_N), width)
    for item in np.argsort(-length_N, kind="stable").tolist():
        # The first with room; ``room`` has an empty bin for every item, so there is one.
        target = int(np.argmax(room >= length_N[item]))
        if target == len(bins):
            bins.append([])
        bins[target].append(item)
        room[target] -= length_N[item]
    return bins


@lru_cache(maxsize=2)
def _epoch(key: bytes, width: int, seed: int, epoch: int) -> Bins:
    """The packed rows of an epoch, in the order in which they are used."""
    length_R = np.frombuffer(key, np.int64)
    order = permutation(len(length_R), seed, epoch)
    bins: list[tuple[int, ...]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packed = first_fit_decreasing(length_R[window], width)
        bins += [tuple(window[items].tolist()) for items in packed]
    # Shuffled, since the first packed rows of a window hold its longest rows. The 2 makes another
    # stream than that of the rows' order.
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 2])))
    return tuple(bins[i] for i in generator.permutation(len(bins)))


# Kept for far more epochs than the packed rows themselves: numbers are small, packing is slow.
@lru_cache(maxsize=4096)
def _count(key: bytes, width: int, seed: int, epoch: int) -> int:
    return len(_epoch(key, width, seed, epoch))
