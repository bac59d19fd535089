"""The HTTP of a reward server: the protocol of docs/reward_service.md, and limits on who speaks it.

Until a client has shown the secret it costs a thread, a head of at most HEAD_BYTES and a few
seconds; after that, a body that fits beside those of the others. Who is slow is cut off, and where
all places are taken the one that has waited longest without a request makes room.
"""

import hmac
import http.client
import ipaddress
import json
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.functions import Asked, Source, describe

MAX_BYTES = 16 * 2**20
"""Most bytes of a request's body."""

BODIES = 4 * MAX_BYTES
"""Most bytes of all bodies under way."""

MAX_ROWS = 4096
"""Most rows of a request."""

CLIENTS = 64
"""Most connections, each of which has a thread."""

HEAD_BYTES = 32 * 2**10
"""Most bytes of a request's first line and headers."""

HEAD_SECONDS, BODY_SECONDS, IDLE_SECONDS = 10.0, 60.0, 60.0
"""Seconds that a request's head and its body may take in all, and that a connection waits for
another request."""

ANSWER_SECONDS = 60.0
"""Seconds that a client may take to read its answer."""

DROPPED = 2**20
"""Bytes of a refused request that are read and thrown away, so that its answer arrives."""

GRACE = 10.0
"""Seconds in which requests under way are still answered when the server is closed."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""What JSON can write and no text has."""


class BadRequestError(Exception):
    """A request that does not follow the protocol."""


@dataclass
class _Client:
    """What a connection is at."""

    until: float
    """When it is cut off, on the clock of ``time.monotonic``."""
    waits: bool = True
    """Whether it has not brought a request that is let in."""


class Server(ThreadingHTTPServer):
    """``serve_forever()`` answers requests until ``shutdown()``; ``server_close()`` answers those
    that are under way.

    Args:
      source: what scores rows; what it raises is answered with HTTP 500.
      host, port: where to listen; port 0 takes a free one (``server_port``).
      concurrency: requests that the source is asked at once, each from a thread of its own.
      header, secret: a header and the value that requests must have in it; no check if empty.

    Raises:
      InputError: there is no listening there.
    """

    daemon_threads = True
    request_queue_size = CLIENTS

    def __init__(
        self,
        source: Source,
        host: str = "127.0.0.1",
        port: int = 0,
        concurrency: int = 1,
        header: str = "Authorization",
        secret: str = "",
    ):
        self.source, self.header, self.secret = source, header, secret
        self.turn = threading.Semaphore(concurrency)
        self.closing = False
        self._clients: dict[Any, _Client] = {}
        self._bytes = 0
        self._changed = threading.Condition()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"host={host}, port={port}: {error}: choose another") from error

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, if there is, or can be made, room for it."""
        with self._changed:
            if len(self._clients) >= CLIENTS:
                self._make_room()
            admitted = len(self._clients) < CLIENTS
            if admitted:
                self._clients[request] = _Client(time.monotonic() + HEAD_SECONDS)
        if admitted:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def _make_room(self) -> None:
        waiting = [request for request, client in self._clients.items() if client.waits]
        if waiting:
            longest = min(waiting, key=lambda request: self._clients[request].until)
            del self._clients[longest]
            _cut(longest)

    def expect(self, request: Any, seconds: float, waits: bool) -> None:
        """Cut a connection off unless it is further in so many seconds."""
        with self._changed:
            if request in self._clients:  # else it has made room
                self._clients[request] = _Client(time.monotonic() + seconds, waits)

    def service_actions(self) -> None:
        """Cut off who is late; called by ``serve_forever`` every half second."""
        now = time.monotonic()
        with self._changed:
            for request, client in self._clients.items():
                if client.until < now:
                    _cut(request)

    def take(self, size: int) -> bool:
        """Whether there is room for a body of ``size`` bytes, which is then taken."""
        with self._changed:
            if self._bytes + size > BODIES:
                return False
            self._bytes += size
            return True

    def give_back(self, size: int) -> None:
        """The body that room was taken for is gone."""
        with self._changed:
            self._bytes -= size

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        super().shutdown_request(request)
        with self._changed:
            self._clients.pop(request, None)
            self._changed.notify_all()

    def server_close(self) -> None:
        """Listen no longer; answer what is under way, for at most GRACE seconds."""
        super().server_close()
        self.closing = True
        with self._changed:
            for request, client in self._clients.items():
                if client.waits:
                    _cut(request)
            self._changed.wait_for(lambda: not self._clients, GRACE)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line of what went wrong; nothing of a client that has left."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            print(f"{client_address[0]}: {describe(error)}", file=sys.stderr, flush=True)


def _cut(request: socket.socket) -> None:
    """End a connection; its thread, wherever it waits for the client, reads the end of it."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended already
        return


class _Reader:
    """What a client sends; lines, of which a head consists, are of ``left`` bytes in all."""

    def __init__(self, file: BinaryIO):
        self._file, self.left = file, HEAD_BYTES
        self.read, self.close = file.read, file.close

    def readline(self, size: int) -> bytes:
        line = self._file.readline(min(size, self.left + 1))
        self.left -= len(line)
        if self.left < 0:
            # Where headers are read, http.server answers this one, with status 431.
            raise http.client.HTTPException(f"more than {HEAD_BYTES} bytes")
        return line


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = ANSWER_SECONDS
    server: Server

    def setup(self) -> None:
        super().setup()
        self._reader = _Reader(self.rfile)  # type: ignore[arg-type]
        self.rfile = self._reader  # type: ignore[assignment]
        self._patience = HEAD_SECONDS

    def handle_one_request(self) -> None:
        self.close_connection = True
        if self.server.closing:
            return
        self.server.expect(self.connection, self._patience, True)
        self._reader.left, self._patience = HEAD_BYTES, IDLE_SECONDS
        try:
            super().handle_one_request()
        except http.client.HTTPException:  # a first line without an end
            self.close_connection = True

    def do_GET(self) -> None:
        if self.headers.get_all("Content-Length") or self.headers.get("Transfer-Encoding"):
            self._refuse(413, "a GET has no body")
        else:
            self._say(200, {"ready": True})

    def do_POST(self) -> None:
        if refusal := self._refusal():
            self._refuse(*refusal)
            return
        size = int(self.headers["Content-Length"])
        if not self.server.take(size):
            self._refuse(503, f"more than {BODIES} bytes of requests are under way")
            return
        try:
            self.server.expect(self.connection, BODY_SECONDS, False)
            body = self.rfile.read(size)
            if len(body) < size:  # the client has left, or was cut off
                self.close_connection = True
                return
            self.server.expect(self.connection, math.inf, False)
            self._say(*self._answer(body))
        finally:
            self.server.give_back(size)

    def handle_expect_100(self) -> bool:
        """Have the body sent only by who is let in."""
        refusal = self._refusal()
        if refusal:
            self._refuse(*refusal)
        return not refusal and super().handle_expect_100()

    def _refusal(self) -> tuple[int, str] | None:
        """Status and reason for which a request is refused unread; None if it is let in."""
        # Compared in a time that does not tell how much of it is right.
        given, secret = self.headers.get(self.server.header, ""), self.server.secret
        if secret and not hmac.compare_digest(given.encode(), secret.encode()):
            return 401, f"the header {self.server.header} is missing or wrong"
        if "Transfer-Encoding" in self.headers:
            return 411, "no Content-Length"
        sizes = self.headers.get_all("Content-Length", [""])
        # By its digits first: Python does not read numbers of thousands of them.
        good = len(sizes) == 1 and sizes[0].isascii() and sizes[0].isdigit() and len(sizes[0]) < 12
        if not good or int(sizes[0]) > MAX_BYTES:
            return 413, f"Content-Length={sizes[0]!r:.40}: at most {MAX_BYTES} bytes"
        return None

    def _answer(self, body: bytes) -> tuple[int, Mapping[str, Any]]:
        try:
            with self.server.turn:
                return 200, reply(body, self.server.source)
        except BadRequestError as error:
            return 400, {"error": str(error)}
        except Exception as error:
            self.log_message("%s", describe(error))
            return 500, {"error": describe(error)}

    def _refuse(self, status: int, why: str) -> None:
        """Say why, and close the connection: what follows on it would be taken for a request."""
        self.close_connection = True
        self._say(status, {"error": why})
        # Closed with bytes unread, a connection is reset, and the answer may be lost with it.
        self.connection.shutdown(socket.SHUT_WR)
        left = DROPPED
        while left > 0 and (part := self.rfile.read(min(left, 2**14))):
            left -= len(part)

    def _say(self, status: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *_: Any) -> None:
        """Requests are not logged, nor what is wrong with them: strangers could fill a disk."""

    def log_error(self, format: str, *args: Any) -> None:
        """Nor this, which http.server calls for each of those."""


def reply(body: bytes, source: Source) -> dict[str, Any]:
    """The answer to a request: the source's scores, null where it does not apply, null with an
    error where it failed; a BadRequestError where the body is no request."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"not JSON: {error}") from None
    rows = request.get("rows") if isinstance(request, dict) else None
    if not isinstance(rows, list) or not rows:
        raise BadRequestError("no list of rows")
    if len(rows) > MAX_ROWS:
        raise BadRequestError(f"{len(rows)} rows: at most {MAX_ROWS}")
    for index, row in enumerate(rows):
        _check(row, f"rows[{index}]")
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise BadRequestError("two rows with one id")
    # A column that only some rows have is None in the others.
    names = dict.fromkeys(name for row in rows for name in row.get("columns", {}))
    scored = source(
        Asked(
            [row["prompt"] for row in rows],
            [row["completion"] for row in rows],
            {name: [row.get("columns", {}).get(name) for row in rows] for name in names},
            [row.get("ended", True) for row in rows],
        )
    )
    why = scored.problem or "no finite score"
    rewards: list[dict[str, Any]] = []
    for key, score, applies in zip(ids, scored.score_B.tolist(), scored.applies(), strict=True):
        has = applies and math.isfinite(score)
        rewards.append({"id": key, "reward": score if has else None})
        if applies and not has:
            rewards[-1]["error"] = why
    return {**({"id": request["id"]} if "id" in request else {}), "rewards": rewards}


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise BadRequestError(f"{where}: not an object")
    for name in ("id", "prompt", "completion"):
        text = row.get(name)
        if not isinstance(text, str) or SURROGATE.search(text):
            raise BadRequestError(f"{where}.{name}: not text")
    if not isinstance(row.get("ended", True), bool):
        raise BadRequestError(f"{where}.ended: neither true nor false")
    if not isinstance(row.get("columns", {}), dict):
        raise BadRequestError(f"{where}.columns: not an object")
