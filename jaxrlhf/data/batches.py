"""One batch of a run on rows: which rows are in it, and their arrays; numpy out.

Which ones follows from seed and step, so there is nothing to save. Packers take the whole batch, of
all hosts, because weights are over all of it; slice afterwards.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import PreferenceBatch, Rollout, TokenBatch
from jaxrlhf.data.tokens import Encoded, Ids, imitated, pad_rows, prompt_arrays


def order(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of training step ``step``.

    Epoch e is a permutation drawn from (seed, e). Laid end to end, the epochs are cut into slices
    of ``batch_size``; step s is slice s. So each row is used exactly once an epoch, no row is left
    out at an epoch's end, a dataset smaller than a batch wraps around, and a run resumes from its
    step alone.

    Args:
      count: rows of the dataset.
      step: steps taken before this one.

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
    # Places in the endless row of epochs; a batch may lie in two epochs, or in more.
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    epoch, offset = np.divmod(place, count)
    return np.array(
        [permutation(count, seed, int(e))[o] for e, o in zip(epoch, offset, strict=True)]
    )


# Callers ask row by row, for epochs that follow one another: drawn once, it is looked up.
@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's rows in its order, drawn from (seed, epoch); read-only, shared by all callers."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    drawn = generator.permutation(count)
    drawn.setflags(write=False)
    return drawn


def minibatch_rows(rows: int, pieces: int, seed: int, step: int, epoch: int) -> list[np.ndarray]:
    """The rows of each minibatch of one pass over a rollout: a permutation, cut into pieces.

    It follows from (seed, step, epoch) alone; int32, rows / pieces each.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step, epoch, 1])))
    return np.split(generator.permutation(rows).astype(np.int32), pieces)


def samples_at(share: float, seed: int, step: int) -> bool:
    """Whether step learns from what it samples, with this probability; it follows from seed and
    step."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step, 2])))
    return bool(generator.random() < share)


def answers_of(rows: Sequence[Encoded], width: int, new_tokens: int, pad: int) -> Rollout:
    """Prompts with the answers that the data has, as a rollout of one response each; numpy.

    Nobody has drawn them: log-probs are 0.

    Args:
      width: P, columns of the prompts.
      new_tokens: columns of the answers; none is longer.
    """
    prompt_BP, there_BP = prompt_arrays(rows, width, pad)
    where = [row.source.where for row in rows]
    answer_BN, real_BN = pad_rows([row.answers[0] for row in rows], new_tokens, pad, where)
    mask_BT = np.zeros((len(rows), width + new_tokens), np.float32)
    for mask_T, row in zip(mask_BT, rows, strict=True):
        learn = imitated(row)[len(row.prompt) :]
        mask_T[width : width + len(learn)] = learn
    return Rollout(
        token_BT=np.concatenate([prompt_BP, answer_BN], axis=1),  # type: ignore[arg-type]
        attention_mask_BT=np.concatenate([there_BP, real_BN], axis=1),  # type: ignore[arg-type]
        mask_BT=mask_BT,  # type: ignore[arg-type]
        logp_BT=np.zeros_like(mask_BT),  # type: ignore[arg-type]
        sample_logp_BT=np.zeros_like(mask_BT),  # type: ignore[arg-type]
        ended_B=np.array(  # type: ignore[arg-type]
            [row.source.columns.get("ended") is not False for row in rows]
        ),
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
    # −(−a // b) is a / b, rounded up.
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


def token_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> TokenBatch:
    """Completion rows as a TokenBatch of numpy arrays, right-padded to T = ``width``.

    weight_BT is 1/n on the n tokens to imitate, stop tokens included, 0 elsewhere.

    Args:
      real_B: False on rows that only fill the batch; they get weight 0.
    """
    batch = packed_batch([[row] for row in rows], width, pad)
    weight_BT: Any = batch.weight_BT
    # Over the real rows alone, whose weights then sum to 1.
    if real_B is not None:
        weight_BT = mean_weights(weight_BT * real_B[:, None])
    return batch.replace(weight_BT=weight_BT, segment_BT=None)  # type: ignore[attr-defined]


def packed_batch(bins: Sequence[Sequence[Encoded]], width: int, pad: int) -> TokenBatch:
    """Completion rows as a TokenBatch of numpy arrays, several in one row of T = ``width``.

    ``segment_BT`` counts the rows of a packed row from 1, and is 0 on padding; weight_BT is 1/n on
    the n tokens to imitate of the whole batch.

    Raises:
      InputError: rows that do not fit into ``width`` together.
    """
    rows = [[i for row in packed for i in (*row.prompt, *row.answers[0])] for packed in bins]
    where = [packed[0].source.where for packed in bins]
    token_BT, mask_BT = pad_rows(rows, width, pad, where)
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


def preference_batch(
    rows: Sequence[Encoded],
    width: int,
    pad: int,
    real_B: np.ndarray | None = None,
    answers: Sequence[Sequence[Ids]] | None = None,
    label: str = "",
    **more: np.ndarray,
) -> PreferenceBatch:
    """Prompts with C answers each as a PreferenceBatch, right-padded to T = ``width``.

    Args:
      real_B: False on rows that only fill the batch; they get weight 0.
      answers: C of them a row; None: the row's own.
      label: column that becomes ``label_B``: a number, or true and false as 1 and 0.
      more: further arrays of the batch, by their names in it.
    """
    answers = [row.answers for row in rows] if answers is None else answers
    count = len(answers[0])
    # R = B·C rows, the answers to one prompt next to each other.
    flat = [
        row.prompt + answer for row, given in zip(rows, answers, strict=True) for answer in given
    ]
    where = [row.source.where for row in rows for _ in range(count)]
    token_RT, real_RT = pad_rows(flat, width, pad, where)
    # Log-probs of the prompt are the same for all answers: losses leave them out.
    prompt_R = np.repeat([len(row.prompt) for row in rows], count)
    mask_RT = real_RT * (np.arange(width) >= prompt_R[:, None])
    shape = (len(rows), count, width)
    arrays: dict[str, Any] = {
        "token_BCT": token_RT.reshape(shape),
        "attention_mask_BCT": real_RT.reshape(shape),
        "mask_BCT": mask_RT.reshape(shape).astype(np.float32),
        "margin_B": np.array([getattr(row.source, "margin", 0) for row in rows], np.float32),
        "weight_B": mean_weights(np.ones(len(rows)) if real_B is None else real_B),
        **more,
    }
    if label:
        arrays["label_B"] = np.array([row.source.columns[label] for row in rows], np.float32)
    return PreferenceBatch(**arrays)


scored_batch = partial(preference_batch, label="score")
"""Answers with their score; C = 1."""

judged_batch = partial(preference_batch, label="label")
"""Answers that are right or wrong; C = 1."""


def ranked_batch(
    rows: Sequence[Encoded],
    width: int,
    pad: int,
    real_B: np.ndarray | None = None,
    candidates: int = 2,
) -> PreferenceBatch:
    """Rankings, with C = ``candidates``; other arguments as for ``preference_batch``.

    A row with fewer responses is filled up with its first, where ``candidate_mask_BC`` is 0.
    """
    ranks: Any = [row.source.ranks for row in rows]  # type: ignore[union-attr]
    short = [candidates - len(row.answers) for row in rows]
    answers = [row.answers + row.answers[:1] * more for row, more in zip(rows, short, strict=True)]
    rank_BC = np.array([(*rank, *[0] * more) for rank, more in zip(ranks, short, strict=True)])
    mask_BC = np.arange(candidates) < np.array([[len(row.answers)] for row in rows])
    return preference_batch(
        rows,
        width,
        pad,
        real_B,
        answers,
        rank_BC=rank_BC.astype(np.float32),
        candidate_mask_BC=mask_BC.astype(np.float32),
    )


def steps_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> PreferenceBatch:
    """Stepwise answers, C = 1; arguments as for ``preference_batch``.

    ``step_mask_BCT`` is 1 at the last token of every step, and ``label_BCT`` there its label.
    """
    label_BCT, step_BCT = np.zeros((2, len(rows), 1, width), np.float32)
    for index, row in enumerate(rows):
        at = len(row.prompt) + np.array(row.ends)
        at = at[at < width]  # a row that is too long is refused below
        labels: Any = row.source.labels  # type: ignore[union-attr]
        step_BCT[index, 0, at] = 1
        label_BCT[index, 0, at] = labels[: len(at)]
    return preference_batch(rows, width, pad, real_B, step_mask_BCT=step_BCT, label_BCT=label_BCT)


def labelled_batch(
    rows: Sequence[Encoded], width: int, pad: int, real_B: np.ndarray | None = None
) -> PreferenceBatch:
    """Labelled answers beside others, C = 2; arguments as for ``preference_batch``.

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
    return preference_batch(rows, width, pad, real_B, answers, "label")


def mean_weights(mask: np.ndarray) -> np.ndarray:
    """What masked.weights gives by token, without sending the batch to a device."""
    mask = (mask != 0).astype(np.float32)
    return mask / np.maximum(mask.sum(), np.float32(1))
