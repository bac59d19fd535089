"""From a function's signature to a command."""

from collections.abc import Callable

import tyro


def typed(command: Callable[..., None]) -> Callable[[list[str]], None]:
    """A function of words that parses them by the signature and docstring of ``command``."""

    def run(words: list[str]) -> None:
        tyro.cli(command, prog=f"jaxrlhf {command.__name__}", args=words)

    return run
