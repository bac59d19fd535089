"""A served reward model says what it says in a run."""

import threading

import numpy as np
import pytest
import runs
from test_loop import one_device

from jaxrlhf.apps import cli
from jaxrlhf.apps.serve import model_source, serve
from jaxrlhf.config import ServiceConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.models.load import load_model
from jaxrlhf.rewards import models as scorers
from jaxrlhf.rewards import service
from jaxrlhf.rewards.functions import Asked
from jaxrlhf.run import loop
from jaxrlhf.steps.score import reward

PROMPTS = ["the", "good bad", "the", "kind", "the"]
TEXTS = ["nice and warm", "bad", "dark", "", "the " * 20]
ASKED = Asked(PROMPTS, TEXTS, {}, [True, True, False, True, True])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = runs.reward_model(tmp_path_factory.mktemp("rm"), steps=1)
    loop.train(config, one_device())
    return config.output


def alone(folder, prompt, completion, ended):
    """The score of one row, unpadded."""
    model, params, tokenizer = load_model(folder, one_device())
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


def test_model_source_compiles_once(folder, monkeypatch):
    traced = runs.count_traces(monkeypatch, scorers, _reward=0)
    ask = model_source(folder, 4)
    for count in (1, 2, 3):
        ask(Asked(PROMPTS[:count], TEXTS[:count], {}, [True] * count))
    assert traced == ["_reward"]


def test_serve_model(folder, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "Bearer x")
    with serve(folder, port=0, batch_size=4, header_env="REWARD_KEY") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        config = ServiceConfig(server.url, header_env="REWARD_KEY", batch_size=2)
        scored = service.make(config)(ASKED)
        server.shutdown()
        thread.join()
    np.testing.assert_array_equal(scored.score_B, model_source(folder, 4)(ASKED).score_B)


def test_serve_function():
    with serve("jaxrlhf.data.words:goodness", port=0) as server:
        np.testing.assert_allclose(server.source(ASKED).score_B, [2 / 3, -1, -1, 0, 0])


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("sentiment", {"concurrency": 0}, "concurrency=0: must be at least 1"),
        ("sentiment", {"concurrency": -1}, "concurrency=-1: must be at least 1"),
        ("sentiment", {"batch_size": 0}, "batch_size=0: must be at least 1"),
        ("sentiment", {"max_tokens": 0}, "max_tokens=0: must be at least 2"),
        ("runs/nowhere", {}, "reward function 'runs/nowhere' is unknown"),
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
    config = runs.sft(tmp_path, steps=1)
    loop.train(config, one_device())
    assert cli.main(["serve", config.output]) == 2
    assert "a run of sft: give the folder of a reward-model run" in capsys.readouterr().err
