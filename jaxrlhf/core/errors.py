"""The one error that a user can mend: what is wrong, where, and what to do about it."""

from jaxrlhf.core.shown import visible


class InputError(ValueError):
    """Bad input: a config field, a file, a row, a prompt.

    The message is one line that names the field or ``file:line``, the value and the remedy.
    The command line prints it after ``error:`` and exits with status 2; research code may catch it.
    """

    def __init__(self, message: str):
        # It quotes files, rows and services of others, and ends on a terminal or in a log.
        super().__init__(visible(message))
