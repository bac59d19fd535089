"""Who writes into a folder of a store, which has no locks: a file that its holder renews.

A start that finds one waits until it has stood still for ``SECONDS``, by its own clock alone, and
takes it then; if it moves, another run goes on, and the start is refused. A holder that finds
another's name in it has lost it, and says so by ``check``.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from jaxrlhf.core.errors import InputError

log = logging.getLogger(__name__)

SECONDS = 60.0
"""For which a lease that is not renewed counts as held; it is renewed four times as often."""

GIVE_BACK_SECONDS = 5.0
"""Seconds that the end waits for a renewal that has begun."""


class Lease:
    """A lease in a store, to be taken, held by a thread of its own, and given back.

    Args:
      place: the output's URL, for messages.
      read: the file's content; FileNotFoundError if it is not there.
      write: replaces it, by JSON.
      remove: deletes it.
      folder: of this machine, which its holder alone writes into: of two runs of one machine with
        the same folder, the one that has a lock on it is the living one.
    """

    def __init__(
        self,
        place: str,
        read: Callable[[], bytes],
        write: Callable[[Any], None],
        remove: Callable[[], None],
        folder: str,
    ):
        self._place, self._folder = place, folder
        self._read, self._write, self._remove = read, write, remove
        self._holder = uuid.uuid4().hex
        self._lost = ""
        self._turn = threading.Lock()  # of what writes and removes it
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="lease", daemon=True)

    def take(self) -> None:
        """Take it, and hold it from now on.

        Raises:
          InputError: another run holds it.
        """
        held = self._content()
        if held and (held.get("host"), held.get("folder")) != (socket.gethostname(), self._folder):
            self._outwait(held)
        self._renew()
        self._thread.start()

    def check(self) -> None:
        """Raise InputError if another run has it now."""
        if self._lost:
            raise InputError(self._lost)

    def renew(self) -> None:
        """Show a sign of life, unless it is another's by now, or given back."""
        with self._turn:
            if self._over.is_set():
                return
            held = self._content()
            if held is None or held.get("holder") == self._holder:
                self._renew()
                return
            self._lost = (
                f"output={self._place}: another run has taken over there ({_name(held)}): this one "
                f"ends; what it has done is in {self._folder}"
            )

    def give_back(self) -> None:
        """Let others have it at once; where that cannot be said in time, it runs out by itself."""
        self._over.set()
        # A renewal that has begun would else write it after it is removed.
        if not self._turn.acquire(timeout=GIVE_BACK_SECONDS):
            return
        try:
            if not self._lost:
                with suppress(Exception):
                    self._remove()
        finally:
            self._turn.release()

    def _hold(self) -> None:
        while not (self._over.wait(SECONDS / 4) or self._lost):
            try:
                self.renew()
            # The copies, which fail too, are told about.
            except Exception as error:
                log.debug("the lease of %s: %s", self._place, error)

    def _outwait(self, held: dict[str, Any]) -> None:
        said = f"output={self._place}: held by {_name(held)}"
        log.warning("%s: waiting up to %d s for its end", said, SECONDS)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, SECONDS / 20))
            now = self._content()
            if now is None:
                return
            if now != held:
                raise InputError(
                    f"output={self._place}: another run writes there ({_name(held)}); wait for it, "
                    "stop it, or choose another output"
                )

    def _content(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._read())
        # Of a store that writes in pieces, half of one.
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _renew(self) -> None:
        about = {"holder": self._holder, "host": socket.gethostname(), "pid": os.getpid()}
        self._write({**about, "folder": self._folder, "renewed": time.time()})


def _name(held: dict[str, Any]) -> str:
    return f"{held.get('host')}, process {held.get('pid')}"
