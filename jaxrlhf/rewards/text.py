"""From sampled tokens to the text that reward functions read."""

from collections.abc import Sequence
from typing import TypeVar

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
