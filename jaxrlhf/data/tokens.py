"""Text → token ids → padded arrays, on the host; numpy out.

Prompt and answers are tokenised as the whole text that they are, and cut where one passes into the
other: the same words have other ids at a text's beginning. A row's first ids are those of its
prompt alone, which is what a sampler is given; where a token of the whole lies across the border,
each side is tokenised in its place. Of an answer with several turns (SFT) each turn is cut out
likewise.

The end-of-sequence rule. A response that the sampler finished carries its stop token, as its last
id. So does every answer to be trained on, exactly once: whatever a chat template writes after a
stop token of the answer's end (a line break) is cut, and an answer without one gets the
tokenizer's end-of-sequence. A tokenizer that has none stops no sampler, and none is added. Answers
that were cut off say so (``ended``, ``chosen_ended``, ``rejected_ended`` false in the row), and get
none: one that the template has written, and what follows it, is cut. Reward models therefore see
in training what they see in scoring.

Masks follow lengths, never ``token != pad``: padding and end-of-sequence may share an id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast as Tokenizer

from jaxrlhf.config import (
    Config,
    GKDConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    SFTConfig,
    is_on_policy,
)
from jaxrlhf.core.errors import InputError, refused
from jaxrlhf.core.shown import shown
from jaxrlhf.data.chat import chat_settings
from jaxrlhf.data.formats import (
    ENDS,
    READERS,
    Completion,
    Pair,
    Prompt,
    Ranked,
    Stepwise,
    read_completions,
    read_prompts,
)
from jaxrlhf.data.rows import Rows, read_rows, transform
from jaxrlhf.data.text import step_ends, units

Ids = list[int]
Source = Prompt | Completion | Pair | Ranked | Stepwise
Span = tuple[int, int]
"""From where, and to before where."""

ANY_LENGTH = 2**31
"""A limit in tokens where another, the networks' context, is the limit."""

NORMALISED = 128
"""Answers that a normalisation is measured on, at most: its mean is then right to a tenth of the
standard deviation."""


@dataclass(frozen=True)
class Encoded:
    """A row as token ids."""

    prompt: Ids
    answers: tuple[Ids, ...]
    """None for a prompt, the completion, chosen and rejected, or all that are ranked; each ends in
    its stop token."""
    source: Source
    ends: tuple[int, ...] = ()
    """The last token of each step of the answer, counted from its first."""
    spans: tuple[Span, ...] | None = None
    """Where in the completion the assistant's tokens are; None: all of it."""


def load_data(
    config: Config, path: str, tokenizer: Any, vocab: int, held_out: bool = False
) -> Rows[Encoded]:
    """The rows of a file as the run's algorithm reads them, tokenised and checked.

    Args:
      vocab: rows of the model's embedding table.
      held_out: rows that are measured and never learnt from: prompts, where responses are sampled.
    """
    skip, kind = config.data.skip_bad_rows, config.algorithm
    answered = isinstance(kind, GKDConfig) and kind.lmbda < 1 and not held_out
    rows = "completions" if answered else getattr(kind, "rows", "prompts")
    read: Any = {**READERS, "prompts": read_prompts}[rows]
    options: dict[str, Any] = {}
    if isinstance(kind, PointwiseRewardModelConfig):
        options = {"binary": kind.kind == "binary"}
    if isinstance(kind, ProcessRewardModelConfig):
        options = {"separator": kind.separator}
    if isinstance(kind, SFTConfig):
        options = {"train_on": kind.train_on}
    options["chat"] = chat_settings(config.data)
    given = read(read_rows(path, skip), tokenizer, skip, **options)
    limit = config.data.max_prompt_tokens if is_on_policy(config) else config.data.max_tokens
    sample = config.sample
    ends = sample.stop, skip, sample.stop_strings
    answer = sample.max_new_tokens if answered else None
    return encode_rows(given, tokenizer, vocab, limit, *ends, answer)


def load_normalise_rows(config: Config, tokenizer: Any, vocab: int) -> Rows[Encoded] | None:
    """The answers that a reward model's scores are normalised on; None if they are not.

    Raises:
      InputError: fewer than two rows, or bad ones.
    """
    path, skip = config.algorithm.normalise_on, config.data.skip_bad_rows
    if not path:
        return None
    chat = chat_settings(config.data)
    rows = read_completions(read_rows(path, skip), tokenizer, skip, chat)
    limit, sample = config.data.max_tokens, config.sample
    rows = encode_rows(rows, tokenizer, vocab, limit, sample.stop, skip, sample.stop_strings)
    if len(rows) < 2:
        raise InputError(f"algorithm.normalise_on={path}: one row has no spread; give more")
    return replace(rows, items=rows.items[:NORMALISED])


def encode_rows(
    rows: Rows[Any],
    tokenizer: Tokenizer,
    vocab: int,
    limit: int,
    stop: Sequence[int] = (),
    skip_bad_rows: bool = False,
    strings: Sequence[str] = (),
    answer_limit: int | None = None,
) -> Rows[Encoded]:
    """The token ids of rows that were read, checked.

    Args:
      vocab: rows of the model's embedding table.
      limit: most tokens: of the prompt (data.max_prompt_tokens) for Prompt rows, of prompt and
        answer together (data.max_tokens) for the others.
      stop, strings: ids that end a response besides the tokenizer's end-of-sequence, and texts.
      skip_bad_rows: leave out rows that are too long or do not tokenise, and say so in
        ``Rows.skipped``.
      answer_limit: most tokens of an answer that stands where one is sampled
        (sample.max_new_tokens); ``limit`` is then the prompt's.

    Raises:
      InputError: such a row, with ``path:line``, length and limit, or the word that has no token;
        or an id outside ``vocab``, which no choice of rows can mend.
    """
    options = {"limit": limit, "stop": tuple(stop), "strings": tuple(strings)}
    encode = partial(_encode_row, tokenizer=tokenizer, answer_limit=answer_limit, **options)
    encoded = transform(rows, encode, skip_bad_rows)
    # After the rows that are skipped: a tokenizer of another model is not to be skipped over.
    for row in encoded.items:
        for ids in (row.prompt, *row.answers):
            check_ids(ids, vocab, row.source.where)
    return encoded


def _encode_row(
    row: Source,
    tokenizer: Tokenizer,
    limit: int,
    stop: tuple[int, ...],
    strings: tuple[str, ...],
    answer_limit: int | None,
) -> Encoded:
    where, ended = row.where, (True,)
    match row:
        case Prompt():
            texts = ended = ()
        case Completion():
            texts, ended = (row.completion,), (_ended(row, "ended"),)
        case Pair():
            texts, ended = (row.chosen, row.rejected), tuple(_ended(row, name) for name in ENDS)
        case Ranked():
            texts, ended = row.responses, row.ended
        case Stepwise():
            texts = (row.answer,)
    text = row.text if isinstance(row, Prompt) else row.prompt
    prompt = encode_prompt(tokenizer, text, where, row.chat)
    spans, ends = None, ()
    if isinstance(row, Completion) and row.pieces:
        whole = _ended(row, "ended")
        ids, spans = encode_turns(tokenizer, row.pieces, where, stop, whole, text, strings)
        answers: tuple[Ids, ...] = (ids,)
    else:
        answers = tuple(
            encode_answer(tokenizer, answer, where, stop, whole, text, strings)
            for answer, whole in zip(texts, ended, strict=True)
        )
    most = max(map(len, answers), default=0)
    if answer_limit is not None:
        check_length(most, answer_limit, "sample.max_new_tokens", where)
        most = 0
    alone = isinstance(row, Prompt) or answer_limit is not None
    field = "data.max_prompt_tokens" if alone else "data.max_tokens"
    check_length(len(prompt) + most, limit, field, where)
    # Answers that differ as text may be the same to a model, whose vocabulary is coarser.
    if len(set(map(tuple, answers))) < len(answers):
        what = "chosen and rejected" if isinstance(row, Pair) else "two of the responses"
        remedy = "the row" if isinstance(row, Pair) else "one"
        raise InputError(f"{where}: {what} have the same tokens; drop {remedy}")
    if isinstance(row, Stepwise):
        ends = tuple(step_ends(answers[0], tokenizer, row.separator))
        if len(ends) != len(row.labels):
            raise InputError(
                f"{where}: {len(row.labels)} labels, and in its tokens the separator "
                f"{row.separator!r} ends {len(ends)} steps; choose an algorithm.separator that the "
                "tokenizer keeps"
            )
    return Encoded(prompt, answers, row, ends, spans)


def _ended(row: Completion | Pair, name: str) -> bool:
    value = row.columns.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{row.where}: {name}={shown(value)}: true, false, or leave it out")
    return value is not False


def encode_prompt(tokenizer: Tokenizer, text: str, where: str, chat: bool = False) -> Ids:
    """Ids of a rendered prompt.

    Plain text starts with the beginning-of-sequence token, once, if the tokenizer is one that adds
    it. A chat has what its template writes. Either has it where the text has no token of its own.

    Raises:
      InputError: no token, and no beginning-of-sequence token to stand in.
    """
    ids = _ids(tokenizer, text, where)
    bos: Any = tokenizer.bos_token_id
    # That the tokenizer adds one shows on "".
    adds = not chat and tokenizer.encode("")[:1] == [bos]
    if bos is not None and ids[:1] != [bos] and (adds or not ids):
        ids = [bos, *ids]
    _check_some(ids, "prompt", text, where)
    return ids


def encode_answer(
    tokenizer: Tokenizer,
    text: str,
    where: str,
    stop: Sequence[int] = (),
    ended: bool = True,
    after: str = "",
    strings: Sequence[str] = (),
) -> Ids:
    """Ids of a rendered answer, with the stop token that a finished response carries.

    Args:
      stop: ids that end a response besides the tokenizer's end-of-sequence. The latter closes an
        answer that nothing else closes; the first of ``stop``, if the tokenizer has none.
      ended: False for a response that was cut off, which carries none: stop tokens at its end,
        which a chat template writes after any answer, are cut, and what follows them.
      after: the text that it follows, the prompt.
      strings: texts that end a response: after one of them nothing is added.

    Raises:
      InputError: the text has no token.
    """
    return encode_turns(tokenizer, (text,), where, stop, ended, after, strings)[0]


def encode_turns(
    tokenizer: Tokenizer,
    pieces: Sequence[str],
    where: str,
    stop: Sequence[int] = (),
    ended: bool = True,
    after: str = "",
    strings: Sequence[str] = (),
) -> tuple[Ids, tuple[Span, ...]]:
    """Ids of an answer of several turns, and the span of each turn of the assistant's in them.

    A turn's span ends with its stop token; what the template writes after it belongs to others.

    Args:
      pieces: by turns the assistant's and others' (``Completion.pieces``).
      stop, ended, after, strings: of the last turn, as for ``encode_answer``.

    Raises:
      InputError: a turn of the assistant's has no token.
    """
    eos: Any = tokenizer.eos_token_id
    stops = tuple(dict.fromkeys(token for token in (eos, *stop) if token is not None))
    turns = _continued(tokenizer, after, pieces, where)
    ids: Ids = []
    spans: list[Span] = []
    for index, (text, turn) in enumerate(zip(pieces, turns, strict=True)):
        end = _end_of_turn(tokenizer, turn, stops)
        # Only the last turn ends the row, or was cut off.
        if index == len(pieces) - 1:
            if end:
                turn = turn[: end if ended else end - 1]
            _check_some(turn, "answer", text, where)
            if ended and not end and not text.endswith(tuple(strings)):
                turn = [*turn, *stops[:1]]
            end = len(turn)
        if index % 2 == 0:
            _check_some(turn, "turn", text, where)
            spans.append((len(ids), len(ids) + (end or len(turn))))
        ids += turn
    return ids, tuple(spans)


def _continued(tokenizer: Tokenizer, before: str, pieces: Sequence[str], where: str) -> list[Ids]:
    """The ids of texts that follow ``before`` one after the other, as tokens of the whole.

    Tokenised alone, a piece may begin with other ids than where it stands: SentencePiece puts a
    space before every text. The ids of ``before`` itself are those it has alone, since that is what
    a sampler is given. Where a token of the whole would lie across the border of two pieces, each
    side is tokenised in its place.
    """
    text = before + "".join(pieces)
    cuts = list(accumulate((len(before), *map(len, pieces))))
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # Whole words that run into one another are in no vocabulary without unknown words.
    except Exception:  # the Rust tokenizer raises bare Exception
        return [_ids(tokenizer, piece, where) for piece in pieces]
    parts: list[Ids] = [[] for _ in cuts]
    index = int(not before)
    for ids, start, end in units(text, found["input_ids"], found["offset_mapping"]):
        while index < len(pieces) and end > cuts[index] <= start:
            index += 1
        across = index < len(pieces) and end > cuts[index]
        # A token of the template that takes in the white space around it is not to be cut.
        taken = len(ids) == 1 and added_tokens(tokenizer).get(ids[0])
        if across and taken == text[start:end].strip():
            index += text[start : cuts[index]].isspace()
            parts[index] += ids
            continue
        while index < len(pieces) and end > cuts[index]:
            parts[index] += _inside(tokenizer, text, start, cuts[index], where)
            start, index = cuts[index], index + 1
        parts[index] += _inside(tokenizer, text, start, end, where) if across else ids
    return parts[1:]


def _inside(tokenizer: Tokenizer, text: str, start: int, end: int, where: str) -> Ids:
    """The ids of text[start:end], as of text that has something before it."""
    part = text[start:end]
    # A text before it that keeps its own ids shows what the part adds to it.
    for before in (text[max(start - 1, 0) : start], "\n", ".", "a"):
        try:
            alone, both = (
                tokenizer.encode(x, add_special_tokens=False) for x in (before, before + part)
            )
        except Exception:  # no word of the vocabulary
            continue
        if before and both[: len(alone)] == alone:
            return both[len(alone) :]
    return _ids(tokenizer, part, where)


@lru_cache(maxsize=4)
def added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens that are sought in a text before it is split, special ones among them, by their ids"""
    return {token: str(known) for token, known in tokenizer.added_tokens_decoder.items()}


def _ids(tokenizer: Tokenizer, text: str, where: str) -> Ids:
    """The ids of ``text``, or an InputError that names the first word that has none."""
    try:
        with refused(f"{where}: the tokenizer fails", "give another text"):
            return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the Rust tokenizer raises bare Exception
        split = tokenizer.backend_tokenizer.pre_tokenizer
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)] if split else [text]
        known = tokenizer.get_vocab()
        word = next((piece for piece in pieces if piece not in known), None)
        if word is None:
            raise InputError(f"{where}: {shown(text)} cannot be tokenised: {error}") from None
        raise InputError(
            f"{where}: {shown(word)} is not in the tokenizer's vocabulary, which has no token for "
            "unknown words: add it to model.tokenizer, or drop the row"
        ) from None


def _check_some(ids: Ids, what: str, text: str, where: str) -> None:
    if not ids:
        raise InputError(f"{where}: {what} {shown(text)} has no token; fill it or drop the row")


def _end_of_turn(tokenizer: Tokenizer, ids: Ids, stops: Sequence[int]) -> int:
    """Where the first of the stop tokens that end a turn has passed; 0 if none ends it.

    Nothing follows it but stop tokens and white space: the sampler would have stopped there.
    """
    end = 0
    for at in range(len(ids) - 1, -1, -1):
        if ids[at] in stops:
            end = at + 1
        # One with text after it stands inside the turn: the answer's own.
        elif str(tokenizer.decode(ids[at : at + 1])).strip():
            break
    return end


def check_ids(ids: Sequence[int], vocab: int, where: str) -> None:
    """Raise InputError unless 0 ≤ id < ``vocab`` for every id.

    On the host, because a device would not complain: an index past the end reads NaN or another
    row, −1 the last row.
    """
    for at, token in enumerate(ids):
        if not 0 <= token < vocab:
            raise InputError(
                f"{where}: token {at} has id {token}, outside the model's vocabulary of {vocab}; "
                "use the tokenizer that belongs to the model"
            )


def check_length(length: int, limit: int, field: str, where: str) -> None:
    """Raise InputError if a row of ``length`` tokens exceeds the field that limits it."""
    if length > limit:
        raise InputError(
            f"{where}: {length} tokens, and {field} is {limit}; "
            "raise it, shorten the row, or set data.skip_bad_rows"
        )


def imitated(row: Encoded) -> np.ndarray:
    """True on the tokens of prompt and completion that are to be imitated; bool [n]."""
    start = len(row.prompt)
    learn = np.zeros(start + len(row.answers[0]), bool)
    for begin, end in row.spans or ((0, len(row.answers[0])),):
        learn[start + begin : start + end] = True
    return learn


def longest(rows: Sequence[Encoded], multiple: int = 1) -> int:
    """Tokens of the longest row, prompt and answer, rounded up to a multiple."""
    tokens = max(len(row.prompt) + max(map(len, row.answers), default=0) for row in rows)
    return -(-tokens // multiple) * multiple


def prompt_arrays(rows: Sequence[Encoded], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """token_QP and mask_QP of Prompt rows, left-padded to P = ``width``; int32."""
    where = [row.source.where for row in rows]
    return pad_rows([row.prompt for row in rows], width, pad, where, left=True)


def pad_rows(
    rows: Sequence[Ids], width: int, pad: int, where: Sequence[str], left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one array, padded on the right or on the left.

    Args:
      rows: B whole rows; prompts for ``left``, so that what is sampled follows without a gap.
      width: T, data.max_tokens; of prompts data.max_prompt_tokens.
      pad: id to fill with.
      where: the place of each row.

    Returns:
      token_BT int32 and mask_BT int32, 1 on real tokens.

    Raises:
      InputError: a row longer than ``width``.
    """
    field = "data.max_prompt_tokens" if left else "data.max_tokens"
    token_BT = np.full((len(rows), width), pad, np.int32)
    mask_BT = np.zeros((len(rows), width), np.int32)
    for index, (ids, place) in enumerate(zip(rows, where, strict=True)):
        check_length(len(ids), width, field, place)
        real = slice(width - len(ids), width) if left else slice(len(ids))
        token_BT[index, real] = ids
        mask_BT[index, real] = 1
    return token_BT, mask_BT
