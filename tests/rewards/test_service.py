"""Whatever a service does, a row has the number that was given for it, or none."""

import asyncio
import json
import math
import random
import threading

import numpy as np
import pytest
from servers import fails, honest, length, say, service

from jaxrlhf.config import ServiceConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.functions import Asked
from jaxrlhf.rewards.service import NoAnswerError, make, question, read_answer

TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def asked(texts=TEXTS, **columns):
    return Asked([f"p{i}" for i in range(len(texts))], texts, columns, [True] * len(texts))


def ask(url, rows=None, **options):
    config = ServiceConfig(url, **{"timeout": 10.0, "backoff": 0.001, **options})
    return make(config)(asked() if rows is None else rows)


def test_rows_arrive_whole_and_come_back_in_their_places():
    with service(honest) as server:
        scored = ask(server.url, asked(answer=["1", None, "3", 4, [5]]), batch_size=2)
    np.testing.assert_array_equal(scored.score_B, [1, 2, 3, 4, 5])
    assert scored.problem == ""
    requests = sorted((body for _, body in server.seen), key=lambda body: body["id"])
    assert [len(body["rows"]) for body in requests] == [2, 2, 1]
    assert requests[1]["rows"][1] == {
        "id": "1",
        "prompt": "p3",
        "completion": "dddd",
        "ended": True,
        "columns": {"answer": 4},
    }


def test_requests_that_overtake_each_other():
    """The first request is answered only after the second is; and their rows are out of order."""
    second = threading.Event()

    def behave(handler, request):
        if request["rows"][0]["completion"] == "a":
            assert second.wait(10)
        rewards = [{"id": row["id"], "reward": length(row)} for row in request["rows"]]
        say(handler, {"rewards": rewards[::-1]})
        second.set()

    with service(behave) as server:
        scored = ask(server.url, batch_size=3, concurrency=2)
    np.testing.assert_array_equal(scored.score_B, [1, 2, 3, 4, 5])


NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "scores", "problem"),
    [
        ([["0", "1"], ["1", 2], ["2", 3]], [NAN, 2, 3], "row 0: reward='1'"),
        ([["0", True], ["1", 2], ["2", 3]], [NAN, 2, 3], "row 0: reward=True"),
        ([["0", NAN], ["1", math.inf], ["2", -math.inf]], [NAN] * 3, "row 2: reward=-inf"),
        ([["0", 10**400], ["1", [2]], ["2", {}]], [NAN] * 3, "row 2: reward={}"),
        ([["0", 1], ["2", 3]], [1, NAN, 3], "row 1 has no reward"),
        ([["0", 1], ["1", 2], ["2", 3], ["1", 2]], [1, NAN, 3], "row 1 has several rewards"),
        ([["0", 1], ["1", 2], ["2", 3], ["3", 4]], [1, 2, 3], "a reward for an unknown row: {"),
        ([[0, 1], [True, 2], [None, 3]], [NAN] * 3, "row 0 has no reward"),
        ([], [NAN] * 3, "row 0 has no reward"),
    ],
)
def test_read_answer_row_by_row(rewards, scores, problem):
    items = [{"id": key, "reward": reward} for key, reward in rewards]
    scored = read_answer(json.dumps({"id": "7", "rewards": items}).encode(), "7", 3)
    np.testing.assert_array_equal(scored.score_B, scores)
    assert scored.problem.startswith(problem)


@pytest.mark.parametrize(
    ("item", "applies", "problem"),
    [
        ({"reward": None}, False, ""),
        ({"reward": None, "error": None}, False, ""),
        ({"reward": None, "error": "too long"}, True, "row 0: too long"),
        ({"reward": None, "error": ""}, True, "row 0: reward=None"),
        ({}, True, "row 0: reward=None"),
        ({"reward": "much"}, True, "row 0: reward='much'"),
    ],
)
def test_read_answer_null_does_not_apply_unless_there_is_an_error(item, applies, problem):
    rewards = [{"id": "0", **item}, {"id": "1", "reward": 2}]
    scored = read_answer(json.dumps({"rewards": rewards}).encode(), "7", 2)
    np.testing.assert_array_equal(scored.score_B, [NAN, 2])
    np.testing.assert_array_equal(scored.applies(), [applies, True])
    assert scored.problem == problem


def test_read_answer_of_a_null_twice_or_not_at_all_fails():
    rewards = [{"id": "0", "reward": None}] * 2
    scored = read_answer(json.dumps({"rewards": rewards}).encode(), "7", 2)
    assert np.isnan(scored.score_B).all()
    assert scored.applies().all()


def test_read_answer_passes_over_what_is_no_row_and_says_what_the_server_says():
    body = b'{"rewards": [1, null, [], {"id": [0]}, {"id": "0", "reward": 2}]}'
    np.testing.assert_array_equal(read_answer(body, "7", 1).score_B, [2])
    body = b'{"rewards": [{"id": "0", "reward": null, "error": "too\\nlong"}]}'
    assert read_answer(body, "7", 1).problem == "row 0: too long"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
        (b"[1]", "without a list of rewards"),
        (b"{}", "without a list of rewards"),
        (b'{"rewards": {"0": 1}}', "without a list of rewards"),
        (b'{"id": "8", "rewards": []}', "to another request: id='8'"),
        (b'{"id": null, "rewards": []}', "to another request"),
    ],
)
def test_read_answer_that_is_none(body, message):
    with pytest.raises(NoAnswerError, match=message) as error:
        read_answer(body, "7", 1)
    assert not error.value.final


def not_json(handler, request):
    say(handler, b"<html>")


def hangs(handler, request):
    handler.server.over.wait(20)


def drips(handler, request):
    """A byte now and then: no read ever waits for long, but the answer never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b" ")


def floods(handler, request):
    """A gigabyte, if the client takes it."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(2**30))
    handler.end_headers()
    for _ in range(2**10):
        handler.wfile.write(bytes(2**20))
        handler.server.sent += 2**20


def hangs_up(handler, request):
    handler.connection.close()
    handler.close_connection = True


@pytest.mark.parametrize(
    ("behave", "problem", "attempts"),
    [
        (fails, "HTTP 500", 3),
        (not_json, "an answer that is not JSON: b'<html>'", 3),
        (hangs, "no answer within timeout=0.5 s", 3),
        (drips, "no answer within timeout=0.5 s", 3),
        (floods, "an answer of more than max_bytes=1000000", 3),
        (hangs_up, "RemoteProtocolError", 3),
        (lambda handler, _: say(handler, b"", status=401), "HTTP 401", 1),
        (lambda handler, _: say(handler, b"", status=302), "HTTP 302", 1),
        (lambda handler, _: say(handler, b"", status=429), "HTTP 429", 3),
    ],
    ids=["500", "not json", "hangs", "drips", "floods", "hangs up", "401", "302", "429"],
)
def test_request_that_fails_loses_its_rows_after_bounded_attempts(behave, problem, attempts):
    timeout = 0.5 if behave in (hangs, drips) else 10.0
    with service(behave) as server:
        server.over, server.sent = threading.Event(), 0
        scored = ask(server.url, retries=2, timeout=timeout, max_bytes=1_000_000)
        server.over.set()
    assert np.isnan(scored.score_B).all()
    assert scored.problem.startswith(problem)
    assert len(server.seen) == attempts
    assert len({body["id"] for _, body in server.seen}) == 1
    assert server.sent < 2**28


def test_connection_that_is_refused():
    with service(honest) as server:
        url = server.url
    scored = ask(url, retries=1)
    assert np.isnan(scored.score_B).all()
    assert scored.problem.startswith("ConnectError")


@pytest.mark.parametrize(
    ("well_again", "scores", "problem"),
    [(math.inf, [1, 2, NAN, NAN, 5], "HTTP 500"), (4, [1, 2, 3, 4, 5], "")],
)
def test_only_the_rows_of_the_request_that_fails_are_lost(well_again, scores, problem):
    """And none where it recovers."""

    def behave(handler, request):
        bad = any(row["completion"] == "ccc" for row in request["rows"])
        (fails if bad and len(handler.server.seen) < well_again else honest)(handler, request)

    with service(behave) as server:
        scored = ask(server.url, batch_size=2, retries=2, concurrency=1)
    np.testing.assert_array_equal(scored.score_B, scores)
    assert scored.problem == problem


def test_pauses_double_and_are_bounded_and_drawn_by_the_request(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with service(fails) as server:
        for _ in range(2):
            ask(server.url, retries=7, backoff=1.0)
    drawn = np.array(pauses).reshape(2, 7)
    most = np.array([1, 2, 4, 8, 16, 30, 30])
    assert ((drawn <= most) & (drawn >= most / 2)).all()
    names = list(dict.fromkeys(body["id"] for _, body in server.seen))
    for name, pause in zip(names, drawn, strict=True):
        draws = random.Random(name)
        np.testing.assert_allclose(pause, most * [draws.uniform(0.5, 1.0) for _ in most])


def test_ids_are_never_used_again():
    """Two sources, as of two runs; a server that remembers answers by id must not mix them up."""
    with service(honest) as server:
        for _ in range(2):
            source = make(ServiceConfig(server.url, batch_size=3))
            for _ in range(2):
                source(asked())
    assert len({body["id"] for _, body in server.seen}) == len(server.seen) == 8


def test_concurrency_is_bounded():
    under_way, most = set(), []
    changing = threading.Lock()

    def behave(handler, request):
        with changing:
            under_way.add(request["id"])
            most.append(len(under_way))
        threading.Event().wait(0.02)
        with changing:
            under_way.discard(request["id"])
        honest(handler, request)

    with service(behave) as server:
        scored = ask(server.url, batch_size=1, concurrency=2)
    np.testing.assert_array_equal(scored.score_B, [1, 2, 3, 4, 5])
    assert max(most) <= 2


def test_header_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "Bearer secret")
    with service(honest) as server:
        ask(server.url, header_env="REWARD_KEY")
        ask(server.url, header_env="REWARD_KEY", header="X-Key")
        ask(server.url)
    headers = [header for header, _ in server.seen]
    assert headers[0]["Authorization"] == "Bearer secret"
    assert headers[1]["X-Key"] == "Bearer secret"
    assert "Authorization" not in headers[1] | headers[2]


def test_secret_that_a_service_says_back_is_not_shown(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "Bearer abc-secret")

    def tells(handler, request):
        error = f"no {handler.headers['Authorization']}, nor abc-secret"
        say(handler, {"rewards": [{"id": row["id"], "error": error} for row in request["rows"]]})

    with service(tells) as server:
        assert ask(server.url, header_env="REWARD_KEY").problem == "row 4: no …, nor …"
    with service(lambda handler, _: say(handler, b"abc-secret, no JSON")) as server:
        problem = ask(server.url, header_env="REWARD_KEY", retries=0).problem
        assert problem == "an answer that is not JSON: b'…, no JSON'"


@pytest.mark.parametrize(
    ("value", "what"), [(None, "unset"), ("", "unset"), ("a\nb", "not print"), ("é", "not print")]
)
def test_header_that_cannot_be_sent(value, what, monkeypatch):
    monkeypatch.delenv("REWARD_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("REWARD_KEY", value)
    with pytest.raises(InputError, match=f"header_env=REWARD_KEY: .* is {what}"):
        make(ServiceConfig("http://127.0.0.1:1", header_env="REWARD_KEY"))


def test_question_with_a_number_that_json_has_not():
    with pytest.raises(InputError, match="a column of the data holds NaN"):
        question(asked(["a"], gap=[NAN]), "0")


def test_make_works_inside_an_event_loop_and_reads_no_proxies(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    async def inside(url):
        return ask(url)

    with service(honest) as server:
        scored = asyncio.run(inside(server.url))
    np.testing.assert_array_equal(scored.score_B, [1, 2, 3, 4, 5])
