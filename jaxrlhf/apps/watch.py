"""``jaxrlhf report --watch``: the page about a run, served to this machine while it goes on."""

import hashlib
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import check_no_url
from jaxrlhf.run.folder import FILES, read_run, stages_of
from jaxrlhf.run.report import render

HOST = "127.0.0.1"

SECONDS = 10.0
"""How long a connection may take to ask, or to read."""


def watch(folders: Sequence[str], port: int = 0) -> None:
    """Serve the page about runs until Ctrl-C.

    Args:
      folders: as of ``write_report``.
      port: where; 0 takes a free one.

    Raises:
      InputError: a folder that is no run's, or a port that cannot be had.
    """
    with Server(folders, port) as server:
        print(f"{server.url} follows {', '.join(folders)}; Ctrl-C ends it", flush=True)
        server.serve_forever()


class Server(ThreadingHTTPServer):
    """Answers GET / with the page as the runs' files now make it, and 304 where it has not changed.

    Raises:
      InputError: as ``watch``.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[str], port: int = 0):
        if not folders:
            raise InputError("report: RUN: missing: give the output folder of at least one run")
        for folder in folders:
            check_no_url("RUN", folder)
        self._folders = folders
        self._lock = threading.Lock()
        self._made: tuple[Any, bytes] | None = None
        self.page()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port={port}: {error}: choose another") from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def page(self) -> bytes:
        """The page, made anew where a file has changed; one request at a time."""
        with self._lock:
            state = self._state()
            if self._made is None or self._made[0] != state:
                runs = [read_run(folder) for folder in self._folders]
                self._made = state, render(runs, live=True).encode()
            return self._made[1]

    def _state(self) -> list[Any]:
        """What tells that a file has changed."""
        found = []
        for folder in map(Path, self._folders):
            places = [folder] if (folder / "config.yaml").exists() else stages_of(folder)
            for path in (place / name for place in places for name in FILES):
                try:
                    stat = path.stat()
                except OSError:  # not there yet
                    continue
                found.append((str(path), stat.st_mtime_ns, stat.st_size))
        return found

    def handle_error(self, *_: Any) -> None:
        """A browser that has left is no news."""


class _Handler(BaseHTTPRequestHandler):
    timeout = SECONDS
    server: Server

    def do_GET(self) -> None:
        # Another site's name that resolves to this machine must not read what is here.
        if self.headers.get("Host") not in (f"{HOST}:{self.server.server_port}",
                                            f"localhost:{self.server.server_port}"):  # fmt: skip
            self._say(403, f"ask for {self.server.url}")
        elif self.path != "/":
            self._say(404, f"the page is {self.server.url}")
        else:
            self._answer()

    def _answer(self) -> None:
        try:
            page = self.server.page()
        except InputError as error:
            self._say(503, str(error))
            return
        tag = f'"{hashlib.sha256(page).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.send_header("ETag", tag)
            self.end_headers()
            return
        self._say(200, page, "text/html", tag)

    def _say(self, status: int, body: str | bytes, kind: str = "text/plain", tag: str = "") -> None:
        content = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: there is one every few seconds."""
