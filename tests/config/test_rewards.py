"""One line of config a source, and what does not go together in one."""

import math
from dataclasses import replace

import pytest

from jaxrlhf.config import (
    Config,
    GateConfig,
    GRPOConfig,
    IsolateConfig,
    LengthConfig,
    RewardConfig,
    ServiceConfig,
    dump,
    load,
    override,
    reward_problems,
)
from jaxrlhf.config.rewards import normalise_problems
from jaxrlhf.rewards.judge import keeps_special_tokens

URL = "http://host:8000"

TEXT = """
rewards:
  - function: sentiment
  - {function: "mine:f", isolate: {workers: 2, memory_gib: 1}}
  - {model: runs/rm, weight: 2}
  - verifier: number
  - {verifier: exact, answer: truth, isolate: {}, special_tokens: false}
  - {verifier: regex, pattern: "<think>", gate: {at_least: 1, otherwise: -1}}
  - service: {url: "http://host:8000", header_env: KEY}
  - {length: {start: 200, end: 400}, weight: 0.5}
max_excluded: 0.1
"""

REWARDS = (
    RewardConfig("sentiment"),
    RewardConfig("mine:f", isolate=IsolateConfig(workers=2, memory_gib=1.0)),
    RewardConfig(model="runs/rm", weight=2.0),
    RewardConfig(verifier="number"),
    RewardConfig(verifier="exact", answer="truth", isolate=IsolateConfig(), special_tokens=False),
    RewardConfig(verifier="regex", pattern="<think>", gate=GateConfig(1.0, -1.0)),
    RewardConfig(service=ServiceConfig(URL, header_env="KEY")),
    RewardConfig(length=LengthConfig(200, 400), weight=0.5),
)


def test_load_every_kind(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TEXT)
    config = load(path)
    assert config == Config(rewards=REWARDS, max_excluded=0.1)
    assert list(reward_problems("rewards", config.rewards)) == []
    path.write_text(dump(config))
    assert load(path) == config


def test_override_of_nested_parts():
    words = ["--rewards.6.service.retries", "7", "--rewards.1.isolate.timeout=9"]
    changed = override(Config(rewards=REWARDS), words)
    assert changed.rewards[6].service == ServiceConfig(URL, header_env="KEY", retries=7)
    assert changed.rewards[1].isolate == IsolateConfig(2, memory_gib=1.0, timeout=9.0)


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (
            RewardConfig(),
            "rewards.0: give either function or model, or one of ensemble, verifier, service",
        ),
        (RewardConfig("f", "m"), "rewards.0: function and model are both given: make them two"),
        (
            RewardConfig("f", length=LengthConfig(1, 2)),
            "rewards.0: function and length are both given",
        ),
        (RewardConfig(model="m", isolate=IsolateConfig()), "rewards.0.isolate={…}: a model does"),
        (RewardConfig("f", answer="a"), "rewards.0.answer='a': a function does not read it"),
        (RewardConfig("f", pattern="a"), "rewards.0.pattern='a': a function does not read it"),
        (
            RewardConfig(verifier="exact", pattern="a"),
            "rewards.0.pattern='a': only verifier: regex reads it",
        ),
        (
            RewardConfig(verifier="regex", pattern="a", answer="b"),
            "rewards.0.answer=b: the pattern stands in its place",
        ),
        (
            RewardConfig(model="m", special_tokens=True),
            "rewards.0.special_tokens=True: a model does not read it",
        ),
        (
            RewardConfig(length=LengthConfig(1, 2), special_tokens=False),
            "rewards.0.special_tokens=False: a length does not read it",
        ),
        (RewardConfig("f", weight=math.inf), "rewards.0.weight=inf: give a finite number"),
        (RewardConfig("f", weight=2, gate=GateConfig(1)), "rewards.0.weight=2: a gate is no part"),
        (RewardConfig("f", gate=GateConfig(math.nan)), "rewards.0.gate.at_least=nan: give a fin"),
        (RewardConfig("f", gate=GateConfig(1)), "rewards: all of them are gates"),
        (RewardConfig(length=LengthConfig(2, 2)), "rewards.0.length: start=2, end=2: must be 0"),
        (RewardConfig(length=LengthConfig(-1, 2)), "rewards.0.length: start=-1"),
        (RewardConfig(ensemble=("a",)), "rewards.0.ensemble: one member"),
        (RewardConfig(ensemble=("a", "b", "./a/")), "rewards.0.ensemble: a is given twice: give"),
        (RewardConfig(service=ServiceConfig("host:8000")), "rewards.0.service.url='host:8000': m"),
        (RewardConfig(service=ServiceConfig("ftp://a")), "rewards.0.service.url='ftp://a': must"),
        (RewardConfig(service=ServiceConfig("http://:8")), "rewards.0.service.url='http://:8': m"),
        (RewardConfig(service=ServiceConfig("http://[a")), "rewards.0.service.url: no URL, or no"),
        (RewardConfig(service=ServiceConfig(URL, timeout=0)), "rewards.0.service.timeout=0: must"),
        (
            RewardConfig(service=ServiceConfig(URL, retries=-1)),
            "rewards.0.service.retries=-1: must be at least 0",
        ),
        (RewardConfig(service=ServiceConfig(URL, header="")), "rewards.0.service.header: empty"),
        (
            RewardConfig("f", isolate=IsolateConfig(workers=0)),
            "rewards.0.isolate.workers=0: must be above 0",
        ),
        (RewardConfig("f", timeout=0), "rewards.0.timeout=0: must be above 0"),
        (
            RewardConfig("f", timeout=9, isolate=IsolateConfig()),
            "rewards.0.timeout=9: with isolate, set isolate.timeout instead",
        ),
        (
            RewardConfig("f", timeout=9, in_process=True),
            "rewards.0.timeout=9: with in_process, set distributed.watchdog instead",
        ),
        (
            RewardConfig("f", isolate=IsolateConfig(), in_process=True),
            "rewards.0: isolate and in_process are both given: leave one out",
        ),
        (RewardConfig(model="m", in_process=True), "rewards.0.in_process=True: a model does not"),
    ],
)
def test_reward_problems(reward, problem):
    first, *_ = reward_problems("rewards", [reward])
    assert first.startswith(problem)
    assert "\n" not in first


@pytest.mark.parametrize(
    ("changes", "source", "problem"),
    [
        ({}, RewardConfig("g", gate=GateConfig(1)), "rewards.1.gate: algorithm.normalise=each"),
        ({"missing_eos_penalty": 1.0}, None, "algorithm.missing_eos_penalty=1: algorithm.normal"),
        ({"overlong_buffer": 4}, None, "algorithm.overlong_buffer=4: algorithm.normalise=each"),
        ({"kl_in": "reward"}, None, "algorithm.kl_coef=0.04: algorithm.normalise=each"),
        ({"kl_in": "reward", "kl_coef": 0.0}, None, None),
        ({}, None, None),
    ],
)
def test_normalise_each_has_no_place_for_what_changes_the_sum(changes, source, problem):
    rewards = (RewardConfig("f"), *([source] if source else []))
    algorithm = GRPOConfig(normalise="each", **changes)
    found = list(normalise_problems(algorithm, rewards))
    assert [text.startswith(problem) for text in found] == [True] * (problem is not None)
    assert list(normalise_problems(replace(algorithm, normalise="sum"), rewards)) == []


def test_special_tokens_are_kept_for_verifiers_unless_told_otherwise():
    for source, kept in ((RewardConfig("f"), False), (RewardConfig(verifier="exact"), True)):
        assert keeps_special_tokens(source) == kept
        assert keeps_special_tokens(replace(source, special_tokens=not kept)) == (not kept)
    words = ["--rewards.6.special-tokens", "True"]
    assert override(Config(rewards=REWARDS), words).rewards[6].special_tokens is True


@pytest.mark.parametrize("url", ["http://me:secret@host:8000/a", "https://secret@host"])
def test_reward_problems_of_a_url_with_a_secret(url):
    (problem,) = reward_problems("rewards", [RewardConfig(service=ServiceConfig(url))])
    assert problem.startswith("rewards.0.service.url: a name or password stands before the host")
    assert "header_env" in problem
    assert "secret" not in problem
