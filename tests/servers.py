"""A reward service on the loopback that does as it is told, right or wrong."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((dict(self.headers), json.loads(body)))
        try:
            self.server.behave(self, json.loads(body))
        except OSError:  # the client has had enough
            self.close_connection = True

    def log_message(self, *_):
        pass


def service(behave):
    """``behave(handler, request)`` answers each request; ``server.seen`` lists them."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.behave, server.seen = True, behave, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    return running(server)


@contextmanager
def running(server):
    """A server that answers, until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def say(handler, content, status=200):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def length(row):
    """What an honest service pays: characters of the completion."""
    return float(len(row["completion"]))


def honest(handler, request):
    rewards = [{"id": row["id"], "reward": length(row)} for row in request["rows"]]
    say(handler, {"id": request["id"], "rewards": rewards})


def fails(handler, request):
    """A status that may pass by itself."""
    say(handler, b"", status=500)
