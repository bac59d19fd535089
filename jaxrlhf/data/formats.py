"""What the columns of a row mean.

The column names are TRL's. A value is plain text, or a chat: a list of ``{role, content}``.

    prompts       prompt
    completions   prompt, completion        or messages (its last turn is the completion)
    pairs         prompt, chosen, rejected  or chosen, rejected (chats that start with the prompt),
                  and margin, a number, if wanted

Answers that are compared (pairs, labelled completions) are one turn of the assistant's each.

All other columns are kept with the row, and reach the reward functions under their names. A null in
a column that may be left out stands for nothing there: Parquet has a cell in every row.

Plain text is used as it stands: prompt and answer are simply joined, so an answer brings its own
leading space. A chat goes through the tokenizer's chat template (chat.py), in training as in
scoring, so a model is scored on what it was trained on.


Rows that say how good answers are: in an order, with a number each, step by step.

    ranked    prompt, responses, ranks: lists of equal length; rank 1 is best, equal ranks are a tie
              (or chosen and rejected: a ranking of two)
    scored    prompt, completion, score: a number (or label: true or false)
    steps     prompt, steps, labels: for each step true, false or a probability (TRL calls the
              steps completions)

Everything else is as in ``formats``.


Where the steps of an answer end, in its tokens: one rule, for training and for scoring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxrlhf.core.errors import InputError
from jaxrlhf.data.chat import cut_turns, render
from jaxrlhf.data.rows import (
    Message,
    Row,
    Rows,
    Text,
    as_number,
    as_string,
    as_text,
    columns_of,
    list_of,
    shown,
    text_of,
    transform,
)

_ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Prompt:
    """What the policy is to answer."""

    text: str
    columns: Mapping[str, Any]
    """The row's other columns."""
    where: str
    """``path:line``."""


@dataclass(frozen=True)
class Completion:
    """An answer to imitate."""

    prompt: str
    completion: str
    columns: Mapping[str, Any]
    where: str
    pieces: tuple[str, ...] = ()
    """``completion``, cut where it passes from the assistant to others and back; empty where it is
    one turn."""


@dataclass(frozen=True)
class Pair:
    """Two answers, the first preferred."""

    prompt: str
    chosen: str
    rejected: str
    margin: float
    """Wanted score difference, in reward units; 0 where the row has none. Reward models read it."""
    columns: Mapping[str, Any]
    where: str


def read_prompts(
    rows: Rows[Row], tokenizer: PreTrainedTokenizerFast, skip_bad_rows: bool = False
) -> Rows[Prompt]:
    """Prompt-only rows. Raises InputError on the first bad row, or counts it as skipped."""
    return transform(rows, partial(_prompt, tokenizer=tokenizer), skip_bad_rows)


def read_completions(
    rows: Rows[Row],
    tokenizer: PreTrainedTokenizerFast,
    skip_bad_rows: bool = False,
    train_on: Literal["completion", "assistant"] = "completion",
) -> Rows[Completion]:
    """Prompts with an answer. Raises InputError on the first bad row, or counts it as skipped.

    Args:
      train_on: of a chat, imitate the assistant's turns of the completion (of ``messages``: the
        last turn), or those of the prompt too; plain text has the completion alone.
    """
    read = partial(_imitation, tokenizer=tokenizer, train_on=train_on)
    return transform(rows, read, skip_bad_rows)


def read_labelled(
    rows: Rows[Row], tokenizer: PreTrainedTokenizerFast, skip_bad_rows: bool = False
) -> Rows[Completion]:
    """As ``read_completions``, with a column ``label``: true if the answer is as it should be.

    A row with ``chosen`` and ``rejected`` is read as two, the first labelled true.

    Raises:
      InputError: besides theirs, a label that is missing, or neither true nor false.
    """
    read = transform(rows, partial(_labelled, tokenizer=tokenizer), skip_bad_rows)
    answers = tuple(answer for row in read.items for answer in row)
    return Rows(answers, read.path, read.skipped)


def read_pairs(
    rows: Rows[Row], tokenizer: PreTrainedTokenizerFast, skip_bad_rows: bool = False
) -> Rows[Pair]:
    """Preference pairs. Raises InputError on the first bad row, or counts it as skipped."""
    return transform(rows, partial(_pair, tokenizer=tokenizer), skip_bad_rows)


def stack_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The extra columns of a batch, one list a column; None where a row lacks it."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def _prompt(row: Row, tokenizer: PreTrainedTokenizerFast) -> Prompt:
    text, _ = render(tokenizer, text_of(row, "prompt"), (), row.where)
    return Prompt(text, columns_of(row, "prompt"), row.where)


def _columns_of_completion(row: Row) -> tuple[Text, Text, dict[str, Any]]:
    """Prompt, completion and the other columns of a row, which may have both in ``messages``."""
    if row.values.get("messages") is not None and row.values.get("prompt") is None:
        chat = text_of(row, "messages")
        if isinstance(chat, str) or len(chat) < 2:
            raise InputError(f"{row.where}: messages={shown(chat)}: give a question and an answer")
        return chat[:-1], chat[-1:], columns_of(row, "messages")
    columns = columns_of(row, "prompt", "completion")
    return text_of(row, "prompt"), text_of(row, "completion"), columns


def _imitation(row: Row, tokenizer: PreTrainedTokenizerFast, train_on: str) -> Completion:
    """A completion whose chat, if it is one, may have several turns to imitate."""
    prompt, answer, columns = _columns_of_completion(row)
    whole = train_on == "assistant"
    if isinstance(prompt, str) or isinstance(answer, str) or (len(answer) == 1 and not whole):
        return _completion(row, tokenizer)
    chat, first = prompt + answer, 0 if whole else len(prompt)
    text, pieces = cut_turns(tokenizer, chat, first, row.where)
    several = pieces if len(pieces) > 1 else ()
    return Completion(text, "".join(pieces), columns, row.where, several)


def _completion(row: Row, tokenizer: PreTrainedTokenizerFast) -> Completion:
    prompt, answer, columns = _columns_of_completion(row)
    text, (completion,) = render(tokenizer, prompt, (answer,), row.where)
    return Completion(text, completion, columns, row.where)


def _labelled(row: Row, tokenizer: PreTrainedTokenizerFast) -> tuple[Completion, ...]:
    """A labelled answer, or both answers of a pair."""
    if row.values.get("chosen") is not None and row.values.get("rejected") is not None:
        pair = _pair(row, tokenizer)
        ends = {f"{key}_ended": pair.columns.get(f"{key}_ended", True) for key in _ANSWERS}
        rest = {key: x for key, x in pair.columns.items() if key not in ends}
        return tuple(
            Completion(
                pair.prompt,
                getattr(pair, key),
                {**rest, "label": key == "chosen", "ended": ends[f"{key}_ended"]},
                row.where,
            )
            for key in _ANSWERS
        )
    label = row.values.get("label")
    if not isinstance(label, bool):
        raise InputError(f"{row.where}: label={shown(label)}: give true or false")
    return (_completion(row, tokenizer),)


def _pair(row: Row, tokenizer: PreTrainedTokenizerFast) -> Pair:
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if chosen == rejected:
        raise InputError(f"{row.where}: chosen == rejected, {shown(chosen)}; drop the row")
    given = row.values.get("prompt") is not None
    if given or isinstance(chosen, str) or isinstance(rejected, str):
        prompt = text_of(row, "prompt")
    else:
        prompt, chosen, rejected = _split_common(chosen, rejected, row.where)
    text, (good, bad) = render(tokenizer, prompt, (chosen, rejected), row.where)
    if good == bad:
        raise InputError(f"{row.where}: chosen and rejected render to one text, {shown(good)}")
    columns = columns_of(row, "prompt", "chosen", "rejected", "margin")
    return Pair(text, good, bad, _margin(row), columns, row.where)


def _split_common(
    chosen: list[Message], rejected: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two chats as their common start and the rest of each."""
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1] != []:
        shared += 1
    if shared == 0:
        raise InputError(f"{where}: chosen and rejected share no first message; add a prompt")
    if shared in (len(chosen), len(rejected)):
        raise InputError(f"{where}: one of chosen and rejected is the start of the other; drop it")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _margin(row: Row) -> float:
    value = row.values.get("margin")
    if value is None:
        return 0.0
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < 1e38:  # the comparison is False for NaN too
        raise InputError(f"{row.where}: margin={shown(value)}: give a finite number or no margin")
    return float(value)


@dataclass(frozen=True)
class Ranked:
    """Several answers to a prompt, and their order."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    """1 is best, then 2, 3, … whatever numbers the row has; equal ones tie."""
    ended: tuple[bool, ...]
    """False for a response that was cut off."""
    columns: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Stepwise:
    """An answer in steps, and how right each of them is."""

    prompt: str
    answer: str
    """The steps, joined by ``separator``."""
    separator: str
    labels: tuple[float, ...]
    """Probability that the step is right, 0 or 1 as a rule."""
    columns: Mapping[str, Any]
    where: str


def read_ranked(
    rows: Rows[Row], tokenizer: PreTrainedTokenizerFast, skip_bad_rows: bool = False
) -> Rows[Ranked]:
    """Rankings of two or more responses, plain text or chats.

    A column ``ended``, a list of true and false, says which responses were not cut off. A row with
    ``chosen`` and ``rejected`` is read as a ranking of two.

    Raises:
      InputError: the first bad row, unless it is to be skipped: fewer than two responses, two equal
        ones, ranks of another number or that are no finite numbers.
    """
    return transform(rows, partial(_ranked, tokenizer=tokenizer), skip_bad_rows)


def read_scored(
    rows: Rows[Row],
    tokenizer: PreTrainedTokenizerFast,
    skip_bad_rows: bool = False,
    binary: bool = False,
) -> Rows[Completion]:
    """Prompts with an answer and its score, a float in the column ``score``.

    Args:
      binary: scores are probabilities in [0, 1]; a ``label``, true or false, may stand in for one.

    Raises:
      InputError: a score that is missing, no finite number, or outside of [0, 1] with ``binary``.
    """
    completions = read_completions(rows, tokenizer, skip_bad_rows)
    return transform(completions, partial(_scored, binary=binary), skip_bad_rows)


def read_steps(
    rows: Rows[Row],
    tokenizer: PreTrainedTokenizerFast,
    skip_bad_rows: bool = False,
    separator: str = "\n",
) -> Rows[Stepwise]:
    """Answers in steps, each with a label: true, false, or a probability that it is right.

    Args:
      separator: what the steps, which are plain text, are joined with.

    Raises:
      InputError: no step, a step that is no text or holds the separator, labels of another number
        or outside of [0, 1].
    """
    read = partial(_steps, tokenizer=tokenizer, separator=separator)
    return transform(rows, read, skip_bad_rows)


def _ranked(row: Row, tokenizer: PreTrainedTokenizerFast) -> Ranked:
    if row.values.get("responses") is None and row.values.get("chosen") is not None:
        (pair,) = read_pairs(Rows((row,), row.where), tokenizer).items
        flags = [pair.columns.get(f"{name}_ended") for name in ("chosen", "rejected")]
        flags = [True if flag is None else flag for flag in flags]
        texts, ended = (pair.chosen, pair.rejected), _flags(row, flags, 2)
        return Ranked(pair.prompt, texts, (1.0, 2.0), ended, pair.columns, row.where)
    where, given = row.where, list_of(row, "responses")
    if len(given) < 2:
        raise InputError(f"{where}: responses: {len(given)} of them; a ranking has at least two")
    answers = [as_text(x, f"responses[{i}]", where) for i, x in enumerate(given)]
    ranks = _dense(row, len(given))
    prompt, texts = render(tokenizer, text_of(row, "prompt"), answers, where)
    for index, text in enumerate(texts):
        if text in texts[:index]:
            first = texts.index(text)
            raise InputError(
                f"{where}: responses[{first}] == responses[{index}], {shown(text)}; drop one"
            )
    given = row.values.get("ended")
    ended = _flags(row, [True] * len(ranks) if given is None else given, len(ranks))
    columns = columns_of(row, "prompt", "responses", "ranks", "ended")
    return Ranked(prompt, texts, ranks, ended, columns, where)


def _dense(row: Row, count: int) -> tuple[float, ...]:
    """The ranks as 1, 2, 3, … in the same order: large integers are exact only as Python has them,
    and a device would round them to ties."""
    _numbers(row, "ranks", count, "responses")
    given = row.values["ranks"]
    place = {rank: float(i) for i, rank in enumerate(sorted(set(given)), 1)}
    return tuple(place[rank] for rank in given)


def _flags(row: Row, given: Any, count: int) -> tuple[bool, ...]:
    """``count`` times true or false."""
    good = isinstance(given, list) and all(isinstance(flag, bool) for flag in given)
    if not good or len(given) != count:
        raise InputError(f"{row.where}: ended={shown(given)}: true or false for each response")
    return tuple(given)


def _scored(row: Completion, binary: bool) -> Completion:
    score, label = row.columns.get("score"), row.columns.get("label")
    if binary and score is None and isinstance(label, bool):
        score = float(label)
    if score is None:
        wanted = "a score in [0, 1], or a label, true or false" if binary else "a score, a number"
        raise InputError(f"{row.where}: score is null or missing; give {wanted}")
    number = as_number(score, "score", row.where)
    if binary and not 0 <= number <= 1:
        raise InputError(f"{row.where}: score={number:g}: a probability is in [0, 1]; rescale it")
    return replace(row, columns={**row.columns, "score": number})


def _steps(row: Row, tokenizer: PreTrainedTokenizerFast, separator: str) -> Stepwise:
    where = row.where
    trl = row.values.get("steps") is None and row.values.get("completions") is not None
    name = "completions" if trl else "steps"
    given = list_of(row, name)
    if not given:
        raise InputError(f"{where}: {name} is an empty list; give a step or drop the row")
    steps = [as_string(x, f"{name}[{i}]", where) for i, x in enumerate(given)]
    for index, step in enumerate(steps):
        if separator in step:
            raise InputError(
                f"{where}: {name}[{index}] holds the separator {separator!r}; make it two steps, "
                "or choose another algorithm.separator"
            )
    labels = _numbers(row, "labels", len(steps), name, bools=True)
    if not all(0 <= label <= 1 for label in labels):
        raise InputError(f"{where}: labels={shown(list(labels))}: true, false or in [0, 1]")
    prompt, answer = text_of(row, "prompt"), separator.join(steps)
    chat = [{"role": "assistant", "content": answer}]
    text, (whole,) = render(
        tokenizer, prompt, (answer if isinstance(prompt, str) else chat,), where
    )
    columns = columns_of(row, "prompt", name, "labels")
    return Stepwise(text, whole, separator, labels, columns, where)


def _numbers(row: Row, key: str, count: int, of: str, bools: bool = False) -> tuple[float, ...]:
    """``count`` finite numbers in a column; true and false as 1 and 0 if ``bools``."""
    given = list_of(row, key)
    if len(given) != count:
        raise InputError(f"{row.where}: {len(given)} {key} for {count} {of}; give one for each")
    return tuple(
        float(x) if bools and isinstance(x, bool) else as_number(x, f"{key}[{i}]", row.where)
        for i, x in enumerate(given)
    )


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
