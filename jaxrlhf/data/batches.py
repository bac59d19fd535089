"""Which rows make up which batch: pure functions of seed and step, with nothing to save."""

from functools import lru_cache

import numpy as np

from jaxrlhf.errors import InputError


def order(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of training step ``step``.

    Epoch e is a permutation drawn from (seed, e). Laid end to end, the epochs are cut into slices
    of ``batch_size``; step s is slice s. So each row is used exactly once an epoch, no row is left
    out at an epoch's end, a dataset smaller than a batch wraps around, and a run resumes from its
    step alone.

    Args:
      count: rows of the dataset.
      batch_size: rows a step.
      seed: of the run, 0 or more.
      step: steps taken before this one, 0 or more.

    Returns:
      int64 [batch_size], each in [0, count).

    Raises:
      InputError: no rows, a batch of no rows, or a negative seed.
      ValueError: a negative step.
    """
    _check(count, batch_size)
    if seed < 0:
        raise InputError(f"seed={seed}: give 0 or more")
    if step < 0:
        raise ValueError(f"step={step} is negative")
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    epoch, offset = np.divmod(place, count)
    return np.array(
        [permutation(count, seed, int(e))[o] for e, o in zip(epoch, offset, strict=True)]
    )


def held_out_batches(
    count: int, batch_size: int, multiple: int = 1
) -> list[tuple[np.ndarray, np.ndarray]]:
    """All rows once, in file order, in as few batches as it takes, all of one size.

    The size is the least with which they are so few: 45 rows, at most 32 at once, are twice 23.

    Args:
      batch_size: rows at once, at most; rounded up to ``multiple``.
      multiple: what the size is a multiple of, say the devices that a batch is split over.

    Returns:
      (index_B int64, real_B bool) a batch. The last ones are filled up with row 0, where real_B is
      False: give those rows weight 0.

    Raises:
      InputError: no rows, or a batch of no rows.
    """
    _check(count, batch_size)
    batches = -(-count // (-(-batch_size // multiple) * multiple))
    size = -(-count // (batches * multiple)) * multiple
    index = np.arange(batches * size).reshape(batches, size)
    real = index < count
    return list(zip(np.where(real, index, 0), real, strict=True))


def _check(count: int, batch_size: int) -> None:
    if count < 1:
        raise InputError(f"the dataset has {count} rows; give one with at least 1")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give at least 1 row a batch")


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's rows in its order, drawn from (seed, epoch); read-only, shared by all callers."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    drawn = generator.permutation(count)
    drawn.setflags(write=False)
    return drawn
