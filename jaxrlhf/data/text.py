"""Tokens back to text: what reward functions read, where steps end, and what people are shown."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast as Tokenizer

from jaxrlhf.models.tokenizer import token_bytes

T = TypeVar("T")
MARKS = "⟦", "⟧"
"""What stands before and after text that is trained on."""


def repeat(values: Sequence[T], n: int) -> list[T]:
    """Each prompt's value for its n samples, prompt-major as rollouts are: a, a, b, b."""
    return [value for value in values for _ in range(n)]


def _text(tokenizer: Tokenizer, ids: list[int], special: bool = False) -> str:
    """The text of ids as they are; of special tokens only where asked for."""
    # Cleaning up drops the space before a full stop, and a reward would read other text.
    options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(ids, **options))


def answer_text(tokenizer: Tokenizer, ids: list[int], special: bool = False) -> str:
    """The text that ids add to a prompt: decoders of SentencePiece drop the space that begins a
    text, and prompt and answer would be joined without it."""
    text = _text(tokenizer, ids, special)
    silent = () if special else _special(tokenizer)
    first = next((token for token in ids if token not in silent), None)
    begins = first is not None and str(tokenizer.convert_ids_to_tokens(first)).startswith("▁")
    return f" {text}" if begins and not text.startswith(" ") else text


def decode_rollout(
    tokenizer: Tokenizer,
    token_BT: np.ndarray,
    mask_BT: np.ndarray,
    prompts: Sequence[str],
    ended_B: np.ndarray | None = None,
) -> list[str]:
    """The text of each response: special tokens removed or, where ``ended_B`` is given, kept.

    Kept text is without the special token that stopped the response, unless that closes a tag of
    the response, as ``</answer>`` does.

    Args:
      token_BT: int [B, T], prompt and response.
      mask_BT: [B, T], non-zero on the response's tokens; what it leaves out is not read.
      prompts: the B prompts, one a row (``repeat`` makes them of Q).
      ended_B: bool [B], whether the last token of a response is the one that stopped it.

    Raises:
      ValueError: shapes that differ, or another number of prompts than of rows.
    """
    if token_BT.ndim != 2 or token_BT.shape != mask_BT.shape or len(token_BT) != len(prompts):
        raise ValueError(
            f"tokens {token_BT.shape}, mask {mask_BT.shape} and {len(prompts)} prompts differ"
        )
    responses = [token_T[mask_T != 0] for token_T, mask_T in zip(token_BT, mask_BT, strict=True)]
    if ended_B is None:
        return [answer_text(tokenizer, ids.tolist()) for ids in responses]
    rows = zip(responses, ended_B, strict=True)
    return [_kept(tokenizer, ids.tolist(), bool(ended)) for ids, ended in rows]


def _kept(tokenizer: Tokenizer, ids: list[int], ended: bool) -> str:
    """The text with special tokens, but for one that stopped it."""
    last = ids[-1:] if ended else []
    # A stop token that is plain text is part of the text, as it is where special ones are removed.
    stop = "" if _text(tokenizer, last) else _text(tokenizer, last, special=True).strip()
    text = answer_text(tokenizer, ids[: len(ids) - bool(stop)], special=True)
    closes = stop.startswith("</") and stop.replace("</", "<", 1) in text
    return answer_text(tokenizer, ids, special=True) if closes else text


def step_ends(ids: Sequence[int], tokenizer: Tokenizer, separator: str) -> list[int]:
    """The place of each step's last token: one rule, for training and for scoring.

    A step ends with the token that completes the separator; the last one with the answer's last
    token, its stop token if it has one. Nothing but white space between two separators, or after
    the last of them, is no step. An answer without any text is one step.

    Special tokens have no text, but those that the separator is written with. A separator may be
    part of a token, or several tokens; of two steps that would end in one token, the second counts
    alone.

    Args:
      ids: of the answer, at least one.
      separator: not empty.

    Returns:
      Ascending indices into ``ids``, at least one.
    """
    table, mark = token_bytes(tokenizer), separator.encode()
    silent = {i for i, text in _special(tokenizer).items() if text not in separator}
    # By bytes, for a character may be split over tokens.
    pieces = [b"" if int(token) in silent else table.get(int(token), b"") for token in ids]
    whole, reached = b"".join(pieces), list(accumulate(map(len, pieces)))
    ends: list[int] = []
    start = 0
    while (found := whole.find(mark, start)) >= 0:
        step, start = whole[start:found], found + len(mark)
        if _has_words(step):
            ends.append(bisect_left(reached, start))
    if _has_words(whole[start:]) or not ends:
        ends.append(len(ids) - 1)
    return sorted(set(ends))


def _has_words(text: bytes) -> bool:
    return bool(text.decode(errors="replace").strip())


@lru_cache(maxsize=4)
def _special(tokenizer: Tokenizer) -> dict[int, str]:
    """Special tokens, by their ids."""
    known = tokenizer.added_tokens_decoder
    return {token: str(x) for token, x in known.items() if getattr(x, "special", False)}


def mark_step_ends(
    token_BT: np.ndarray, mask_BT: np.ndarray, tokenizer: Tokenizer, separator: str
) -> np.ndarray:
    """float32 [B, T], 1 at the last token of every step of a response, 0 elsewhere.

    Arrays are as for ``decode_rollout``.
    """
    end_BT = np.zeros(token_BT.shape, np.float32)
    for row, (token_T, mask_T) in enumerate(zip(token_BT, mask_BT, strict=True)):
        (place,) = np.nonzero(mask_T)
        if len(place):
            end_BT[row, place[step_ends(token_T[place].tolist(), tokenizer, separator)]] = 1
    return end_BT


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
    parts: list[str] = []
    done: list[int] = []
    for learnt, places in groupby(range(len(token_T)), lambda at: bool(weight_T[at] != 0)):
        run = [int(token_T[at]) for at in places]
        before, upto = (_text(tokenizer, ids, special=True) for ids in (done, done + run))
        done += run
        # Cut out of the whole, so that a space before a word is where the row has it; alone where
        # the cut goes through a character.
        whole = upto.startswith(before)
        part = upto[len(before) :] if whole else _text(tokenizer, run, special=True)
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
    # Not strict: one name for two answers leaves out the other prompt's, which has no label.
    return "\n".join(
        f"[{name}] {show_example(tokenizer, token_T[real], mask_T[real])}"
        for name, token_T, mask_T, real in zip(names, token_CT, mask_CT, real_CT, strict=False)
        if real.any()
    )


def units(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[tuple[list[int], int, int]]:
    """Tokens with the text that they stand for; those that share a character are one unit.

    The bytes of a character may lie in several tokens, the first of them with a space before it.
    Offsets leave out white space, which belongs to the token after it, and marks that a
    normalisation has joined with the letter before them, to which they belong.
    """
    found: list[tuple[list[int], int, int]] = []
    for token, (start, end) in zip(ids, offsets, strict=True):
        last, begin, reached = found[-1] if found else ([], 0, 0)
        if last and start < reached:
            found[-1] = ([*last, token], begin, max(end, reached))
            continue
        if last:
            reached += len(text[reached:start].rstrip())
            found[-1] = (last, begin, reached)
        found.append(([token], min(start, reached), max(end, reached)))
    if found:
        last, begin, reached = found[-1]
        found[-1] = (last, begin, reached + len(text[reached:].rstrip()))
    return found
