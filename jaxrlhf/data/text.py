"""From sampled tokens to the text that reward functions read.

A row as it is learnt from, for people to read."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

T = TypeVar("T")


def repeat(values: Sequence[T], n: int) -> list[T]:
    """Each prompt's value for its n samples, prompt-major as rollouts are: a, a, b, b."""
    return [value for value in values for _ in range(n)]


def decode_rollout(
    tokenizer: PreTrainedTokenizerFast,
    token_BT: np.ndarray,
    mask_BT: np.ndarray,
    prompts: Sequence[str],
) -> list[str]:
    """The text of each response, special tokens removed.

    Args:
      token_BT: int [B, T], prompt and response.
      mask_BT: [B, T], non-zero on the response's tokens; what it leaves out is not read.
      prompts: the B prompts, one a row (``repeat`` makes them of Q).

    Raises:
      ValueError: shapes that differ, or another number of prompts than of rows.
    """
    if token_BT.ndim != 2 or token_BT.shape != mask_BT.shape or len(token_BT) != len(prompts):
        raise ValueError(
            f"tokens {token_BT.shape}, mask {mask_BT.shape} and {len(prompts)} prompts differ"
        )
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    responses = [token_T[mask_T != 0] for token_T, mask_T in zip(token_BT, mask_BT, strict=True)]
    return [str(tokenizer.decode(ids.tolist(), **options)) for ids in responses]


MARKS = "⟦", "⟧"
"""What stands before and after text that is trained on."""


def show_example(tokenizer: Any, token_T: Sequence[int], weight_T: Sequence[float]) -> str:
    """The text of a row, with what is trained on between ⟦ and ⟧.

    Special tokens are written out, so that headers and ends of turns can be seen.

    Args:
      token_T: int [T], ids without padding.
      weight_T: [T], not 0 on the tokens that are trained on.

    Raises:
      ValueError: their lengths differ.
    """
    if len(token_T) != len(weight_T):
        raise ValueError(f"{len(token_T)} tokens and {len(weight_T)} weights")
    ids = [int(token) for token in token_T]

    def text(end: int) -> str:
        return tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)

    parts = []
    for learnt, places in groupby(range(len(ids)), lambda at: bool(weight_T[at] != 0)):
        run = list(places)
        before, upto = text(run[0]), text(run[-1] + 1)
        if upto.startswith(before):  # so that a space before a word is where the row has it
            part = upto[len(before) :]
        else:  # the cut goes through a character
            part = tokenizer.decode([ids[at] for at in run], clean_up_tokenization_spaces=False)
        parts.append(part.join(MARKS) if learnt else part)
    return "".join(parts)


def show_batch(tokenizer: Any, batch: Any) -> str:
    """The first row of a batch of numpy arrays: ``show_example``, a line for each answer compared.

    Args:
      batch: a TokenBatch, of which the first segment is shown if it is packed, or a
        PreferenceBatch; of labelled answers the one that is labelled.
    """
    if hasattr(batch, "token_BT"):
        real = batch.attention_mask_BT[0] != 0
        if batch.segment_BT is not None:
            real &= batch.segment_BT[0] == 1
        return show_example(tokenizer, batch.token_BT[0][real], batch.weight_BT[0][real])
    token_CT, mask_CT = batch.token_BCT[0], np.asarray(batch.mask_BCT)[0]
    real_CT = batch.attention_mask_BCT[0] != 0
    names = [str(c + 1) for c in range(len(token_CT))]
    if batch.label_B is not None:
        names = ["true" if batch.label_B[0] else "false"]
    return "\n".join(
        f"[{name}] {show_example(tokenizer, token_T[real], mask_T[real])}"
        for name, token_T, mask_T, real in zip(names, token_CT, mask_CT, real_CT, strict=False)
        if real.any()
    )
