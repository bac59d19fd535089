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
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from jaxrlhf.data.chat import cut_turns, render
from jaxrlhf.data.fields import Message, Text, columns_of, text_of
from jaxrlhf.data.rows import Row, Rows, shown, transform
from jaxrlhf.errors import InputError

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
