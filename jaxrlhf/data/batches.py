"""Which rows make up which batch: pure functions of seed and step, with nothing to save.

Token ids of rows to learn from → one batch of padded arrays; numpy in, numpy out."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import PreferenceBatch, TokenBatch
from jaxrlhf.data.tokens import Encoded, Ids, imitated, right_pad


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


def token_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> TokenBatch:
    """Completion rows as a TokenBatch of numpy arrays, right-padded to T = ``width``.

    weight_BT is 1/n on the n tokens to imitate, stop tokens included, 0 elsewhere.

    Args:
      rows: the whole batch, of all hosts: the weights are over all of it. Slice afterwards.
      real_B: False on rows that only fill the batch; they get weight 0.
    """
    where = [row.source.where for row in rows]
    token_BT, mask_BT = right_pad([row.prompt + row.answers[0] for row in rows], width, pad, where)
    learn_BT = np.zeros_like(mask_BT)
    for index, row in enumerate(rows):
        learn = imitated(row)
        learn_BT[index, : len(learn)] = learn
    if real_B is not None:
        learn_BT = learn_BT * real_B[:, None]
    arrays: dict[str, Any] = {
        "token_BT": token_BT,
        "attention_mask_BT": mask_BT,
        "weight_BT": mean_weights(learn_BT),
    }
    return TokenBatch(**arrays)


def preference_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> PreferenceBatch:
    """Pair rows as a PreferenceBatch of numpy arrays, right-padded to T = ``width``; C = 2.

    Args:
      rows: the whole batch, of all hosts: the weights are over all of it. Slice afterwards.
      real_B: False on rows that only fill the batch; they get weight 0.
    """
    answers = [row.answers for row in rows]
    margin_B = np.array([getattr(row.source, "margin", 0.0) for row in rows], np.float32)
    return _candidates(rows, answers, width, pad, real_B, margin_B=margin_B)


def ranked_batch(
    rows: Sequence[Encoded],
    width: int,
    pad: int,
    real_B: np.ndarray | None = None,
    candidates: int = 2,
) -> PreferenceBatch:
    """Rankings as a PreferenceBatch with C = ``candidates``; arguments as for ``preference_batch``.

    A row with fewer responses is filled up with its first, where ``candidate_mask_BC`` is 0.
    """
    short = [candidates - len(row.answers) for row in rows]
    answers = [row.answers + row.answers[:1] * more for row, more in zip(rows, short, strict=True)]
    ranks: Any = [row.source.ranks for row in rows]  # type: ignore[union-attr]
    rank_BC = [(*rank, *[0.0] * more) for rank, more in zip(ranks, short, strict=True)]
    mask_BC = np.arange(candidates) < np.array([[len(row.answers)] for row in rows])
    return _candidates(
        rows,
        answers,
        width,
        pad,
        real_B,
        rank_BC=np.array(rank_BC, np.float32),
        candidate_mask_BC=mask_BC.astype(np.float32),
    )


def scored_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> PreferenceBatch:
    """Answers as a PreferenceBatch with C = 1; arguments as for ``preference_batch``.

    ``label_B`` is the column ``score``.
    """
    scores = [row.source.columns["score"] for row in rows]
    answers = [row.answers for row in rows]
    return _candidates(rows, answers, width, pad, real_B, label_B=np.array(scores, np.float32))


def answers_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> PreferenceBatch:
    """As ``scored_batch`` without labels, whatever the columns hold: only for being scored."""
    return _candidates(rows, [row.answers for row in rows], width, pad, real_B)


def steps_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> PreferenceBatch:
    """Stepwise answers as a PreferenceBatch with C = 1; arguments as for ``preference_batch``.

    ``step_mask_BCT`` is 1 at the last token of every step, and ``label_BCT`` there its label.
    """
    label_BCT, step_BCT = np.zeros((2, len(rows), 1, width), np.float32)
    for index, row in enumerate(rows):
        at = len(row.prompt) + np.array(row.ends)
        at = at[at < width]  # a row that is too long is refused below
        labels: Any = row.source.labels  # type: ignore[union-attr]
        step_BCT[index, 0, at] = 1
        label_BCT[index, 0, at] = labels[: len(at)]
    answers = [row.answers for row in rows]
    more = {"step_mask_BCT": step_BCT, "label_BCT": label_BCT}
    return _candidates(rows, answers, width, pad, real_B, **more)


def judged_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> PreferenceBatch:
    """Labelled rows as a PreferenceBatch with C = 1; arguments as for ``preference_batch``."""
    return _candidates(
        rows, [row.answers for row in rows], width, pad, real_B, label_B=_labels(rows)
    )


def labelled_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> PreferenceBatch:
    """Labelled rows as a PreferenceBatch; arguments as for ``preference_batch``.

    Candidate 0 is the row's answer and ``label_B`` its label; candidate 1 is the answer to another
    prompt, of the next row that has one, cut where it would be too long: what KTO estimates a KL
    with.

    Raises:
      InputError: all rows have one prompt.
    """
    answers = []
    for index, row in enumerate(rows):
        after = [*rows[index + 1 :], *rows[:index]]
        other = next((x.answers[0] for x in after if x.prompt != row.prompt), None)
        if other is None:
            raise InputError(
                f"{row.source.where}: a batch of labelled rows needs two prompts at least, and all "
                f"{len(rows)} rows have this one: raise data.batch_size, or give more prompts"
            )
        answers.append((row.answers[0], other[: width - len(row.prompt)]))
    return _candidates(rows, answers, width, pad, real_B, label_B=_labels(rows))


def _labels(rows: Sequence[Encoded]) -> np.ndarray:
    """1 for true, 0 for false; float32."""
    return np.array([row.source.columns["label"] for row in rows], np.float32)


def _candidates(
    rows: Sequence[Encoded],
    answers: Sequence[Sequence[Ids]],
    width: int,
    pad: int,
    real_B: np.ndarray | None,
    **more: np.ndarray,
) -> PreferenceBatch:
    """C answers to each row's prompt."""
    count = len(answers[0])
    flat = [
        row.prompt + answer for row, given in zip(rows, answers, strict=True) for answer in given
    ]
    where = [row.source.where for row in rows for _ in range(count)]
    token_RT, real_RT = right_pad(flat, width, pad, where)
    prompt_R = np.repeat([len(row.prompt) for row in rows], count)
    mask_RT = real_RT * (np.arange(width) >= prompt_R[:, None])
    shape = (len(rows), count, width)
    arrays: dict[str, Any] = {
        "token_BCT": token_RT.reshape(shape),
        "attention_mask_BCT": real_RT.reshape(shape),
        "mask_BCT": mask_RT.reshape(shape).astype(np.float32),
        "margin_B": np.zeros(len(rows), np.float32),
        "weight_B": mean_weights(np.ones(len(rows)) if real_B is None else real_B),
        **more,
    }
    return PreferenceBatch(**arrays)


def mean_weights(mask: np.ndarray) -> np.ndarray:
    """What masked.weights gives by token, without sending the batch to a device."""
    mask = (mask != 0).astype(np.float32)
    return mask / np.maximum(mask.sum(), np.float32(1))
