"""Whoever connects: strangers cost little, slow clients hold nobody up, and what is under way when
the server is asked to stop is answered. Nothing of it is a traceback."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress

import httpx2
import numpy as np
import pytest
from servers import running

from jaxrlhf.apps import listener
from jaxrlhf.apps.listener import BadRequestError, Server, reply
from jaxrlhf.apps.serve import attend, serve
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.functions import Scored

BODY = json.dumps({"rows": [{"id": "0", "prompt": "p", "completion": "abc"}]}).encode()
ANSWER = {"rewards": [{"id": "0", "reward": 3.0}]}


def source(asked):
    return Scored(np.array([len(text) for text in asked.completions], float))


@contextmanager
def talking(server, sent=b""):
    """A connection that has sent so much."""
    with socket.create_connection(server.server_address, timeout=10) as client:
        client.sendall(sent)
        yield client


def said(client):
    """All that the server says until it closes the connection."""
    parts = []
    while part := client.recv(2**16):
        parts.append(part)
    return b"".join(parts)


def head(*lines, path="POST / HTTP/1.1"):
    return "".join(f"{line}\r\n" for line in (path, "Host: here", *lines, "")).encode()


def post(server, **options):
    return httpx2.post(server.url, content=BODY, trust_env=False, timeout=10, **options)


@pytest.fixture(autouse=True)
def silent(capfd):
    """Nothing that a client does is worth a line in a log, let alone a traceback."""
    yield
    assert capfd.readouterr().err == ""


def test_secret_is_checked_before_the_body_is_read():
    with running(Server(source, secret="Bearer x")) as server:
        large = "Content-Length: 10000000"
        for lines in ([large], [large, "Authorization: Bearer y"], [large, "Expect: 100-continue"]):
            with talking(server, head(*lines)) as client:
                client.shutdown(socket.SHUT_WR)
                assert said(client).startswith(b"HTTP/1.1 401 ")
        with talking(server, head(large, "Expect: 100-continue", "Authorization: Bearer x")) as c:
            assert c.recv(100).startswith(b"HTTP/1.1 100 ")
        # The answer arrives though the client is still sending.
        assert post(server).status_code == 401


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([f"Content-Length: {'9' * 5000}"], 413),
        (["Content-Length: -1"], 413),
        (["Content-Length: ²"], 413),
        (["Content-Length: 16777217"], 413),
        ([f"Content-Length: {len(BODY)}", "Content-Length: 1"], 413),
        ([], 413),
        (["Transfer-Encoding: chunked"], 411),
        ([f"X: {'x' * 40_000}"], 431),
        ([f"X: {'x' * 1000}"] * 40, 431),
        (["X: x"] * 101, 431),
    ],
)
def test_head_that_is_refused(lines, status):
    with running(Server(source)) as server, talking(server, head(*lines) + BODY) as client:
        client.shutdown(socket.SHUT_WR)
        assert said(client).startswith(f"HTTP/1.1 {status} ".encode())


def test_first_line_without_an_end_and_a_get_with_a_body():
    with running(Server(source)) as server:
        with talking(server, b"x" * 40_000) as client, suppress(ConnectionResetError):
            assert said(client) == b""
        with talking(server, head("Content-Length: 5", path="GET / HTTP/1.1")) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_clients_that_leave(monkeypatch):
    """In the midst of a head, of a body, and before the answer."""
    came, go = threading.Event(), threading.Event()

    def slow(asked):
        came.set()
        assert go.wait(10)
        return source(asked)

    whole = head(f"Content-Length: {len(BODY)}") + BODY
    with running(Server(slow, concurrency=2)) as server:
        for sent in (whole[:20], whole[:-5]):
            with talking(server, sent):
                pass
        with talking(server, whole) as client:
            assert came.wait(10)
            # Closed with data unread, it is reset: the server's answer meets an error.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        go.set()
        assert post(server).json() == ANSWER


def test_body_that_ends_too_soon_is_not_scored():
    """Though what has come is a request."""
    asked = []
    with (
        running(Server(asked.append)) as server,
        talking(server, head(f"Content-Length: {len(BODY) + 5}") + BODY) as client,
    ):
        client.shutdown(socket.SHUT_WR)
        assert said(client) == b""
    assert asked == []


@pytest.mark.parametrize("sent", [b"", head("Content-Length: 50")[:-2], head("Content-Length: 9")])
def test_slow_client_is_cut_off(sent, monkeypatch):
    """Silent, or dripping: the time is that of the whole head, and of the whole body."""
    monkeypatch.setattr(listener, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(listener, "BODY_SECONDS", 0.3)
    with running(Server(source)) as server, talking(server, sent) as client:
        client.settimeout(0.05)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                assert client.recv(100) == b""
                break
            except TimeoutError:
                client.sendall(b"x" if sent else b"")
            except ConnectionError:
                break
        else:
            pytest.fail("it may drip for ever")
        assert post(server).json() == ANSWER


def test_strangers_make_room(monkeypatch):
    """Of more connections than there are threads for, those without a request are cut off."""
    monkeypatch.setattr(listener, "CLIENTS", 4)
    before = threading.active_count()
    with running(Server(source, secret="s")) as server:
        strangers = [socket.create_connection(server.server_address) for _ in range(40)]
        try:
            for _ in range(3):
                assert post(server, headers={"Authorization": "s"}).json() == ANSWER
            assert threading.active_count() <= before + 1 + 2 * 4
        finally:
            for stranger in strangers:
                stranger.close()


def test_those_that_are_answered_keep_their_place(monkeypatch):
    monkeypatch.setattr(listener, "CLIENTS", 2)
    came, go, answers = threading.Semaphore(0), threading.Event(), []

    def slow(asked):
        came.release()
        assert go.wait(10)
        return source(asked)

    with running(Server(slow, concurrency=2)) as server:
        threads = [
            threading.Thread(target=lambda: answers.append(post(server).json())) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
            assert came.acquire(timeout=10)
        with pytest.raises(httpx2.HTTPError):  # turned away: no place is free
            post(server)
        go.set()
        for thread in threads:
            thread.join()
    assert answers == [ANSWER] * 2


def test_bodies_have_room_together_or_wait(monkeypatch):
    monkeypatch.setattr(listener, "BODIES", len(BODY) + 10)
    with running(Server(source)) as server:
        with talking(server, head(f"Content-Length: {len(BODY)}") + BODY[:-1]) as client:
            until = time.monotonic() + 10
            while post(server).status_code != 503:
                assert time.monotonic() < until
            client.sendall(BODY[-1:])
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        assert post(server).json() == ANSWER


def test_rows_that_are_too_many_or_no_text(monkeypatch):
    monkeypatch.setattr(listener, "MAX_ROWS", 1)
    rows = json.loads(BODY)["rows"]
    with pytest.raises(BadRequestError, match="2 rows: at most 1"):
        reply(json.dumps({"rows": rows * 2}).encode(), source)
    half = json.dumps({"rows": [{**rows[0], "prompt": "\ud800"}]})
    with pytest.raises(BadRequestError, match=r"rows\[0\]\.prompt: not text"):
        reply(half.encode(), source)


def test_sigterm_ends_it_once_what_is_under_way_is_answered(capfd):
    came, scored, over, answers = *(threading.Event() for _ in range(3)), []

    def slow(asked):
        came.set()
        time.sleep(1.0)  # longer than the server takes to hear that it is to stop
        scored.set()
        return source(asked)

    def ask():
        answers.append(post(server).json())

    def stop():
        with talking(server):  # a connection that brings nothing is not waited for
            assert came.wait(10)
            os.kill(os.getpid(), signal.SIGTERM)
            assert over.wait(20)

    server, before = Server(slow), signal.getsignal(signal.SIGTERM)
    threads = [threading.Thread(target=work) for work in (ask, stop)]
    began = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        attend(server)
        assert scored.is_set()
        assert time.monotonic() - began < 9  # and not the ten that it may take
    finally:
        over.set()
        signal.signal(signal.SIGTERM, before)
    for thread in threads:
        thread.join()
    assert answers == [ANSWER]
    with pytest.raises(httpx2.ConnectError):
        post(server)
    assert capfd.readouterr().err == ""


def test_attend_says_who_is_let_in(capfd):
    for secret, who in (("", "whoever asks: set --token-env"), ("s", "who shows the secret")):
        server = Server(source, host="0.0.0.0", secret=secret)
        threading.Timer(0.2, server.shutdown).start()
        thread = threading.Thread(target=attend, args=(server,))
        thread.start()
        thread.join()
        assert capfd.readouterr().err == f"others can reach {server.url}; it answers {who}\n"


def test_token(monkeypatch):
    monkeypatch.setenv("TOKEN", "abc")
    function = "jaxrlhf.data.words:goodness"
    with running(serve(function, port=0, token_env="TOKEN")) as server:
        assert post(server, headers={"Authorization": "abc"}).status_code == 401
        assert post(server, headers={"Authorization": "Bearer abc"}).status_code == 200
    monkeypatch.setenv("TOKEN", "ab€")
    for name in ("token_env", "header_env"):
        with pytest.raises(InputError, match=f"{name}=TOKEN: .* not printable ASCII"):
            serve(function, port=0, **{name: "TOKEN"})
    with pytest.raises(InputError, match="both given"):
        serve(function, port=0, token_env="TOKEN", header_env="TOKEN")


def test_source_that_fails_is_logged_in_a_line(capfd):
    def failing(asked):
        raise ValueError("two\nlines, and \x1b[31mred")

    with running(Server(failing)) as server:
        assert post(server).status_code == 500
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(r"ValueError: two lines, and \x1b[31mred")
