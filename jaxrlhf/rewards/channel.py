"""What a run and a worker process say to each other: JSON, each message behind its length.

A message is 8 bytes, its length big-endian, and so many bytes of JSON (with NaN). Nothing is ever
unpickled: what a worker sends may have been written by the code that it runs.
"""

import json
import socket
import struct
import time
from typing import Any

HEAD = struct.Struct(">Q")
"""The length of a message, bytes."""

LONGEST = 1e6
"""Seconds; a socket cannot be told to wait for any number of them."""


class ChannelError(Exception):
    """The other end has sent what is no message."""


class ClosedError(ChannelError):
    """The other end is gone."""

    def __init__(self) -> None:
        super().__init__("closed its connection")


def send(sock: socket.socket, message: Any, until: float | None = None) -> None:
    """Send a message. What JSON has not (a date, a Decimal) is sent as text.

    Args:
      until: when the other end must have taken it, on the clock of ``time.monotonic``.

    Raises:
      TimeoutError: it has not.
      ClosedError: it is gone.
    """
    body = json.dumps(message, default=str).encode()
    _limit(sock, until)
    try:
        sock.sendall(HEAD.pack(len(body)) + body)
    except TimeoutError:
        raise
    except OSError as error:
        raise ClosedError from error


def receive(sock: socket.socket, most: int | None = None, until: float | None = None) -> Any:
    """The next message.

    Args:
      most: bytes that it may have; the length that is stated is checked before any is read.
      until: when it must be here, on the clock of ``time.monotonic``.

    Raises:
      TimeoutError: it is not.
      ClosedError: the other end is gone.
      ChannelError: what comes is no message.
    """
    (size,) = HEAD.unpack(_bytes(sock, HEAD.size, until))
    if most is not None and size > most:
        raise ChannelError(f"sent {size} bytes, where at most {most} are an answer")
    body = _bytes(sock, size, until)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ChannelError(f"sent what is not JSON: {bytes(body[:40])!r}") from None


def _bytes(sock: socket.socket, count: int, until: float | None) -> bytearray:
    content = bytearray()
    while len(content) < count:
        _limit(sock, until)
        try:
            part = sock.recv(min(count - len(content), 2**20))
        except TimeoutError:
            raise
        except OSError as error:
            raise ClosedError from error
        if not part:
            raise ClosedError
        content += part
    return content


def _limit(sock: socket.socket, until: float | None) -> None:
    """Let the next call on the socket wait no longer than ``until``."""
    left = None if until is None else until - time.monotonic()
    if left is not None and left <= 0:
        raise TimeoutError
    sock.settimeout(left and min(left, LONGEST))
