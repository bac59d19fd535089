"""How long `jaxrlhf chat MODEL` takes to its first token, and to the end of its answer.

    python benchmarks/first_answer.py [MODEL]

starts the command as a user does, with a home whose caches are empty, asks one question, and prints
the seconds to the first piece of the answer and to its last; then once more with what the first run
has compiled. The clock begins with the command: interpreter, imports, weights and compilation are
in it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

QUESTION = "What is the capital of France?"
CODE = "import sys; from jaxrlhf.apps.cli import main; sys.exit(main())"


class Seconds(NamedTuple):
    """From the start of the command."""

    ready: float
    """Until it can be told something."""
    first: float
    """To the first piece of the answer."""
    whole: float
    """To its end."""


def ask(model: str, home: str, question: str = QUESTION) -> tuple[Seconds, str]:
    """Start the chat, ask, and time the answer; greedy, so that it is the same each time."""
    words = [sys.executable, "-c", CODE, "chat", model, "--temperature", "0"]
    # What the caller's caches and libraries are told stays the caller's.
    clean = {name: x for name, x in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    began = time.perf_counter()
    with subprocess.Popen(
        words,
        env={**clean, "HOME": home, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(question.encode() + b"\n")
        chat.stdin.close()
        # The line of help comes when the model is read.
        chat.stdout.readline()
        ready = time.perf_counter() - began
        text = chat.stdout.read(1)
        first = time.perf_counter() - began
        text += chat.stdout.read()
        whole = time.perf_counter() - began
    if chat.returncode:
        raise SystemExit(f"jaxrlhf chat {model}: status {chat.returncode}")
    return Seconds(ready, first, whole), text.decode()


def main() -> None:
    """Two runs, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        for name in ("nothing compiled", "compiled before"):
            took, text = ask(given.model, home)
            print(
                f"{name}: ready {took.ready:.1f} s, first token {took.first:.1f} s, whole answer "
                f"{took.whole:.1f} s: {' '.join(text.split())[:80]}"
            )


if __name__ == "__main__":
    main()
