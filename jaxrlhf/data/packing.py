"""Several short rows in one row of a batch, told apart by segment numbers; numpy in, numpy out."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import TokenBatch
from jaxrlhf.data.batches import mean_weights, permutation
from jaxrlhf.data.tokens import Encoded, imitated, right_pad

WINDOW = 1024
"""Rows of an epoch's order that are packed together."""

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
      seed: of the run, 0 or more.

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
    key = np.asarray(length_R, np.int64).tobytes()

    def rows_of(step: int) -> list[tuple[int, ...]]:
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
        target = int(np.argmax(room >= length_N[item]))
        if target == len(bins):
            bins.append([])
        bins[target].append(item)
        room[target] -= length_N[item]
    return bins


def packed_batch(bins: Sequence[Sequence[Encoded]], width: int, pad: int) -> TokenBatch:
    """Completion rows as a TokenBatch of numpy arrays, several in one row of T = ``width``.

    ``segment_BT`` counts the rows of a packed row from 1, and is 0 on padding; weight_BT is 1/n on
    the n tokens to imitate of the whole batch.

    Raises:
      InputError: rows that do not fit into ``width`` together.
    """
    rows = [[i for row in packed for i in (*row.prompt, *row.answers[0])] for packed in bins]
    where = [packed[0].source.where for packed in bins]
    token_BT, mask_BT = right_pad(rows, width, pad, where)
    segment_BT, learn_BT = np.zeros_like(mask_BT), np.zeros_like(mask_BT)
    for b, packed in enumerate(bins):
        learn = [imitated(row) for row in packed]
        real, lengths = slice(len(rows[b])), [len(x) for x in learn]
        segment_BT[b, real] = np.repeat(np.arange(1, len(packed) + 1), lengths)
        learn_BT[b, real] = np.concatenate(learn)
    arrays: dict[str, Any] = {
        "token_BT": token_BT,
        "attention_mask_BT": mask_BT,
        "weight_BT": mean_weights(learn_BT),
        "segment_BT": segment_BT,
    }
    return TokenBatch(**arrays)


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
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 2])))
    return tuple(bins[i] for i in generator.permutation(len(bins)))


@lru_cache(maxsize=4096)
def _count(key: bytes, width: int, seed: int, epoch: int) -> int:
    """The packed rows of an epoch."""
    return len(_epoch(key, width, seed, epoch))
