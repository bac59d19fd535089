"""The one error that a user can mend: what is wrong, where, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxrlhf.core.shown import one_line, visible


class InputError(ValueError):
    """Bad input: a config field, a file, a row, a prompt.

    The message is one line that names the field or ``file:line``, the value and the remedy.
    The command line prints it after ``error:`` and exits with status 2; research code may catch it.
    """

    def __init__(self, message: str):
        # It quotes files, rows and services of others, and ends on a terminal or in a log.
        super().__init__(visible(message))


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
