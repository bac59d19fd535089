import json
import threading
from contextlib import contextmanager

import httpx2
import numpy as np
import pytest

from jaxrlhf.apps import serve as server_module
from jaxrlhf.apps.serve import BadRequestError, Server, reply
from jaxrlhf.config import ServiceConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.functions import Asked, Scored
from jaxrlhf.rewards.service import make


def source(asked):
    """Characters; none for an empty completion, and 100 more where it was cut off."""
    scores = [len(t) + 100 * (not e) for t, e in zip(asked.completions, asked.ended, strict=True)]
    return Scored(np.where(np.array(scores) == 0, np.nan, np.array(scores, float)), "empty")


@contextmanager
def running(source, **options):
    server = Server(source, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_server_and_client_understand_each_other():
    seen = []

    def listening(asked):
        seen.append(asked)
        return source(asked)

    asked = Asked(["p", "q", "r"], ["a", "", "cc"], {"answer": [1, None, "3"]}, [True, True, False])
    with running(listening) as server:
        scored = make(ServiceConfig(server.url))(asked)
    np.testing.assert_array_equal(scored.score_B, [1, np.nan, 102])
    assert scored.problem == "row 1: empty"
    assert seen == [asked]


def test_reply_by_hand():
    row = {"id": "x", "prompt": "p", "completion": "abc"}
    request = {"id": "7", "rows": [row, {**row, "id": "y", "completion": ""}]}
    assert reply(json.dumps(request).encode(), source) == {
        "id": "7",
        "rewards": [{"id": "x", "reward": 3.0}, {"id": "y", "reward": None, "error": "empty"}],
    }


def test_reply_columns_that_some_rows_lack():
    seen = []

    def listening(asked):
        seen.append(dict(asked.columns))
        return source(asked)

    row = {"prompt": "p", "completion": "abc"}
    rows = [{**row, "id": "0", "columns": {"a": 1}}, {**row, "id": "1", "columns": {"b": 2}}]
    reply(json.dumps({"rows": rows}).encode(), listening)
    assert seen == [{"a": [1, None], "b": [None, 2]}]


ROW = {"id": "0", "prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "no list of rows"),
        ({"rows": []}, "no list of rows"),
        ({"rows": [1]}, r"rows\[0\]: not an object"),
        ({"rows": [ROW, {**ROW, "id": 1}]}, r"rows\[1\]\.id: not text"),
        ({"rows": [{**ROW, "completion": None}]}, r"rows\[0\]\.completion: not text"),
        ({"rows": [{**ROW, "ended": 1}]}, r"rows\[0\]\.ended"),
        ({"rows": [{**ROW, "columns": []}]}, r"rows\[0\]\.columns"),
        ({"rows": [ROW, ROW]}, "two rows with one id"),
    ],
)
def test_reply_to_a_bad_request(request_, message):
    with pytest.raises(BadRequestError, match=message):
        reply(json.dumps(request_).encode(), source)


def test_statuses(monkeypatch):
    def raising(asked):
        raise ValueError("two\nlines")

    with running(raising) as server:
        post = httpx2.Client(trust_env=False).post
        bad = post(server.url, content=b"{")
        assert (bad.status_code, "not JSON" in bad.json()["error"]) == (400, True)
        failed = post(server.url, json={"rows": [ROW]})
        assert (failed.status_code, failed.json()) == (500, {"error": "ValueError: two lines"})
        monkeypatch.setattr(server_module, "MAX_BYTES", 10)
        large = post(server.url, json={"rows": [ROW]})
        assert large.status_code == 413
        assert httpx2.get(server.url, trust_env=False).json() == {"ready": True}


def test_secret():
    asked = Asked(["p"], ["abc"], {}, [True])
    with running(source, secret="Bearer x") as server:
        assert make(ServiceConfig(server.url))(asked).problem == "HTTP 401"
        right = httpx2.post(
            server.url,
            json={"rows": [ROW]},
            headers={"Authorization": "Bearer x"},
            trust_env=False,
        )
    assert right.json()["rewards"] == [{"id": "0", "reward": 1.0}]


def test_port_that_is_taken():
    with running(source) as server, pytest.raises(InputError, match=f"port={server.server_port}"):
        Server(source, port=server.server_port)
    with pytest.raises(InputError, match="port=70000"):
        Server(source, port=70000)
