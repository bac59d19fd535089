"""Messages come whole, in time and no longer than agreed, or not at all."""

import socket
import threading
import time

import pytest

from jaxrlhf.rewards.channel import HEAD, ChannelError, ClosedError, receive, send


@pytest.fixture
def ends():
    with (pair := socket.socketpair())[0], pair[1]:
        yield pair


def test_message_arrives_as_it_was(ends):
    ours, theirs = ends
    message = {"text": "é\n\x00\ud800", "big": "x" * 10_000_000, "none": [None, 1.5, -7]}
    sender = threading.Thread(target=send, args=(ours, message))
    sender.start()
    assert receive(theirs) == message
    sender.join()


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (HEAD.pack(2**62), "sent 4611686018427387904 bytes, where at most 100"),
        (HEAD.pack(101) + b"1" * 101, "sent 101 bytes, where at most 100"),
        (HEAD.pack(2) + b"{]", "sent what is not JSON: .*{]"),
        (HEAD.pack(2) + b"\xff\xfe", "sent what is not JSON"),
        (HEAD.pack(90) + b"[" * 90, "sent what is not JSON"),
        (HEAD.pack(0), "sent what is not JSON"),
    ],
)
def test_receive_what_is_no_message(ends, sent, error):
    ends[0].sendall(sent)
    with pytest.raises(ChannelError, match=error):
        receive(ends[1], 100)


def test_receive_what_is_nested_too_deep(ends):
    ends[0].sendall(HEAD.pack(100_000) + b"[" * 100_000)
    with pytest.raises(ChannelError, match="sent what is not JSON"):
        receive(ends[1])


@pytest.mark.parametrize("sent", [b"", HEAD.pack(5)[:3], HEAD.pack(5) + b"1234"])
def test_receive_from_one_that_has_gone(ends, sent):
    ends[0].sendall(sent)
    ends[0].close()
    with pytest.raises(ClosedError):
        receive(ends[1])


def test_both_end_in_time_whatever_the_other_does(ends):
    """Drip, or read nothing: the time is that of the whole message."""
    ours, theirs = ends
    theirs.sendall(HEAD.pack(1000))
    stop = threading.Event()

    def drip():
        while not stop.wait(0.02):
            theirs.sendall(b"1")

    sender = threading.Thread(target=drip)
    sender.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        receive(ours, until=began + 0.3)
    stop.set()
    sender.join()
    with pytest.raises(TimeoutError):
        send(ours, "x" * 10_000_000, until=time.monotonic() + 0.2)
    with pytest.raises(TimeoutError):
        send(ours, "x", until=time.monotonic() - 1)
    assert time.monotonic() - began < 10
    send(theirs, "x", until=time.monotonic() + 1e300)
