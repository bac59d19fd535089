"""Packing: each row once an epoch, in as few packed rows as it takes, and nothing to save."""

import numpy as np
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.data import packing as module
from jaxrlhf.data.packing import first_fit_decreasing, packing

LENGTHS = np.random.default_rng(0).integers(2, 17, 60)


@pytest.fixture
def forgotten():
    """Nothing is kept of other tests, or left to them."""
    for kept in (module._epoch, module._count):
        kept.cache_clear()
    yield module
    for kept in (module._epoch, module._count):
        kept.cache_clear()


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
def test_packing_uses_each_row_once_an_epoch(batch_size, window, forgotten, monkeypatch):
    monkeypatch.setattr(forgotten, "WINDOW", window)
    rows = epochs_of(3, 16, batch_size)
    assert all(LENGTHS[list(packed)].sum() <= 16 for packed in rows)
    stream = [i for packed in rows for i in packed]
    for epoch in range(3):
        part = stream[epoch * len(LENGTHS) : (epoch + 1) * len(LENGTHS)]
        assert sorted(part) == list(range(len(LENGTHS)))


def test_packing_needs_no_earlier_step(forgotten):
    later, early = (packing(LENGTHS, 16, 4, 1)(step) for step in (29, 3))
    forgotten._epoch.cache_clear()
    forgotten._count.cache_clear()
    all_steps = [packing(LENGTHS, 16, 4, 1)(step) for step in range(30)]
    assert (all_steps[29], all_steps[3]) == (later, early)


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
    assert packing(lengths, 8, 3, 0)(0) == [(3, 6, 5), (1, 0), (4, 2)]


def test_packing_leaves_little_empty():
    rows = epochs_of(1, 64, 1)
    fewest = -(-LENGTHS.sum() // 64)
    assert len(rows) <= fewest + 1


@pytest.mark.parametrize(("lengths", "width"), [([], 8), ([3, 9], 8)])
def test_packing_refuses(lengths, width):
    with pytest.raises(InputError, match=f"data.max_tokens={width}: the longest of"):
        packing(np.array(lengths, np.int64), width, 1, 0)(0)
