"""Token ids → padded arrays; numpy out. Masks follow lengths, never ``token != pad``."""

from collections.abc import Sequence

import numpy as np

from jaxrlhf.errors import InputError

Ids = list[int]


def left_pad(
    rows: Sequence[Ids], width: int, pad: int, where: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts, padded on the left.

    Args:
      rows: Q lists of ids.
      width: P, data.max_prompt_tokens.
      pad: id to fill with.
      where: the place of each row.

    Returns:
      token_QP int32 and mask_QP int32, 1 on real tokens.

    Raises:
      InputError: a row longer than ``width``.
    """
    for ids, place in zip(rows, where, strict=True):
        check_length(len(ids), width, "data.max_prompt_tokens", place)
    return _pad(rows, width, pad, left=True)


def right_pad(
    rows: Sequence[Ids], width: int, pad: int, where: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Whole rows, padded on the right: token_BT and mask_BT, int32. As ``left_pad``, but T =
    ``width`` is data.max_tokens."""
    for ids, place in zip(rows, where, strict=True):
        check_length(len(ids), width, "data.max_tokens", place)
    return _pad(rows, width, pad, left=False)


def check_length(length: int, limit: int, field: str, where: str) -> None:
    """Raise InputError if a row of ``length`` tokens exceeds the field that limits it."""
    if length > limit:
        raise InputError(
            f"{where}: {length} tokens, and {field} is {limit}; "
            "raise it, shorten the row, or set data.skip_bad_rows"
        )


def _pad(rows: Sequence[Ids], width: int, pad: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    token_BT = np.full((len(rows), width), pad, np.int32)
    mask_BT = np.zeros((len(rows), width), np.int32)
    for index, ids in enumerate(rows):
        real = slice(width - len(ids), width) if left else slice(len(ids))
        token_BT[index, real] = ids
        mask_BT[index, real] = 1
    return token_BT, mask_BT
