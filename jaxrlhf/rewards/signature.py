"""How a reward function is called: with what its signature names, under those names.

TRL's functions are called so: ``(completions, **kwargs)``, ``(prompts, completions, answer)``,
``(completion_ids, **kwargs)``. There are

    prompts          of each row its text, or its messages where the data has messages
    completions      of each row its text, or [{"role": "assistant", "content": text}] likewise
    completion_ids   of each row its token ids, stop token included; where the signature names it
    NAME             each other column of the data, None where a row lacks it

A signature that names none of the first two beyond its beginning, as ``(p, c, **columns)`` or
``(*texts, **columns)``, is given prompts and completions by position, and the columns by name.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IDS = "completion_ids"

Arguments = tuple[list[Any], dict[str, Any]]
"""By position, and by name."""


@dataclass(frozen=True)
class Signature:
    """What a function is to be given."""

    by_name: bool = False
    """False: prompts and completions come first, whatever they are called."""
    named: frozenset[str] = frozenset()
    """The arguments that can be given by name."""
    rest: bool = True
    """Whether it takes any other name too (``**columns``)."""
    needs: tuple[str, ...] = ()
    """The columns without which it cannot be called."""

    @property
    def ids(self) -> bool:
        """Whether it asks for token ids."""
        return IDS in self.named


def signature_of(function: Callable[..., Any]) -> Signature:
    """The signature of a callable: a function, asynchronous or not, a partial, an object.

    One that cannot be read, as of some functions written in C, is ``(prompts, completions,
    **columns)``.
    """
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return Signature()
    by_position = [x.name for x in found if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    only = {x.name for x in found if x.kind is x.POSITIONAL_ONLY}
    keywords = [x.name for x in found if x.kind is x.KEYWORD_ONLY]
    named = frozenset({*by_position, *keywords} - only)
    open_ended = any(x.kind is x.VAR_POSITIONAL for x in found)
    first_two = by_position[:2]
    by_name = "completions" in named or IDS in first_two or (len(first_two) < 2 and not open_ended)
    given = ("prompts", "completions", IDS) if by_name else (*first_two, IDS)
    required = [
        x.name
        for x in found
        if x.default is x.empty and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
    ]
    rest = any(x.kind is x.VAR_KEYWORD for x in found)
    needs = tuple(name for name in required if name not in given)
    return Signature(by_name, named, rest, needs)


def arguments(
    how: Signature,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    ids: Sequence[Sequence[int]] | None = None,
) -> Arguments:
    """What to call a function with; all that ``how.needs`` names must be among the columns."""
    lists: dict[str, Any] = {name: list(values) for name, values in columns.items()}
    if how.ids and ids is not None:
        lists.setdefault(IDS, [list(row) for row in ids])
    texts = [list(prompts), list(completions)]
    if how.by_name:
        lists |= dict(zip(("prompts", "completions"), texts, strict=True))
    taken = {name: x for name, x in lists.items() if how.rest or name in how.named}
    return ([] if how.by_name else texts), taken


def missing(how: Signature, there: Sequence[str], ids: bool = True) -> str:
    """What is wrong where a function needs a column that is not among those ``there``; else "".

    Args:
      ids: whether token ids are at hand.
    """
    wanted = [*how.needs, *([IDS] if how.ids and not ids else [])]
    unknown = [name for name in wanted if name not in there]
    if not unknown:
        return ""
    listed = ", ".join(("prompts", "completions", *([IDS] if ids else []), *there))
    return f"asks for {' and '.join(map(repr, unknown))}, and there are {listed}"


RENAME = "rename the argument or the column, or give the argument a default"
"""What to do about a column that is not there."""
