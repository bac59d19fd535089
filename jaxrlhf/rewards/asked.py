"""What a source of reward is asked on the host, and what it answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Asked:
    """B rows to be scored, as text."""

    prompts: Sequence[str]
    completions: Sequence[str]
    """Special tokens removed."""
    columns: Mapping[str, Sequence[Any]]
    """The other columns of the data, by name; None where a row lacks one."""
    ended: Sequence[bool]
    """Whether a completion ended with a stop token; False where it was cut off."""

    def __len__(self) -> int:
        return len(self.completions)

    def split(self, size: int) -> list["Asked"]:
        """The rows in pieces of at most ``size``, in order."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def rows(self, which: slice) -> "Asked":
        """Some of the rows."""
        columns = {name: values[which] for name, values in self.columns.items()}
        return Asked(self.prompts[which], self.completions[which], columns, self.ended[which])


class Scored(NamedTuple):
    """What a source says of B rows."""

    score_B: np.ndarray
    """float64, reward units; NaN where it has none, never a number in its place."""
    problem: str = ""
    """Why it has none, of the last row or request without; empty if all went well."""


Source = Callable[[Asked], Scored]
