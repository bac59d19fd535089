"""What the columns of a row mean, by what an algorithm learns from.

The column names are TRL's. A value is plain text, or a chat: a list of ``{role, content}``.

    prompts       prompt
    completions   prompt, completion        or messages (its last turn is the completion), or text
                  (all of it but its first token is learnt, which has nothing before it)
    labelled      prompt, completion, label: true or false; or both answers of a pair
    pairs         prompt, chosen, rejected  or chosen, rejected (which start with the prompt, as
                  messages or as words), and margin, a number, if wanted
    ranked        prompt, responses, ranks: lists of equal length; rank 1 is best, equal ranks are a
                  tie (or chosen and rejected: a ranking of two)
    scored        prompt, completion, score: a number (or label: true or false)
    steps         prompt, steps, labels: for each step true, false or a probability (TRL calls the
                  steps completions)

Answers that are compared or labelled are one turn of the assistant's each. All other columns are
kept with the row, and reach the reward functions under their names. A null in a column that may be
left out stands for nothing there: Parquet has a cell in every row.

Plain text is used as it stands: prompt and answer are simply joined, so an answer brings its own
leading space. A chat goes through the tokenizer's chat template (chat.py, turns.py), with the row's
``tools`` and ``chat_template_kwargs`` where it has such columns, in training as in scoring, so a
model is scored on what it was trained on.

Every reader raises InputError on the first bad row, or leaves it out under ``skip_bad_rows`` and
says so in ``Rows.skipped``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast as Tokenizer

from jaxrlhf.core.errors import InputError, refused
from jaxrlhf.core.shown import shown
from jaxrlhf.data.chat import PLAIN, ChatSettings, Writer, writer_of
from jaxrlhf.data.rows import (
    Message,
    Row,
    Rows,
    Text,
    as_number,
    as_string,
    as_text,
    columns_of,
    content_text,
    list_of,
    text_of,
    transform,
)
from jaxrlhf.data.turns import cut_turns, render

T = TypeVar("T")
ENDS = ("chosen_ended", "rejected_ended")
"""Columns that say whether the answers of a pair were finished, and not cut off."""


@dataclass(frozen=True)
class Prompt:
    """What the policy is to answer."""

    text: str
    columns: Mapping[str, Any]
    """The row's other columns."""
    where: str
    """``path:line``."""
    chat: bool = False
    """Whether a chat template wrote the text; a beginning-of-sequence token is then its affair."""
    messages: list[Message] | None = None
    """The chat, for reward functions; None where it is plain text."""


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
    chat: bool = False
    """Whether a chat template wrote the text; a beginning-of-sequence token is then its affair."""


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
    chat: bool = False
    """Whether a chat template wrote the text; a beginning-of-sequence token is then its affair."""


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
    chat: bool = False
    """Whether a chat template wrote the text; a beginning-of-sequence token is then its affair."""


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
    chat: bool = False
    """Whether a chat template wrote the text; a beginning-of-sequence token is then its affair."""


def stack_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The extra columns of a batch, one list a column; None where a row lacks it."""
    return {
        name: [prompt.columns.get(name) for prompt in prompts] for name in column_names(prompts)
    }


def prompt_of(source: Any) -> dict[str, str]:
    """What samples.jsonl has of a Prompt: its text as ``prompt``, and what the user said last as
    ``user``, where it is a chat."""
    said = [x for x in source.messages or () if x["role"] == "user"]
    return {"prompt": source.text} | ({"user": content_text(said[-1])} if said else {})


def column_names(rows: Sequence[Any]) -> list[str]:
    """The extra columns that any of these rows has, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row.columns))


def _prompt(row: Row, writer: Writer) -> Prompt:
    prompt = text_of(row, "prompt")
    text, _ = render(writer, prompt, ())
    messages = None if isinstance(prompt, str) else prompt
    return Prompt(text, columns_of(row, "prompt"), row.where, messages is not None, messages)


def _completion(row: Row, writer: Writer, train_on: str = "completion") -> Completion:
    """A prompt with an answer, or with several turns of the assistant's if it is a chat.

    Args:
      train_on: "completion": imitate those of the completion (of ``messages``: the last turn).
        "assistant": those of the prompt too. "one turn": of an answer that is compared or labelled.
    """
    if row.has("text") and not (row.has("prompt") or row.has("messages")):
        return _text(row, writer)
    if row.has("messages") and not row.has("prompt"):
        chat = text_of(row, "messages")
        if isinstance(chat, str) or len(chat) < 2:
            raise InputError(f"{row.where}: messages={shown(chat)}: give a question and an answer")
        prompt, answer, columns = chat[:-1], chat[-1:], columns_of(row, "messages")
    else:
        columns = columns_of(row, "prompt", "completion")
        prompt, answer = text_of(row, "prompt"), text_of(row, "completion")
    whole = train_on == "assistant"
    several = whole or (train_on == "completion" and len(answer) > 1)
    if isinstance(prompt, str) or isinstance(answer, str) or not several:
        text, (completion,) = render(writer, prompt, (answer,))
        chat = not isinstance(prompt, str)
        return Completion(text, completion, columns, row.where, chat=chat)
    first = 0 if whole else len(prompt)
    text, pieces = cut_turns(writer, prompt + answer, first)
    kept = pieces if len(pieces) > 1 else ()
    return Completion(text, "".join(pieces), columns, row.where, kept, chat=True)


def _text(row: Row, writer: Writer) -> Completion:
    """A text that is all to be learnt, but for a first token that has nothing before it."""
    text, tokenizer = as_string(row.values["text"], "text", row.where), writer.tokenizer
    cut = 0
    # A tokenizer that adds a beginning-of-sequence token puts that before the first.
    if tokenizer.bos_token_id is None or tokenizer.encode("")[:1] != [tokenizer.bos_token_id]:
        with refused(f"{row.where}: text={shown(text)}: is not in the tokenizer", "drop the row"):
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        cut = next((end for _, end in found["offset_mapping"] if end), 0)
    if not text[cut:].strip():
        raise InputError(f"{row.where}: text={shown(text)}: one token, which follows none; drop it")
    return Completion(text[:cut], text[cut:], columns_of(row, "text"), row.where)


def _pair(row: Row, writer: Writer) -> Pair:
    """Two answers that differ, in the row and as the template writes them."""
    where = row.where
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if chosen == rejected:
        raise InputError(f"{where}: chosen == rejected, {shown(chosen)}; drop the row")
    if row.has("prompt") or isinstance(chosen, str) != isinstance(rejected, str):
        prompt = text_of(row, "prompt")
    else:
        both = isinstance(chosen, str)
        shared = (_shared_words if both else _shared)(chosen, rejected, where)  # type: ignore[arg-type]
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    text, (good, bad) = render(writer, prompt, (chosen, rejected))
    # A template may leave out just what differs, such as a name or a thought.
    if good == bad:
        raise InputError(f"{where}: chosen and rejected render to one text, {shown(good)}")
    columns = columns_of(row, "prompt", "chosen", "rejected", "margin")
    margin = row.values.get("margin")
    margin = 0.0 if margin is None else as_number(margin, "margin", where, " or no margin")
    return Pair(text, good, bad, margin, columns, where, not isinstance(prompt, str))


def _shared(chosen: list[Message], rejected: list[Message], where: str) -> int:
    """How many messages two chats have in common at their start: the prompt of both."""
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1] != []:
        shared += 1
    if shared == 0:
        raise InputError(f"{where}: chosen and rejected share no first message; add a prompt")
    if shared in (len(chosen), len(rejected)):
        raise InputError(f"{where}: one of chosen and rejected is the start of the other; drop it")
    return shared


def _shared_words(chosen: str, rejected: str, where: str) -> int:
    """How many characters two texts have in common at their start, in whole words: the prompt of
    both. An answer has the space before its first word."""
    both = zip(chosen, rejected, strict=False)
    most = min(len(chosen), len(rejected))
    prefix = chosen[: next((i for i, (a, b) in enumerate(both) if a != b), most)]
    word = "" if not prefix or prefix[-1].isspace() else prefix.split()[-1]
    shared = len(prefix[: len(prefix) - len(word)].rstrip())
    if shared == 0:
        raise InputError(f"{where}: chosen and rejected share no first word; add a prompt")
    return shared


def _labelled(row: Row, writer: Writer) -> tuple[Completion, ...]:
    """A labelled answer, or both answers of a pair."""
    if row.has("chosen", "rejected"):
        pair = _pair(row, writer)
        rest = {key: x for key, x in pair.columns.items() if key not in ENDS}
        answers = zip((pair.chosen, pair.rejected), (True, False), ENDS, strict=True)
        return tuple(
            Completion(
                pair.prompt,
                text,
                {**rest, "label": label, "ended": pair.columns.get(end, True)},
                row.where,
                chat=pair.chat,
            )
            for text, label, end in answers
        )
    label = row.values.get("label")
    if not isinstance(label, bool):
        raise InputError(f"{row.where}: label={shown(label)}: give true or false")
    return (_completion(row, writer, "one turn"),)


def _flags(given: Any, count: int, where: str) -> tuple[bool, ...]:
    """``count`` times true or false."""
    good = isinstance(given, list) and all(isinstance(flag, bool) for flag in given)
    if not good or len(given) != count:
        raise InputError(f"{where}: ended={shown(given)}: true or false for each response")
    return tuple(given)


def _numbers(row: Row, key: str, count: int, of: str, bools: bool = False) -> tuple[float, ...]:
    """``count`` finite numbers in a column; true and false as 1 and 0 if ``bools``."""
    given = list_of(row, key)
    if len(given) != count:
        raise InputError(f"{row.where}: {len(given)} {key} for {count} {of}; give one for each")
    return tuple(
        float(x) if bools and isinstance(x, bool) else as_number(x, f"{key}[{i}]", row.where)
        for i, x in enumerate(given)
    )


def _ranked(row: Row, writer: Writer) -> Ranked:
    """Two or more responses that differ; a list ``ended`` says which were not cut off."""
    where = row.where
    if row.has("chosen") and not row.has("responses"):
        pair = _pair(row, writer)
        flags = [True if (x := pair.columns.get(name)) is None else x for name in ENDS]
        texts, ended = (pair.chosen, pair.rejected), _flags(flags, 2, where)
        return Ranked(pair.prompt, texts, (1.0, 2.0), ended, pair.columns, where, pair.chat)
    given = list_of(row, "responses")
    count = len(given)
    if count < 2:
        raise InputError(f"{where}: responses: {count} of them; a ranking has at least two")
    answers = [as_text(x, f"responses[{i}]", where) for i, x in enumerate(given)]
    _numbers(row, "ranks", count, "responses")
    # Large integers are exact only as Python has them, and a device would round them to ties. So
    # the ranks become 1, 2, 3, … in the same order.
    ranks = row.values["ranks"]
    place = {rank: float(i) for i, rank in enumerate(sorted(set(ranks)), 1)}
    given_prompt = text_of(row, "prompt")
    prompt, texts = render(writer, given_prompt, answers)
    for index, text in enumerate(texts):
        first = texts.index(text)
        if first < index:
            raise InputError(
                f"{where}: responses[{first}] == responses[{index}], {shown(text)}; drop one"
            )
    ended = _flags(row.values["ended"] if row.has("ended") else [True] * count, count, where)
    columns = columns_of(row, "prompt", "responses", "ranks", "ended")
    order = tuple(place[rank] for rank in ranks)
    return Ranked(prompt, texts, order, ended, columns, where, not isinstance(given_prompt, str))


def _scored(row: Completion, binary: bool) -> Completion:
    """A completion with a number as its ``score``, under ``binary`` a probability."""
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


def _steps(row: Row, writer: Writer, separator: str = "\n") -> Stepwise:
    """Steps, plain text joined with ``separator``, and how probably each is right."""
    where = row.where
    name = "completions" if row.has("completions") and not row.has("steps") else "steps"
    given = list_of(row, name)
    if not given:
        raise InputError(f"{where}: {name} is an empty list; give a step or drop the row")
    steps = [as_string(x, f"{name}[{i}]", where) for i, x in enumerate(given)]
    # In the answer it would end a step that has no label.
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
    chat: Text = [{"role": "assistant", "content": answer}]
    whole = answer if isinstance(prompt, str) else chat
    text, (answer,) = render(writer, prompt, (whole,))
    columns = columns_of(row, "prompt", name, "labels")
    return Stepwise(text, answer, separator, labels, columns, where, not isinstance(prompt, str))


def _reader(of_row: Callable[..., T]) -> Callable[..., Rows[T]]:
    """A reader of a file's rows, out of one of a single row: (row, writer, options) → T."""

    def read(
        rows: Rows[Any],
        tokenizer: Tokenizer,
        skip_bad_rows: bool = False,
        chat: ChatSettings = PLAIN,
        **options: Any,
    ) -> Rows[T]:
        notes: dict[str, dict[str, str]] = {}
        found = transform(
            rows,
            lambda row: of_row(row, writer_of(row, tokenizer, chat, notes), **options),
            skip_bad_rows,
        )
        said = (
            f"{rows.path}: {len(lines)} rows {kind}; first: {next(iter(lines.values()))}"
            for kind, lines in notes.items()
        )
        return replace(found, notes=(*found.notes, *said))

    return read


read_prompts = _reader(_prompt)
read_completions = _reader(_completion)
read_pairs = _reader(_pair)
read_ranked = _reader(_ranked)
read_steps = _reader(_steps)


def read_labelled(
    rows: Rows[Row],
    tokenizer: Tokenizer,
    skip_bad_rows: bool = False,
    chat: ChatSettings = PLAIN,
) -> Rows[Completion]:
    """Labelled answers; a pair becomes two rows, the first labelled true."""
    read = _reader(_labelled)(rows, tokenizer, skip_bad_rows, chat)
    items: Any = tuple(row for answers in read.items for row in answers)
    return replace(read, items=items)  # type: ignore[return-value]


def read_scored(
    rows: Rows[Row],
    tokenizer: Tokenizer,
    skip_bad_rows: bool = False,
    chat: ChatSettings = PLAIN,
    binary: bool = False,
) -> Rows[Completion]:
    """Answers with a number in the column ``score``; under ``binary`` a probability in [0, 1], for
    which a ``label``, true or false, may stand in."""
    completions = read_completions(rows, tokenizer, skip_bad_rows, chat)
    return transform(completions, partial(_scored, binary=binary), skip_bad_rows)


READERS = {
    "pairs": read_pairs,
    "completions": read_completions,
    "labelled": read_labelled,
    "judged": read_labelled,
    "ranked": read_ranked,
    "scored": read_scored,
    "steps": read_steps,
}
"""How the rows of a file are read, by what they are to hold."""
