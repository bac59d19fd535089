"""Where the steps of an answer end, in its tokens: one rule, for training and for scoring."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxrlhf.data.judged import Stepwise
from jaxrlhf.errors import InputError


def step_ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, separator: str) -> list[int]:
    """The place of each step's last token.

    A step ends with the token that completes the separator; the last one with the answer's last
    token, its stop token if it has one. Nothing but white space between two separators, or after
    the last of them, is no step. An answer without any text is one step.

    Special tokens have no text. A separator may be part of a token, or several tokens; of two steps
    that would end in one token, the second counts alone.

    Args:
      ids: of the answer, at least one.
      separator: not empty.

    Returns:
      Ascending indices into ``ids``, at least one.
    """
    ends: list[int] = []
    text, start = "", 0
    for at, token in enumerate(ids):
        text += _piece(tokenizer, int(token))
        while (found := text.find(separator, start)) >= 0:
            if text[start:found].strip():
                ends.append(at)
            start = found + len(separator)
    if text[start:].strip() or not ends:
        ends.append(len(ids) - 1)
    return sorted(set(ends))


def ends_by_label(
    row: Stepwise, ids: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> tuple[int, ...]:
    """The place of the last token of each step of a row, one a label.

    Raises:
      InputError: the answer's tokens have another number of steps.
    """
    ends = step_ends(ids, tokenizer, row.separator)
    if len(ends) != len(row.labels):
        raise InputError(
            f"{row.where}: {len(row.labels)} labels, and in its tokens the separator "
            f"{row.separator!r} ends {len(ends)} steps; choose an algorithm.separator that the "
            "tokenizer keeps"
        )
    return tuple(ends)


def mark_step_ends(
    token_BT: np.ndarray,
    mask_BT: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    separator: str,
) -> np.ndarray:
    """float32 [B, T], 1 at the last token of every step of a response, 0 elsewhere.

    Args:
      token_BT: int [B, T], prompt and response.
      mask_BT: [B, T], non-zero on the response's tokens; what it leaves out is not read.
    """
    end_BT = np.zeros(token_BT.shape, np.float32)
    for row, (token_T, mask_T) in enumerate(zip(token_BT, mask_BT, strict=True)):
        (place,) = np.nonzero(mask_T)
        if len(place):
            end_BT[row, place[step_ends(token_T[place].tolist(), tokenizer, separator)]] = 1
    return end_BT


@lru_cache(maxsize=2**18)
def _piece(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    """The text of one token."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode([token], **options))
