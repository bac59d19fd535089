"""What the columns of a row mean, and the one place where chats become text.

The column names are TRL's. A value is plain text, or a chat: a list of ``{role, content}``.

    prompts       prompt
    completions   prompt, completion        or messages (its last turn is the completion)
    pairs         prompt, chosen, rejected  or chosen, rejected (chats that start with the prompt),
                  and margin, a number, if wanted

All other columns are kept with the row, and reach the reward functions under their names.

Plain text is used as it stands: prompt and answer are simply joined, so an answer brings its own
leading space. A chat goes through the tokenizer's chat template; the answer's text is what the
template writes after the prompt and the header of the assistant's turn. Training and scoring both
take their text from ``render``, so a model is scored on what it was trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from jaxrlhf.data.fields import Message, Text
from jaxrlhf.data.fields import columns_of as _columns
from jaxrlhf.data.fields import text_of as _text
from jaxrlhf.data.rows import Row, Rows, one_line, shown, transform
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
    rows: Rows[Row], tokenizer: PreTrainedTokenizerFast, skip_bad_rows: bool = False
) -> Rows[Completion]:
    """Prompts with an answer. Raises InputError on the first bad row, or counts it as skipped."""
    return transform(rows, partial(_completion, tokenizer=tokenizer), skip_bad_rows)


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


def render(
    tokenizer: PreTrainedTokenizerFast, prompt: Text, answers: Sequence[Text], where: str
) -> tuple[str, tuple[str, ...]]:
    """The text of a prompt and of each answer to it: THE rendering, for training and scoring.

    Args:
      prompt, answers: all plain text, or all chats.
      where: the row's place, for errors.

    Returns:
      The prompt's text, header of the assistant's turn included, and each answer's text:
      ``rendered(prompt + answer)`` less its prefix ``rendered(prompt)``.

    Raises:
      InputError: a chat beside plain text, a prompt that ends in an assistant's turn or an answer
        that does not begin with one, a missing or failing chat template, or one that renders the
        prompt otherwise once an answer follows.
    """
    kinds = {type(text) for text in (prompt, *answers)}
    if kinds == {str}:
        return str(prompt), tuple(str(answer) for answer in answers)
    if isinstance(prompt, str) or str in kinds:
        raise InputError(f"{where}: plain text beside a chat; make all columns one or the other")
    if prompt[-1]["role"] == "assistant":
        raise InputError(f"{where}: the prompt ends with an assistant's turn; end with a user's")
    text = _apply_template(tokenizer, prompt, where, open_turn=True)
    return text, tuple(_render_answer(tokenizer, prompt, text, answer, where) for answer in answers)


def _render_answer(
    tokenizer: PreTrainedTokenizerFast, prompt: list[Message], text: str, answer: Any, where: str
) -> str:
    if answer[0]["role"] != "assistant":
        role = shown(answer[0]["role"])
        raise InputError(f"{where}: the answer begins with role {role}; it must be 'assistant'")
    whole = _apply_template(tokenizer, prompt + answer, where, open_turn=False)
    if not whole.startswith(text):
        raise InputError(
            f"{where}: the chat template renders the prompt otherwise once an answer follows; "
            "use a template under which prompt + answer starts with the prompt"
        )
    return whole[len(text) :]


def _apply_template(
    tokenizer: PreTrainedTokenizerFast, chat: list[Message], where: str, open_turn: bool
) -> str:
    if not tokenizer.chat_template:
        raise InputError(f"{where}: a chat, and the tokenizer has no chat template; use plain text")
    try:
        return str(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=open_turn)
        )
    except (TemplateError, TypeError, ValueError) as error:
        message = f"{where}: the chat template failed ({one_line(error)}); mend the row or template"
        raise InputError(message) from error


def _prompt(row: Row, tokenizer: PreTrainedTokenizerFast) -> Prompt:
    text, _ = render(tokenizer, _text(row, "prompt"), (), row.where)
    return Prompt(text, _columns(row, "prompt"), row.where)


def _completion(row: Row, tokenizer: PreTrainedTokenizerFast) -> Completion:
    if "messages" in row.values and "prompt" not in row.values:
        chat = _text(row, "messages")
        if isinstance(chat, str) or len(chat) < 2:
            raise InputError(f"{row.where}: messages={shown(chat)}: give a question and an answer")
        prompt, answer = chat[:-1], chat[-1:]
        columns = _columns(row, "messages")
    else:
        prompt, answer = _text(row, "prompt"), _text(row, "completion")
        columns = _columns(row, "prompt", "completion")
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
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise InputError(f"{row.where}: chosen == rejected, {shown(chosen)}; drop the row")
    if "prompt" in row.values or isinstance(chosen, str) or isinstance(rejected, str):
        prompt = _text(row, "prompt")
    else:
        prompt, chosen, rejected = _split_common(chosen, rejected, row.where)
    text, (good, bad) = render(tokenizer, prompt, (chosen, rejected), row.where)
    if good == bad:
        raise InputError(f"{row.where}: chosen and rejected render to one text, {shown(good)}")
    columns = _columns(row, "prompt", "chosen", "rejected", "margin")
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
    value = row.values.get("margin", 0.0)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < 1e38:  # the comparison is False for NaN too
        raise InputError(f"{row.where}: margin={shown(value)}: give a finite number or no margin")
    return float(value)
