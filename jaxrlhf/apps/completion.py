"""Completion by the shell: a script of all commands and their options, read off their own help."""

import contextlib
import io
import os
import re
from collections.abc import Callable, Mapping
from unittest.mock import patch

from jaxrlhf.core.errors import InputError

Commands = Mapping[str, tuple[str, Callable[[list[str]], None]]]
"""Name → (what the help says of it, a function of the words after it)."""

BASH = """\
# jaxrlhf completion bash > ~/.local/share/bash-completion/completions/jaxrlhf
_jaxrlhf() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} options=
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "{names}" -- "$word")
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    [[ $word != -* ]] || mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
}}
complete -o default -F _jaxrlhf jaxrlhf
"""

ZSH = """\
#compdef jaxrlhf
# jaxrlhf completion zsh > "${{fpath[1]}}/_jaxrlhf"
_jaxrlhf() {{
    local -a commands options
    if ((CURRENT == 2)); then
        commands=({described})
        _describe command commands
        return
    fi
    case $words[2] in
{cases}
    esac
    if [[ $words[CURRENT] == -* ]]; then
        compadd -- $options
    else
        _files
    fi
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _jaxrlhf "$@"
else
    compdef _jaxrlhf jaxrlhf
fi
"""


def script(shell: str, commands: Commands) -> str:
    """What a shell has to read to complete the words of ``jaxrlhf``: commands, options, files.

    Args:
      shell: bash or zsh.
      commands: those that are completed.

    Raises:
      InputError: another shell.
    """
    if shell not in ("bash", "zsh"):
        raise InputError(f"shell={shell}: give bash or zsh")
    options = {name: options_of(run) for name, (_, run) in commands.items()}
    if shell == "bash":
        cases = (f'    {name}) options="{" ".join(words)}" ;;' for name, words in options.items())
        return BASH.format(names=" ".join(commands), cases="\n".join(cases))
    cases = (f"    {name}) options=({' '.join(words)}) ;;" for name, words in options.items())
    described = " ".join(f"'{name}:{_quoted(text)}'" for name, (text, _) in commands.items())
    return ZSH.format(described=described, cases="\n".join(cases))


def options_of(run: Callable[[list[str]], None]) -> list[str]:
    """The options that a command's ``--help`` lists, in its order, each once."""
    said = io.StringIO()
    # A narrow line is broken inside of an option, a wide one has panels side by side.
    with (
        patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        run(["--help"])
    # Cells of boxes; one of an option begins with it, and others may speak of one.
    cells = (cell.strip() for cell in re.split(r"[\n│]", said.getvalue()))
    found = (re.findall(r"(?<![\w-])--[a-z][\w.-]*", cell) for cell in cells if cell[:1] == "-")
    return list(dict.fromkeys(word for words in found for word in words))


def _quoted(text: str) -> str:
    """Text inside of single quotes, as zsh's _describe reads it."""
    return text.replace("'", "'\\''").replace(":", "\\:")
