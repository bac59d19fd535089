import numpy as np
import pytest

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.batches import held_out_batches, order


@pytest.mark.parametrize(
    ("count", "batch_size"), [(12, 4), (10, 4), (7, 3), (3, 8), (1, 5), (5, 5)]
)
def test_order_uses_each_row_once_an_epoch(count, batch_size):
    epochs = 8
    steps = -(-count * epochs // batch_size)
    stream = np.concatenate([order(count, batch_size, 3, step) for step in range(steps)])
    for epoch in stream[: count * epochs].reshape(epochs, count):
        assert sorted(epoch) == list(range(count))


def test_order_batch_across_an_epochs_end_takes_the_rest_and_the_next_start():
    whole = np.concatenate([order(5, 5, 0, epoch) for epoch in range(3)])
    parts = [order(5, 4, 0, step) for step in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[:12])


def test_order_every_epoch_and_every_seed_shuffles_afresh():
    epochs = [tuple(order(50, 50, seed, step)) for seed in range(3) for step in range(4)]
    assert len(set(epochs)) == len(epochs)


GOLDEN = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


def test_order_needs_no_earlier_step():
    alone = order(100, 8, 1, 57)
    for step in range(60):
        order(100, 8, 1, step)
    np.testing.assert_array_equal(order(100, 8, 1, 57), alone)


def test_order_does_not_change_between_versions():
    """A resumed run must go on where it was: these rows are a promise."""
    assert order(10, 10, 0, 0).tolist() == GOLDEN
    assert order(10, 10, 0, 0).dtype == np.int64


def test_order_result_is_the_callers_own():
    order(5, 5, 0, 0)[:] = -1
    assert sorted(order(5, 5, 0, 0)) == [0, 1, 2, 3, 4]


def test_order_first_rows_are_uniform():
    first = [order(4, 1, seed, 0)[0] for seed in range(400)]
    counts = np.bincount(first, minlength=4)
    assert (abs(counts - 100) < 40).all()  # 4.6 standard deviations


@pytest.mark.parametrize(
    ("count", "batch_size", "seed", "message"),
    [
        (0, 4, 0, "dataset has 0 rows"),
        (4, 0, 0, "batch_size=0"),
        (4, 4, -1, "seed=-1: give 0 or more"),
    ],
)
def test_order_bad_input(count, batch_size, seed, message):
    with pytest.raises(InputError, match=message):
        order(count, batch_size, seed, 0)


def test_order_negative_step():
    with pytest.raises(ValueError, match="step=-1"):
        order(4, 2, 0, -1)


@pytest.mark.parametrize(
    ("count", "batch_size", "multiple", "batches", "size"),
    [
        (8, 4, 1, 2, 4),
        (9, 4, 1, 3, 3),
        (1, 3, 1, 1, 1),
        (4, 1, 1, 4, 1),
        (45, 32, 1, 2, 23),
        (45, 32, 4, 2, 24),
        (45, 30, 4, 2, 24),
        (3, 32, 4, 1, 4),
        (9, 1, 4, 3, 4),
    ],
)
def test_held_out_batches_real_rows_once_in_order(count, batch_size, multiple, batches, size):
    made = held_out_batches(count, batch_size, multiple)
    assert len(made) == batches
    assert all(index.shape == real.shape == (size,) for index, real in made)
    rows = np.concatenate([index[real] for index, real in made])
    np.testing.assert_array_equal(rows, np.arange(count))


def test_held_out_batches_fills_up_with_a_row_that_exists():
    index, real = held_out_batches(5, 4)[-1]
    np.testing.assert_array_equal(index, [3, 4, 0])
    np.testing.assert_array_equal(real, [True, True, False])


def test_held_out_batches_bad_input():
    with pytest.raises(InputError, match="dataset has 0 rows"):
        held_out_batches(0, 4)
    with pytest.raises(InputError, match="batch_size=0"):
        held_out_batches(4, 0)
