"""The reference server of the protocol in docs/reward_service.md: any source of reward, by HTTP."""

import hmac
import json
import math
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxrlhf.errors import InputError
from jaxrlhf.rewards.asked import Asked, Source
from jaxrlhf.rewards.functions import describe

MAX_BYTES = 64 * 2**20
"""Most bytes of a request."""


class BadRequestError(Exception):
    """A request that does not follow the protocol."""


class Server(ThreadingHTTPServer):
    """``serve_forever()`` answers requests until ``shutdown()``.

    Args:
      source: what scores rows; what it raises is answered with HTTP 500.
      host, port: where to listen; port 0 takes a free one (``server_port``).
      concurrency: requests that the source is asked at once, each from a thread of its own.
      header, secret: a header and the value that requests must have in it; no check if empty.

    Raises:
      InputError: there is no listening there.
    """

    daemon_threads = True

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
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"host={host}, port={port}: {error}: choose another") from error

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.server_address[0]}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        self._say(200, {"ready": True})

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit() or int(size) > MAX_BYTES:
            self.close_connection = True
            self._say(413, {"error": f"Content-Length={size!r:.40}: at most {MAX_BYTES} bytes"})
            return
        body = self.rfile.read(int(size))
        given, secret = self.headers.get(self.server.header, ""), self.server.secret
        if secret and not hmac.compare_digest(given.encode(), secret.encode()):
            self._say(401, {"error": f"the header {self.server.header} is missing or wrong"})
            return
        try:
            with self.server.turn:
                answer = reply(body, self.server.source)
            self._say(200, answer)
        except BadRequestError as error:
            self._say(400, {"error": str(error)})
        except Exception as error:
            self.log_error("%s", describe(error))
            self._say(500, {"error": describe(error)})

    def _say(self, status: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *_: Any) -> None:
        """Requests are not logged; errors are."""


def reply(body: bytes, source: Source) -> dict[str, Any]:
    """The answer to a request: the source's scores, null with a reason where it has none.

    Raises:
      BadRequestError: a body that is no request.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"not JSON: {error}") from None
    rows = request.get("rows") if isinstance(request, dict) else None
    if not isinstance(rows, list) or not rows:
        raise BadRequestError("no list of rows")
    for index, row in enumerate(rows):
        _check(row, f"rows[{index}]")
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise BadRequestError("two rows with one id")
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
    rewards = [
        {"id": key, "reward": score}
        if math.isfinite(score)
        else {"id": key, "reward": None, "error": why}
        for key, score in zip(ids, scored.score_B.tolist(), strict=True)
    ]
    return {**({"id": request["id"]} if "id" in request else {}), "rewards": rewards}


def _check(row: Any, where: str) -> None:
    """Raise BadRequestError unless the row is one."""
    if not isinstance(row, dict):
        raise BadRequestError(f"{where}: not an object")
    for name in ("id", "prompt", "completion"):
        if not isinstance(row.get(name), str):
            raise BadRequestError(f"{where}.{name}: not text")
    if not isinstance(row.get("ended", True), bool):
        raise BadRequestError(f"{where}.ended: neither true nor false")
    if not isinstance(row.get("columns", {}), dict):
        raise BadRequestError(f"{where}.columns: not an object")
