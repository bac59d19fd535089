"""The ``jaxrlhf`` command: which of its subcommands is meant, and what comes of errors."""

import difflib
import errno
import os
import sys
from collections.abc import Sequence

from jaxrlhf import __version__
from jaxrlhf.apps import on_runs, others  # noqa: F401 (they enter their commands)
from jaxrlhf.apps.shell import (
    COMMANDS,
    beyond_locale,
    end_soon,
    importable,
    never_refuse,
    no_devices,
    settle,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import unwritable


def main(words: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
      words: the command line without the program's name; ``sys.argv[1:]`` if None.

    Returns:
      The exit status: 0, 2 after bad input (one line ``error: …`` on stderr), 130 after Ctrl-C.
    """
    # In a test, or another program, the interpreter is not this command's to change.
    if words is not None:
        return _main(words)
    settle()
    never_refuse(sys.stdout)
    status = 1  # of what no line is made of
    try:
        status = _main(sys.argv[1:])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    finally:
        end_soon(status)
    return status


def _main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"jaxrlhf {__version__}")
        return 0
    try:
        if (name := words[0]) not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            known = f"did you mean {close[0]}?" if close else f"known: {', '.join(COMMANDS)}"
            raise InputError(f"{name}: unknown command ({known})")
        # Dotted names of functions are looked for where the command is given.
        with importable(os.curdir):
            COMMANDS[name][1](list(words[1:]))
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # Whoever was writing, a user's function say: a full disk is no fault of the program.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {unwritable(error.filename or 'a file', error)}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:
        # Text files are UTF-8 everywhere; the names of files are what the locale can say.
        if error.encoding != sys.getfilesystemencoding() or error.encoding == "utf-8":
            raise
        print(f"error: {beyond_locale(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        # Without a device whatever comes first fails, each in its own words.
        if not (problem := no_devices()):
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    """The help of the command as a whole."""
    width = max(map(len, COMMANDS)) + 4
    lines = (f"  {name:<{width}}{text}" for name, (text, _) in COMMANDS.items())
    return (
        "usage: jaxrlhf COMMAND …\n\nReinforcement learning from human feedback in JAX.\n\n"
        + "\n".join(lines)
        + "\n\njaxrlhf COMMAND --help lists what a command takes; --version says which it is."
    )
