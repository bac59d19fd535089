"""Rows that say how good answers are: in an order, with a number each, step by step.

    ranked    prompt, responses, ranks: lists of equal length; rank 1 is best, equal ranks are a tie
              (or chosen and rejected: a ranking of two)
    scored    prompt, completion, score: a number (or label: true or false)
    steps     prompt, steps, labels: for each step true, false or a probability (TRL calls the
              steps completions)

Everything else is as in ``formats``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from jaxrlhf.data.fields import as_number, as_string, as_text, columns_of, list_of, text_of
from jaxrlhf.data.formats import Completion, read_completions, read_pairs, render
from jaxrlhf.data.rows import Row, Rows, shown, transform
from jaxrlhf.errors import InputError


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
