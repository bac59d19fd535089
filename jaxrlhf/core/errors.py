"""The one error that a user can mend: what is wrong, where, and what to do about it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from jaxrlhf.core.shown import one_line, visible

LONGEST = 4000
"""Characters of a message: names of others may be of any length."""


class InputError(ValueError):
    """Bad input: a config field, a file, a row, a prompt.

    The message is one line that names the field or ``file:line``, the value and the remedy.
    The command line prints it after ``error:`` and exits with status 2; research code may catch it.
    """

    def __init__(self, message: str):
        # It quotes files, rows and services of others, and ends on a terminal or in a log.
        text = visible(message)
        # The place is at its beginning, and the remedy at its end.
        half = LONGEST // 2 - 2
        super().__init__(text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}")


@contextmanager
def refused(what: str, remedy: str) -> Iterator[None]:
    """Whatever a library raises inside, over a file of others, is ``what (reason); remedy``.

    So is a panic of Rust, which its bindings raise as no Exception.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({one_line(error)}); {remedy}") from None


def to_install(extra: str) -> str:
    """The command that brings an extra of this package, with a release or without one.

    In a clone it installs the clone anew, with the extra; elsewhere the packages that the extra
    stands for, by the metadata of what is installed.
    """
    clone = Path(__file__).parents[2]
    if (clone / "pyproject.toml").exists():
        return f"pip install -e {shlex.quote(f'{clone}[{extra}]')}"
    try:
        known = requires("jaxrlhf") or []
    except PackageNotFoundError:
        known = []
    wanted = [line.partition(";")[0] for line in known if line.endswith(f'extra == "{extra}"')]
    # Nothing installed has the extra: an old copy, or one that no installer knows of.
    return f"pip install {shlex.join(x.strip() for x in wanted) or f'jaxrlhf[{extra}]'}"
