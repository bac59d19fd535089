"""Packing: each row once an epoch, nothing to save, and what the arrays of a packed batch say."""

import numpy as np
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.data import packing as sequences
from jaxrlhf.data.batches import packed_batch
from jaxrlhf.data.formats import Completion
from jaxrlhf.data.packing import first_fit_decreasing, packing
from jaxrlhf.data.tokens import Encoded

LENGTHS = np.random.default_rng(0).integers(2, 17, 60)


def row(prompt, answer, spans=None):
    return Encoded(prompt, (answer,), Completion("", "", {}, "x:1"), spans=spans)


def test_first_fit_decreasing_by_hand():
    packed = first_fit_decreasing(np.array([2, 7, 5, 4, 3, 5, 4]), 10)
    assert packed == [[1, 4], [2, 5], [3, 6, 0]]  # 7+3, 5+5, 4+4+2
    assert first_fit_decreasing(np.array([6, 6]), 10) == [[0], [1]]


def epochs_of(count, width, batch_size, seed=0):
    """Packed rows, step after step, until ``count`` epochs of rows have been seen."""
    rows, step = [], 0
    while sum(map(len, rows)) < count * len(LENGTHS):
        rows += packing(LENGTHS, width, batch_size, seed)(step)
        step += 1
    return rows


@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("window", [16, 1024])
def test_packing_uses_each_row_once_an_epoch(batch_size, window, monkeypatch):
    monkeypatch.setattr(sequences, "WINDOW", window)
    for cached in (sequences._epoch, sequences._count):
        cached.cache_clear()
    rows = epochs_of(3, 16, batch_size)
    for cached in (sequences._epoch, sequences._count):
        cached.cache_clear()
    assert all(LENGTHS[list(packed)].sum() <= 16 for packed in rows)
    stream = [i for packed in rows for i in packed]
    for epoch in range(3):
        part = stream[epoch * len(LENGTHS) : (epoch + 1) * len(LENGTHS)]
        assert sorted(part) == list(range(len(LENGTHS)))


def test_packing_needs_no_earlier_step():
    before = [packing(LENGTHS, 16, 4, 1)(step) for step in range(30)]
    for cached in (sequences._epoch, sequences._count):
        cached.cache_clear()
    assert packing(LENGTHS, 16, 4, 1)(29) == before[29]
    assert packing(LENGTHS, 16, 4, 1)(3) == before[3]


def test_packing_looks_at_all_lengths_once():
    class Lengths(np.ndarray):
        reads = 0

        def __array_function__(self, *args, **kwargs):
            Lengths.reads += 1
            return super().__array_function__(*args, **kwargs)

        def __iter__(self):
            raise AssertionError("one by one")

    rows_of = packing(LENGTHS.view(Lengths), 16, 4, 1)
    before = Lengths.reads
    assert before > 0
    assert rows_of(7) == packing(LENGTHS, 16, 4, 1)(7)
    assert Lengths.reads == before


def test_packing_every_epoch_and_every_seed_packs_afresh():
    firsts = [tuple(epochs_of(2, 16, 1, seed)[at]) for seed in range(3) for at in (0, 40)]
    assert len(set(firsts)) == len(firsts)


def test_packing_does_not_change_between_versions():
    """A resumed run must go on where it was: these rows are a promise."""
    lengths = np.array([3, 5, 2, 4, 6, 1, 2])
    assert packing(lengths, 8, 3, 0)(0) == GOLDEN


GOLDEN = [(3, 6, 5), (1, 0), (4, 2)]


def test_packing_leaves_little_empty():
    rows = epochs_of(1, 64, 1)
    fewest = -(-LENGTHS.sum() // 64)
    assert len(rows) <= fewest + 1


@pytest.mark.parametrize(("lengths", "width"), [([], 8), ([3, 9], 8)])
def test_packing_refuses(lengths, width):
    with pytest.raises(InputError, match=f"data.max_tokens={width}: the longest of"):
        packing(np.array(lengths, np.int64), width, 1, 0)(0)


def test_packed_batch_by_hand():
    """Of the second row's answer, only its first and last tokens are the assistant's."""
    bins = [[row([1], [2, 3]), row([4, 5], [6, 7, 8], ((0, 1), (2, 3)))], [row([9], [10])]]
    batch = packed_batch(bins, 10, pad=0)
    np.testing.assert_array_equal(
        batch.token_BT, [[1, 2, 3, 4, 5, 6, 7, 8, 0, 0], [9, 10, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.segment_BT, [[1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.attention_mask_BT, batch.segment_BT != 0)
    learn = np.array([[0, 1, 1, 0, 0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(batch.weight_BT, learn / 5, rtol=1e-6)
    assert batch.segment_BT.dtype == np.int32
    assert batch.weight_BT.dtype == np.float32


def test_packed_batch_too_long():
    with pytest.raises(InputError, match=r"x:1: 6 tokens, and data\.max_tokens is 5"):
        packed_batch([[row([1], [2, 3]), row([4], [5, 6])]], 5, 0)
