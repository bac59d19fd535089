"""What a source of reward on the host is asked and answers, and reward functions, found and called.

A reward function is ``(prompts, completions, **columns) → list of floats``, one a completion; it
names what it wants of these (see ``signature``). ``prompts`` and ``completions`` are lists of text,
special tokens removed unless ``special_tokens`` is set, or of messages, for a user's function,
where the row's prompt is a chat; each further column of the data arrives as a list under its own
name. ``None`` says "does not apply to this row": the row's reward is then the sum of the other
sources. Anything else that is no finite number (a string, NaN, inf) says "failed": the row is left
out of learning. Neither is ever read as 0.

Functions may be asynchronous (``async def``); all of those run in one event loop.
"""

import asyncio
import difflib
import functools
import importlib
import inspect
import math
import numbers
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from traceback import walk_tb
from typing import Any, NamedTuple, cast

import numpy as np

from jaxrlhf.core.errors import InputError, to_install
from jaxrlhf.rewards.signature import RENAME, arguments, missing, signature_of


@dataclass(frozen=True)
class Asked:
    """B rows to be scored, as text."""

    prompts: Sequence[str]
    completions: Sequence[str]
    """Special tokens removed, unless the source's ``special_tokens`` keeps them."""
    columns: Mapping[str, Sequence[Any]]
    """The other columns of the data, by name; None where a row lacks one."""
    ended: Sequence[bool]
    """Whether a completion ended with a stop token; False where it was cut off."""
    chats: Sequence[Sequence[Mapping[str, Any]] | None] = ()
    """The messages of each prompt, None where it is plain text; empty: all are."""
    ids: Sequence[Sequence[int]] | None = None
    """The token ids of each completion, stop token included, where a source asks for them."""

    def __len__(self) -> int:
        return len(self.completions)

    def split(self, size: int) -> list["Asked"]:
        """The rows in pieces of at most ``size``, in order."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def rows(self, which: slice) -> "Asked":
        columns = {name: values[which] for name, values in self.columns.items()}
        texts = self.prompts[which], self.completions[which]
        ids = None if self.ids is None else self.ids[which]
        return Asked(*texts, columns, self.ended[which], self.chats[which], ids)

    def as_messages(self) -> tuple[list[Any], list[Any]]:
        """Prompts and completions as a user's function gets them: messages where they are a chat,
        text else. They are copies."""
        if not self.chats:
            return list(self.prompts), list(self.completions)
        rows = zip(self.chats, self.prompts, self.completions, strict=True)
        said = [
            (text, completion)
            if chat is None
            else ([dict(x) for x in chat], [{"role": "assistant", "content": completion}])
            for chat, text, completion in rows
        ]
        return [prompt for prompt, _ in said], [completion for _, completion in said]


class Scored(NamedTuple):
    """What a source says of B rows."""

    score_B: np.ndarray
    """float64, reward units; NaN where it has none, never a number in its place."""
    problem: str = ""
    """Why it failed, of the last row or request where it did; empty if all went well."""
    applies_B: np.ndarray | None = None
    """bool, False where the source does not apply: the row's reward is the sum of the others. None:
    it applies to all rows, and a NaN is a failure."""

    def applies(self) -> np.ndarray:
        """``applies_B``, written out."""
        everywhere = np.ones(len(self.score_B), bool)
        return everywhere if self.applies_B is None else np.asarray(self.applies_B, bool)

    @staticmethod
    def of(scores: Sequence[Any]) -> "Scored":
        """Checked scores, one a row: None where the source does not apply, NaN where it failed."""
        applies_B = np.array([score is not None for score in scores], bool)
        return Scored(np.array([number(score) for score in scores], np.float64), "", applies_B)

    @staticmethod
    def join(parts: Sequence["Scored"]) -> "Scored":
        """What was said of the pieces of ``Asked.split``, as one."""
        problems = [part.problem for part in parts if part.problem]
        return Scored(
            np.concatenate([part.score_B for part in parts]),
            (problems or [""])[-1],
            np.concatenate([part.applies() for part in parts]),
        )


class FunctionError(InputError):
    """A reward function that has failed as a whole.

    Attributes:
      what: it did, in one line: "raised ValueError: … at FILE:LINE".
    """

    def __init__(self, name: str, what: str, remedy: str):
        super().__init__(f"reward function {name!r} {what}; {remedy}")
        self.what = what


Source = Callable[[Asked], Scored]
RewardFunction = Callable[..., Sequence[float | None]]


def make_sentiment() -> RewardFunction:
    """A reward function: VADER's compound score of each completion.

    s/√(s² + 15) of the summed valences s, in [−1, 1]: −1 most negative, 0 neutral or empty
    (Hutto & Gilbert, ICWSM 2014). The prompt is not scored: the policy did not write it.

    Raises:
      InputError: the package is not installed.
    """
    try:
        from vader import SentimentIntensityAnalyzer  # noqa: PLC0415 (optional extra)
    except ImportError as error:
        raise InputError(
            f"reward function 'sentiment' needs nltk-vader-sentiment: {to_install('demo')}"
        ) from error
    # Made once: it reads its lexicon from a file.
    analyzer = SentimentIntensityAnalyzer()

    def sentiment(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [analyzer.polarity_scores(text)["compound"] for text in completions]

    return sentiment


MEND = "mend it, or, in a run, set isolate, which leaves out the rows concerned"
RETURN = "return a list with one number for each, or None where it does not apply"
"""What to do about a function that fails."""

BUILTIN: dict[str, Callable[[], RewardFunction]] = {"sentiment": make_sentiment}
"""Name → maker of the function."""

MOVED = {"jaxrlhf.demo.words": "jaxrlhf.data.words", "jaxrlhf.demo.sums": "jaxrlhf.data.tasks"}
"""Modules that the configs of older runs name, and where their functions are now."""


def resolve(dotted: str) -> RewardFunction:
    """The reward function of a built-in name or of ``package.module:function``.

    Raises:
      InputError: there is none; the message names close ones.
    """
    if dotted in BUILTIN:
        return BUILTIN[dotted]()
    module_name, colon, name = dotted.partition(":")
    if not colon:
        raise InputError(
            f"reward function {dotted!r} is unknown{_suggest(dotted, BUILTIN)}; "
            f"choose {', '.join(BUILTIN)} or give package.module:function"
        )
    # A module of the user's may raise anything while it is imported.
    try:
        module = importlib.import_module(MOVED.get(module_name, module_name))
    except Exception as error:
        raise InputError(
            f"reward function {dotted!r}: importing {module_name!r} raised {describe(error)}; "
            "mend it, install it, put it beside the config or into the working directory, or put "
            "its folder on PYTHONPATH"
        ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise InputError(
            f"reward function {dotted!r}: {module_name} has no function {name!r}"
            f"{_suggest(name, known)}; mend the name, or see whether another module is meant than "
            f"{getattr(module, '__file__', 'a built-in one')}"
        )
    return cast(RewardFunction, function)


def callable_of(dotted: str) -> RewardFunction:
    """``resolve``, and of a class with ``__call__`` an object of it, made without arguments.

    Raises:
      InputError: as ``resolve``; the object cannot be made.
    """
    function: Any = resolve(dotted)
    if not isinstance(function, type) or not any("__call__" in vars(x) for x in function.__mro__):
        return function
    try:
        return function()
    except Exception as error:
        raise InputError(
            f"reward function {dotted!r}: making one raised {describe(error)}{_place(error)}; give "
            "its arguments defaults, or name an object of it"
        ) from error


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known))
    return f": did you mean {' or '.join(close)}?" if close else ""


def call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    ids: Sequence[Sequence[int]] | None = None,
) -> Scored:
    """The checked scores of B rows: NaN where one is no finite number, and does not apply where it
    is None. A column of them, [B, 1], is taken as [B].

    Raises:
      FunctionError: the function asks for a column that is not there; the result is not a list of B
        scores; or the function raised, and its error is then the cause.
    """
    how = signature_of(function)
    if lacking := missing(how, list(columns), ids is not None):
        raise FunctionError(name, lacking, RENAME)
    try:
        # Copies: what one function does to its arguments does not reach the next.
        by_position, by_name = arguments(how, prompts, completions, columns, ids)
        result: Any = function(*by_position, **by_name)
        if inspect.isawaitable(result):
            result = finish(result)
    except (Exception, SystemExit) as error:
        raise FunctionError(name, f"raised {describe(error)}{_place(error)}", MEND) from error
    scores, got = _scores_in(result, len(completions))
    if got:
        raise FunctionError(name, f"returned {got} for {len(completions)} completions", RETURN)
    return Scored.of(scores)


def _scores_in(result: Any, count: int) -> tuple[list[Any], str]:
    """``count`` scores out of a list or array [count] or [count, 1]; what it is, where it is none
    of these."""
    # A text or a dict of the right length would pass for a list of scores.
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__"):
        return [], type(result).__name__
    if hasattr(result, "shape"):
        shape = _shape(result)
        if len(shape) != 1 and shape != (count, 1):
            return [], f"an array of shape {list(shape)}"
        result = result.tolist() if hasattr(result, "tolist") else np.asarray(result).tolist()
    scores = list(result)
    if len(scores) != count:
        return [], f"{len(scores)} scores"
    for row, score in enumerate(scores):
        shape = _shape(score)
        if shape not in ((), (1,)):
            return [], f"a score of shape {list(shape)} for row {row}"
        scores[row] = score[0] if shape else score
    return scores, ""


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an array of whichever library, or of nested lists; () of all else."""
    if isinstance(value, list | tuple):
        return (len(value), *(_shape(value[0]) if value else ()))
    return tuple(getattr(value, "shape", ()))


def number(score: Any) -> float:
    """``score`` if it is a finite number (a Decimal or a 0-d array will do), else NaN."""
    if getattr(score, "shape", None) == () and hasattr(score, "item"):
        score = score.item()
    if not isinstance(score, numbers.Real | Decimal):
        return math.nan
    try:
        value = float(score)
    except (OverflowError, ValueError):  # an int beyond float64, a signalling NaN
        return math.nan
    return value if math.isfinite(value) else math.nan


def _place(error: BaseException) -> str:
    """Where in its own file the function that ``call`` called was; empty if it was not entered."""
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    # Frames of this file come first, those of the event loop between them.
    while any(file == __file__ for file, _ in frames):
        frames = frames[1:]
    # The innermost of the function's own file: a library that it calls says nothing to its author.
    inside = [line for file, line in frames if file == frames[0][0]]
    return f" at {frames[0][0]}:{inside[-1]}" if inside else ""


def describe(error: BaseException) -> str:
    """An error's type and message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def finish(awaitable: Awaitable[Any]) -> Any:
    """The result of an awaitable, waited for; also where the caller is in an event loop itself.

    All of them run in one loop, which lives as long as the process: what an async function keeps
    open from one call to the next (a client, its connections) stays usable.

    Raises:
      RuntimeError: the awaitable tried to end the process; its SystemExit is the cause.
    """

    async def wait() -> Any:
        try:
            return await awaitable
        except SystemExit as error:  # would end the loop, and leave all who wait on it waiting
            ended = RuntimeError(f"SystemExit: {error}").with_traceback(error.__traceback__)
            raise ended from error

    return asyncio.run_coroutine_threadsafe(wait(), _loop()).result()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
