"""Rewards of several tasks in one run, each for its own rows, and rewards normalised one by one."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import runs
from runs import one_device

from jaxrlhf.config import (
    Config,
    DAPOConfig,
    GRPOConfig,
    IsolateConfig,
    LengthConfig,
    RewardConfig,
    SampleConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import Prompt
from jaxrlhf.models.load import Loader
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.rewards import judge as judging
from jaxrlhf.rewards.functions import Asked, Scored
from jaxrlhf.rewards.judge import Judgement, Reward, ask_together, make_judge, measures
from jaxrlhf.run import loop

nan = math.nan


def judge(*configs, **options):
    tokenizer = load_tokenizer(f"words:{runs.WORDS}")
    return make_judge(configs, Loader(one_device()), tokenizer, 16, "rewards", **options)


def ones(prompts, completions, kind, **_):
    """1.0 for kind a, and nothing to say of the rest."""
    return [1.0 if of == "a" else None for of in kind]


def twos(prompts, completions, kind, **_):
    """2.0 for kind b, and nothing to say of the rest."""
    return [2.0 if of == "b" else None for of in kind]


def some(prompts, completions, kind, **_):
    """Kind a: 0.5, and a failure for "bad". Kind b: 1.0 for one text, None for the rest."""
    a, b = {"bad": "?"}, {"good and good": 1.0}
    pairs = zip(kind, completions, strict=True)
    return [b.get(text) if of == "b" else a.get(text, 0.5) for of, text in pairs]


ONES, TWOS, SOME = (
    RewardConfig(function=f"test_several_rewards:{n}", in_process=True)
    for n in ("ones", "twos", "some")
)
KINDS = [Prompt("the", {"kind": "a"}, "f:1"), Prompt("and", {"kind": "b"}, "f:2")]


@pytest.mark.parametrize("isolate", [None, IsolateConfig()])
def test_judge_source_that_does_not_apply_leaves_the_row_to_the_others(rollout, isolate):
    configs = [replace(source, isolate=isolate, in_process=not isolate) for source in (ONES, TWOS)]
    judgement = judge(*configs)(rollout, KINDS)
    np.testing.assert_array_equal(judgement.reward_B, [1, 1, 2, 2])
    assert judgement.valid_B.all()
    ones, twos = (f"test_several_rewards:{name}" for name in ("ones", "twos"))
    assert measures(judgement) == {
        "reward/excluded": 0.0,
        **{f"applies/{name}": 0.5 for name in (ones, twos)},
        **{f"excluded/{name}": 0.0 for name in (ones, twos)},
        **{f"reward/{ones}": 1.0, f"reward/{twos}": 2.0},
    }


def test_judge_source_that_fails_leaves_the_row_none(rollout):
    """Rows: .5 and 1; failed and 1; 1 and none; none and none."""
    judgement = judge(SOME, replace(ONES, weight=3.0), max_excluded=0.5)(rollout, KINDS)
    np.testing.assert_array_equal(judgement.reward_B, [3.5, nan, 1, nan])
    measured = measures(judgement)
    assert measured["reward/excluded"] == 0.5
    assert measured[f"applies/{SOME.function}"] == 0.75
    assert measured[f"excluded/{SOME.function}"] == pytest.approx(1 / 3)
    assert measured[f"reward/{SOME.function}"] == 0.75
    message = r"some has none for 1; to 1 no source of the sum applies: mend the source"
    with pytest.raises(InputError, match=message):
        judge(SOME, ONES, max_excluded=0.25)(rollout, KINDS)


def test_judge_measures_of_a_source_that_never_applies(rollout):
    prompts = [replace(prompt, columns={"kind": "c"}) for prompt in KINDS]
    judgement = judge(ONES)(rollout, prompts)
    assert not judgement.valid_B.any()
    measured = measures(judgement)
    assert math.isnan(measured[f"reward/{ONES.function}"])
    assert measured[f"applies/{ONES.function}"] == measured[f"excluded/{ONES.function}"] == 0
    assert measured["reward/excluded"] == 1


def test_ask_together_carries_what_does_not_apply_from_one_process_to_the_others(monkeypatch):
    """Two processes, one after the other; what they would exchange is added up here."""
    asked = Asked(["p"] * 4, list("abcd"), {}, [True] * 4)
    said = {"a": None, "b": 1.0, "c": math.nan, "d": None}
    sent = []

    def assemble(part_R, rows, count):
        sent.append(np.zeros(count))
        sent[-1][rows] = part_R
        return sent[-1]

    monkeypatch.setattr(judging, "assemble", assemble)
    for process in range(2):
        monkeypatch.setattr(judging, "own_share", lambda n, p=process: slice(p, p + 1))
        ask_together(lambda own: Scored.of([said[x] for x in own.completions]), asked, 2)
    whole = [sum(sent[start::2]) for start in range(2)]
    monkeypatch.setattr(judging, "assemble", lambda *_: whole.pop(0))
    scored = ask_together(lambda own: Scored.of([1.0] * len(own)), asked, 2)
    np.testing.assert_array_equal(scored.score_B, [nan, 1, nan, nan])
    np.testing.assert_array_equal(scored.applies(), [False, True, True, False])


def by_kind(folder, kinds):
    path = folder / "prompts.jsonl"
    rows = [{"prompt": "the", "kind": kind} for kind in kinds]
    return runs.write(path, rows)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_run_learns_from_every_row_of_two_tasks(tmp_path, name):
    config = runs.of(name, tmp_path, rewards=(ONES, TWOS, runs.GOODNESS), steps=2)
    data = replace(config.data, train=by_kind(tmp_path, "abab" * 4))
    data = replace(data, eval=data.train)
    loop.train(replace(config, data=data, max_excluded=0.0), one_device())
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in lines if "valid" in row):
        assert row["valid"] == 1
        assert row[f"reward/{ONES.function}"] == 1
        assert row[f"reward/{TWOS.function}"] == 2
        assert row[f"applies/{ONES.function}"] + row[f"applies/{TWOS.function}"] == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert math.isfinite(summary["proxy_after"])


def test_run_to_whose_rows_nothing_applies_stops(tmp_path):
    config = runs.of("grpo", tmp_path, rewards=(ONES, TWOS))
    data = replace(config.data, train=by_kind(tmp_path, "cccc" * 4))
    with pytest.raises(InputError, match="no usable reward for any completion"):
        loop.train(replace(config, data=data, max_excluded=1.0), one_device())


def test_scores_of_all_sources(rollout):
    """Rows as the devices have them, from the host or not."""
    short, long = (RewardConfig(length=LengthConfig(1, n), weight=0.5) for n in (3, 5))
    wanted = np.array([[-0.5, -0.25], [-0.5, -0.25], [-1, -0.5], [0, 0]])
    made = judge(short, long)
    score_BS, weight_S = made.scores(made(rollout, KINDS))
    np.testing.assert_allclose(score_BS, wanted)
    np.testing.assert_array_equal(weight_S, [0.5, 0.5])
    made = judge(short, replace(ONES, weight=3.0))
    score_BS, weight_S = made.scores(made(rollout, KINDS))
    np.testing.assert_allclose(score_BS, np.stack([wanted[:, 0], [1, 1, np.nan, np.nan]], 1))
    np.testing.assert_array_equal(weight_S, [0.5, 3])


@pytest.mark.parametrize("kind", [GRPOConfig, DAPOConfig])
def test_run_of_rewards_that_are_normalised_each(tmp_path, kind):
    """Goodness less itself: each sum is 0, and there is nothing to learn. Half of it is left over
    where it is weighed less, and each is normalised."""
    seen = {}
    for name, weight in (("sum", -1.0), ("each", -0.5)):
        (tmp_path / name).mkdir()
        rewards = (runs.GOODNESS, replace(runs.GOODNESS, weight=weight))
        config = runs.of(kind.name, tmp_path / name, rewards=rewards, steps=1)
        loop.train(replace(config, algorithm=kind(normalise=name)), one_device())
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        seen[name] = json.loads(lines[0])
    assert seen["sum"]["groups_without_signal"] == 1
    assert seen["each"]["groups_without_signal"] < 1
    if kind is DAPOConfig:
        assert seen["sum"]["rounds"] == 4
        assert seen["each"]["rounds"] < 4


def test_signal_of_rewards_that_are_normalised_each():
    """Equal sums, in groups where one reward differs, none does, and one of weight 0 does."""
    parts = {"a": np.array([1, 0, 1, 1, 1, 1.0]), "b": np.array([0, 1, 0, np.nan, 0, 0])}
    parts["c"] = np.array([0, 0, 0, 0, 5, 0.0])
    weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    sources = [Reward(name, weight, None, None) for name, weight in weights.items()]
    judged = Judgement(np.ones(6), np.ones(6, bool), parts)
    for normalise, signal in (("sum", [False] * 3), ("each", [True, False, False])):
        config = Config(algorithm=DAPOConfig(normalise=normalise), sample=SampleConfig(n=2))
        run = SimpleNamespace(config=config, judge=SimpleNamespace(sources=sources))
        np.testing.assert_array_equal(loop.signal_of(run, judged), signal)
