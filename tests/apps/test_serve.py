"""The server of rewards: what it answers by the protocol, to whom, and that a served reward model
says what it says in a run."""

import json

import httpx2
import numpy as np
import pytest
import runs
from servers import running

from jaxrlhf.apps import cli, listener
from jaxrlhf.apps.listener import BadRequestError, Server, reply
from jaxrlhf.apps.serve import model_source, serve
from jaxrlhf.config import ServiceConfig, save
from jaxrlhf.core.errors import InputError
from jaxrlhf.models.load import load_model
from jaxrlhf.rewards import models
from jaxrlhf.rewards.functions import Asked, Scored, call
from jaxrlhf.rewards.service import make
from jaxrlhf.run import loop
from jaxrlhf.steps.score import reward


def source(asked):
    """Characters; none for an empty completion, and 100 more where it was cut off."""
    scores = [len(t) + 100 * (not e) for t, e in zip(asked.completions, asked.ended, strict=True)]
    return Scored(np.where(np.array(scores) == 0, np.nan, np.array(scores, float)), "empty")


def test_server_and_client_understand_each_other():
    seen = []

    def listening(asked):
        seen.append(asked)
        return source(asked)

    asked = Asked(["p", "q", "r"], ["a", "", "cc"], {"answer": [1, None, "3"]}, [True, True, False])
    with running(Server(listening)) as server:
        scored = make(ServiceConfig(server.url))(asked)
    np.testing.assert_array_equal(scored.score_B, [1, np.nan, 102])
    assert scored.problem == "row 1: empty"
    assert seen == [asked]


def test_server_says_what_does_not_apply_and_what_failed():
    """A function behind a server is to its client as it is without one."""

    def ask(asked):
        return call("own", lambda *_: [None, 1.0, "much"], asked.prompts, asked.completions, {})

    asked = Asked(["p"] * 3, ["a", "b", "c"], {}, [True] * 3)
    with running(Server(ask)) as server:
        scored = make(ServiceConfig(server.url))(asked)
    np.testing.assert_array_equal(scored.score_B, [np.nan, 1, np.nan])
    np.testing.assert_array_equal(scored.applies(), [False, True, True])
    assert scored.problem == "row 2: no finite score"


def test_reply_by_hand():
    """A column that some rows lack is None there; a row without a score says why."""
    seen = []

    def listening(asked):
        seen.append(dict(asked.columns))
        return source(asked)

    row = {"id": "x", "prompt": "p", "completion": "abc", "columns": {"a": 1}}
    rows = [row, {**row, "id": "y", "completion": "", "columns": {"b": 2}}]
    assert reply(json.dumps({"id": "7", "rows": rows}).encode(), listening) == {
        "id": "7",
        "rewards": [{"id": "x", "reward": 3.0}, {"id": "y", "reward": None, "error": "empty"}],
    }
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

    with running(Server(raising)) as server:
        post = httpx2.Client(trust_env=False).post
        bad = post(server.url, content=b"{")
        assert (bad.status_code, "not JSON" in bad.json()["error"]) == (400, True)
        failed = post(server.url, json={"rows": [ROW]})
        assert (failed.status_code, failed.json()) == (500, {"error": "ValueError: two lines"})
        monkeypatch.setattr(listener, "MAX_BYTES", 10)
        large = post(server.url, json={"rows": [ROW]})
        assert large.status_code == 413
        assert httpx2.get(server.url, trust_env=False).json() == {"ready": True}


def test_secret():
    asked = Asked(["p"], ["abc"], {}, [True])
    with running(Server(source, secret="Bearer x")) as server:
        assert make(ServiceConfig(server.url))(asked).problem == "HTTP 401"
        post = httpx2.Client(trust_env=False).post
        right = post(server.url, json={"rows": [ROW]}, headers={"Authorization": "Bearer x"})
    assert right.json()["rewards"] == [{"id": "0", "reward": 1.0}]


def test_port_that_is_taken():
    with running(Server(source)) as server:
        port = server.server_port
        with pytest.raises(InputError, match=f"port={port}"):
            Server(source, port=port)
    with pytest.raises(InputError, match="port=70000"):
        Server(source, port=70000)


PROMPTS = ["the", "good bad", "the", "kind", "the"]
TEXTS = ["nice and warm", "bad", "dark", "", "the " * 20]
ASKED = Asked(PROMPTS, TEXTS, {}, [True, True, False, True, True])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = runs.reward_model(tmp_path_factory.mktemp("rm"), steps=1)
    loop.train(config, runs.one_device())
    return config.output


def alone(folder, prompt, completion, ended):
    """The score of one row, unpadded."""
    model, params, tokenizer = load_model(folder, runs.one_device())
    ids = tokenizer.encode(f"{prompt} {completion}") + [tokenizer.eos_token_id] * ended
    return float(reward(model, params, np.array([ids]), np.ones((1, len(ids)), np.int32))[0])


def test_model_source_scores_rows_as_they_are_alone(folder):
    rows = zip(PROMPTS[:4], TEXTS, ASKED.ended, strict=False)
    expected = [alone(folder, *row) for row in rows]
    for batch_size in (2, 8):
        scored = model_source(folder, batch_size)(ASKED)
        np.testing.assert_allclose(scored.score_B[:4], expected, rtol=1e-5)
        assert np.isnan(scored.score_B[4])
        assert scored.problem == "22 tokens, and the reward model reads max_tokens=8"
    assert len(set(expected)) == 4


def test_model_source_splits_no_text_that_cannot_fit(folder):
    scored = model_source(folder, 2)(Asked(["the"], ["x" * 1_000_000], {}, [True]))
    assert np.isnan(scored.score_B).all()
    assert scored.problem == "1000003 characters, and the reward model reads max_tokens=8"


def test_model_source_compiles_once(folder, monkeypatch):
    traced = runs.count_traces(monkeypatch, models, _reward=0)
    ask = model_source(folder, 4)
    for count in (1, 2, 3):
        ask(Asked(PROMPTS[:count], TEXTS[:count], {}, [True] * count))
    assert traced == ["_reward"]


def test_serve_model(folder, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "Bearer x")
    with running(serve(folder, port=0, batch_size=4, header_env="REWARD_KEY")) as server:
        config = ServiceConfig(server.url, header_env="REWARD_KEY", batch_size=2)
        scored = make(config)(ASKED)
    np.testing.assert_array_equal(scored.score_B, model_source(folder, 4)(ASKED).score_B)


def test_serve_function():
    with serve("jaxrlhf.data.words:goodness", port=0) as server:
        np.testing.assert_allclose(server.source(ASKED).score_B, [2 / 3, -1, -1, 0, 0])


def test_serve_function_of_others_has_the_devices_and_no_hold_on_the_server(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "import os\n"
        "def f(prompts, completions, **_):\n"
        "    if 'exit' in completions: os._exit(0)\n"
        "    return [float(os.environ['JAX_PLATFORMS'] == 'mine')] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "mine")
    with serve("theirs:f", port=0) as server:
        with pytest.raises(InputError, match=r"'theirs:f' ended its process \(status 0\)"):
            server.source(Asked(["p"], ["exit"], {}, [True]))
        np.testing.assert_array_equal(server.source(ASKED).score_B, 1)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("sentiment", {"concurrency": 0}, "concurrency=0: must be at least 1"),
        ("sentiment", {"concurrency": -1}, "concurrency=-1: must be at least 1"),
        ("sentiment", {"batch_size": 0}, "batch_size=0: must be at least 1"),
        ("sentiment", {"max_tokens": 0}, "max_tokens=0: must be at least 2"),
        ("runs/nowhere", {}, "'runs/nowhere': no file or folder here"),
        ("sentiment", {"header_env": "REWARD_KEY"}, "header_env=REWARD_KEY: .* unset"),
    ],
)
def test_serve_bad_input(what, options, message, monkeypatch):
    monkeypatch.delenv("REWARD_KEY", raising=False)
    with pytest.raises(InputError, match=message):
        serve(what, port=0, **options)


def test_serve_refuses_rows_longer_than_the_context(folder, monkeypatch):
    monkeypatch.setattr("jaxrlhf.apps.serve.load_scorer", None)  # weights are not read for it
    with pytest.raises(InputError, match=r"max_tokens=65: exceed the context of .*, 64: lower it"):
        serve(folder, port=0, max_tokens=65)


def test_serve_another_kind_of_run(tmp_path, capsys):
    save(runs.sft(tmp_path), tmp_path / "config.yaml")
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "a run of sft: give the folder of a reward-model run" in capsys.readouterr().err
