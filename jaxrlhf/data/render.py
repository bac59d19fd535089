"""Chat templates, run: those that are known here, and those of strangers in a process under limits.

A template is a program. Jinja's sandbox keeps it from files and from Python's inside, but not from
looping for ever, nor from filling memory: ``{{ 'x' * 10**9 }}``. So one that is not listed in
``templates/known.txt`` runs in a process of its own, one for all such templates and their rows. It
is started when it is first asked, which takes a second, and killed by what exceeds a limit; the
next row then has another.

Over a socket go lengths, of eight bytes, and JSON: what the template is given, and what it wrote.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from jaxrlhf.core.shown import one_line

SECONDS = 2.0
"""Processor time that a rendering may take; this, not a clock's, is the same on a busy machine."""

PATIENCE = 120.0
"""Seconds by the clock after which a process that has not answered is given up."""

MEMORY = 2**28
"""Bytes that a rendering may take beside what it is given, where the system limits them (Linux)."""

MOST_TEXT = 2**24
"""Characters that a template may write beside four times what it is given."""

KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
"""What the process knows of the environment, in which secrets may be."""

Rendered = tuple[str, list[tuple[int, int]]]
"""A text, and where in it the stretches are that a template marks as the assistant's."""


class RenderError(ValueError):
    """Why a template has no text for a chat."""


def render(template: str, source: str, given: Mapping[str, Any], spans: bool = False) -> Rendered:
    """What a template writes.

    Args:
      template: its text, by which it is known or not.
      source: the same as it is run, perhaps with a macro before it.
      given: ``messages``, ``tools``, ``add_generation_prompt`` and whatever else it may read.
      spans: find the stretches, too.

    Raises:
      RenderError: it failed, took too long or too much memory, or wrote too much.
    """
    if is_known(template):
        return _rendered(source, given, spans)
    asked = json.dumps([source, given, spans], default=lambda x: f"<{type(x).__name__}>").encode()
    answer = _worker().ask(asked)
    if "failed" in answer:
        raise RenderError(answer["failed"])
    return answer["text"], [(start, end) for start, end in answer["spans"]]


def is_known(template: str) -> bool:
    """Whether it is one of those that were tried, and run in this process."""
    return digest(template) in _known()


def digest(template: str) -> str:
    """By what a template is known, whatever white space is around it."""
    return hashlib.sha256(template.strip().encode("utf-8", "replace")).hexdigest()


@functools.cache
def _known() -> frozenset[str]:
    lines = (Path(__file__).parent / "templates" / "known.txt").read_text(encoding="utf-8")
    return frozenset(line.split()[0] for line in lines.splitlines())


def _rendered(source: str, given: Mapping[str, Any], spans: bool) -> Rendered:
    messages = given["messages"]
    names = {name: value for name, value in given.items() if name != "messages"}
    # A field that is null counts as one that is not there, as in apply_chat_template.
    chat = [{name: x for name, x in turn.items() if x is not None} for turn in messages]
    try:
        texts, places = render_jinja_template(
            [chat], chat_template=source, return_assistant_tokens_mask=spans, **names
        )
    except MemoryError:
        raise
    # Templates index and join what is in the row, which fails with any error of Python's.
    except Exception as error:
        raise RenderError(one_line(error)) from error
    marked: Any = places[0] if spans else []
    return str(texts[0]), [(start, end) for start, end in marked]


@functools.cache
def _worker() -> "_Worker":
    return _Worker()


class _Worker:
    """The process, started when it is asked and there is none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, message: bytes) -> dict[str, Any]:
        """What the process answers.

        Raises:
          RenderError: it ended, does not answer, or says too much.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                _send(self._link, message)
                # A character is written as up to twelve bytes.
                return json.loads(_receive(self._link, 12 * _most_text(message) + 2**20))
            except (OSError, ValueError, RecursionError) as error:
                raise RenderError(self._end(error)) from None

    def _start(self) -> None:
        self._link, theirs = socket.socketpair()
        self._link.settimeout(PATIENCE)
        # It imports from where this process does, and, by -P, from nowhere else.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "jaxrlhf.data.render"],
                env={**{x: os.environ[x] for x in KEPT if x in os.environ}, "PYTHONPATH": path},
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is this process's, which may go on for a while
            )
        weakref.finalize(self, self._process.kill)

    def _end(self, error: Exception) -> str:
        """Why there was no answer, once the process has ended."""
        assert self._process is not None
        process, self._process = self._process, None
        self._link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0 if isinstance(error, TimeoutError) else 5)
        process.kill()
        status = process.wait()
        if status == -signal.SIGPROF:
            return f"it takes more than {SECONDS:g} s"
        return f"its process ended ({error})"


def _most_text(message: bytes) -> int:
    return MOST_TEXT + 4 * len(message)


def _send(link: socket.socket, message: bytes) -> None:
    link.sendall(len(message).to_bytes(8, "big"))
    link.sendall(message)


def _receive(link: socket.socket, most: float = math.inf) -> bytes:
    """The next message.

    Raises:
      OSError: the connection has ended, or the message has more than ``most`` bytes.
    """
    size = int.from_bytes(_exactly(link, 8), "big")
    if size > most:
        raise OSError(f"an answer of {size} bytes")
    return _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = link.recv(min(size, 2**20))
        if not part:
            raise ConnectionError("the connection has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# In the process of strangers' templates


def main() -> None:
    """Answer what is asked over standard input, a socket, until it is closed."""
    link, occupied = socket.socket(fileno=0), _occupied()
    with contextlib.suppress(ConnectionError):
        while True:
            message = _receive(link)
            if occupied:
                limit = occupied + MEMORY + len(message)
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            # What its signal does by default, no template can keep from being done.
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            answer = _answer(message)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(link, answer)


def _answer(message: bytes) -> bytes:
    try:
        source, given, spans = json.loads(message)
        text, places = _rendered(source, given, spans)
        if len(text) > (most := _most_text(message)):
            raise RenderError(f"it writes more than {most} characters")
        return json.dumps({"text": text, "spans": places}).encode()
    except MemoryError:
        failed = f"it takes more than {MEMORY >> 20} MiB of memory"
    except RenderError as error:
        failed = str(error)
    return json.dumps({"failed": failed}).encode()


def _occupied() -> int:
    """Bytes of address space that this process takes; 0 where the system does not say."""
    path = Path("/proc/self/statm")
    pages = path.read_text(encoding="ascii").split()[0] if path.exists() else 0
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    main()
