"""Sources as a config lists them, asked once a row, summed behind gates; rows without a reward."""

import json
import math
import traceback
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import one_device
from servers import fails, honest, say, service

from jaxrlhf.config import (
    GateConfig,
    IsolateConfig,
    LengthConfig,
    RewardConfig,
    SampleConfig,
    ServiceConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Rollout
from jaxrlhf.data.formats import Prompt
from jaxrlhf.data.words import goodness
from jaxrlhf.models.load import Loader
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.rewards.functions import Scored
from jaxrlhf.rewards.judge import (
    Judge,
    Reward,
    check_truths,
    combine,
    fold,
    length_penalty,
    load_rewards,
    make_judge,
    measures,
)
from jaxrlhf.run import loop

TOKENIZER = f"words:{runs.WORDS}"
PROMPTS = [Prompt("the", {"answer": "good"}, "f:1"), Prompt("and", {}, "f:2")]
TEXTS = ["good", "bad", "good and good", ""]


def judge(*configs, **options):
    tokenizer = load_tokenizer(TOKENIZER)
    return make_judge(configs, Loader(one_device()), tokenizer, 16, "rewards", **options)


def told(score_B, problem="", **changes):
    """A judge whose one source says so."""
    source = Reward("told", 1.0, None, lambda _: Scored(np.array(score_B, float), problem))
    return Judge((source,), (None,), load_tokenizer(TOKENIZER), one_device(), **changes)


def test_judge_asks_for_text_columns_and_ends(rollout):
    seen = []

    def ask(asked):
        seen.append(asked)
        return Scored(np.ones(4))

    made = told([])
    made = replace(made, sources=(replace(made.sources[0], ask=ask),))
    made(rollout, PROMPTS)
    (asked,) = seen
    assert asked.prompts == ["the", "the", "and", "and"]
    assert asked.completions == TEXTS
    assert asked.columns == {"answer": ["good", "good", None, None]}
    assert asked.ended == [True, True, False, True]


def test_judge_sums_behind_a_gate_by_hand(rollout):
    """goodness 1, −1, 2/3, 0; tokens 2, 2, 3, 1, so −0.5, −0.5, −1, 0; the gate wants "good"."""
    judgement = judge(
        replace(runs.GOODNESS, weight=3.0),
        RewardConfig(length=LengthConfig(1, 3), weight=0.5),
        RewardConfig(verifier="regex", pattern="good", gate=GateConfig(1.0, otherwise=-7.0)),
    )(rollout, PROMPTS)
    np.testing.assert_allclose(judgement.reward_B, [2.75, -7, 1.5, -7], rtol=1e-6)
    np.testing.assert_allclose(judgement.parts["length"], [-0.5, -0.5, -1, 0])


def test_judge_row_without_a_truth_is_left_out(rollout):
    judgement = judge(RewardConfig(verifier="exact"))(rollout, PROMPTS)
    np.testing.assert_array_equal(judgement.reward_B, [1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(judgement.valid_B, [True, True, False, False])
    wanted = {"reward/excluded": 0.5, "reward/exact": 0.5, "excluded/exact": 0.5}
    assert measures(judgement) == wanted | {"applies/exact": 1.0}


def test_judge_of_arrays_alone_stays_on_the_device(rollout):
    made = judge(RewardConfig(length=LengthConfig(1, 3)))
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        judgement = made(rollout, PROMPTS)
    np.testing.assert_allclose(judgement.reward_B, [-0.5, -0.5, -1, 0])
    assert bool(judgement.valid_B.all())


def test_judge_refuses_more_excluded_rows_than_allowed(rollout):
    nan = math.nan
    told([nan, nan, 1, 1], max_excluded=0.5)(rollout, PROMPTS)
    measured = measures(told([nan] * 4)(rollout, PROMPTS))
    assert math.isnan(measured.pop("reward/told"))
    assert measured == {"reward/excluded": 1.0, "applies/told": 1.0, "excluded/told": 1.0}
    message = (
        r"rewards: 3 of 4 completions got none, and max_excluded=0\.5 of them may: told has none "
        r"for 3, the last because: HTTP 500: mend the source, or raise max_excluded"
    )
    with pytest.raises(InputError, match=message):
        told([nan, nan, nan, 1], "HTTP 500", max_excluded=0.5)(rollout, PROMPTS)


SAID = "<think> Paris or Rome </think> <answer> Paris </answer>"


@pytest.fixture
def tagged():
    """One response, whose tags are special tokens, closed by a stop token and padded."""
    ids = runs.tags_tokenizer().encode(SAID, add_special_tokens=False)
    token_BT = jnp.array([[11, *ids, 1, 0]])
    mask_BT = jnp.ones(token_BT.shape).at[0, [0, -1]].set(0)
    zero_BT = jnp.zeros(token_BT.shape)
    return Rollout(token_BT, mask_BT, mask_BT, zero_BT, zero_BT, jnp.array([True]))


def read(prompts, completions, **_):
    """How many of SAID's words, tags among them, a completion has."""
    return [float(len(text.split())) for text in completions]


READ = RewardConfig(function="test_judge:read", in_process=True)


@pytest.mark.parametrize("isolate", [None, IsolateConfig()])
@pytest.mark.parametrize(
    ("source", "reward"),
    [
        (RewardConfig(verifier="exact"), 1.0),
        (RewardConfig(verifier="exact", special_tokens=False), 0.0),
        (RewardConfig(verifier="regex", pattern="^<think>.*</answer>$"), 1.0),
        (READ, 4.0),
        (replace(READ, special_tokens=True), 8.0),
    ],
)
def test_judge_keeps_special_tokens_for_those_who_read_them(tagged, source, reward, isolate):
    source = replace(source, isolate=isolate, in_process=not isolate)
    sources = load_rewards((source,))
    made = Judge(sources, (None,), runs.tags_tokenizer(), one_device())
    assert made(tagged, [Prompt("the", {"answer": "Paris"}, "f:1")]).reward_B.tolist() == [reward]


def test_judge_gives_each_source_its_own_text(tagged):
    sources = load_rewards((READ, replace(READ, special_tokens=True, weight=10.0), READ))
    made = Judge(sources, (None,) * 3, runs.tags_tokenizer(), one_device())
    assert made(tagged, [Prompt("the", {}, "f:1")]).reward_B.tolist() == [88.0]


def test_judge_sends_a_service_the_text_that_it_is_to_read(tagged):
    with service(honest) as server:
        for special, text in ((None, "Paris or Rome Paris"), (True, SAID)):
            config = RewardConfig(service=ServiceConfig(server.url), special_tokens=special)
            made = Judge(load_rewards((config,)), (None,), runs.tags_tokenizer(), one_device())
            assert made(tagged, [Prompt("the", {}, "f:1")]).reward_B.tolist() == [len(text)]


def test_length_penalty_by_hand():
    """Responses of 0, 2, 3, 4 and 6 tokens, padded: 0 up to 2, −1 from 4; a gap (the tokens of a
    tool) is not counted."""
    mask_BT = np.zeros((5, 10), np.float32)
    for row, count in enumerate((0, 2, 3, 4, 6)):
        mask_BT[row, 2 : 2 + count] = 1
    penalty_B = length_penalty(mask_BT, 2, 4)
    np.testing.assert_allclose(penalty_B, [0, 0, -0.5, -1, -1])
    assert penalty_B.dtype == np.float32
    np.testing.assert_allclose(length_penalty(np.array([[0, 1, 0, 1, 1]]), 0, 6), [-0.5])


def choosy(prompts, completions, **_):
    """Goodness; no reward for completions that begin with one of three words."""
    scores = goodness(prompts, completions)
    pairs = zip(completions, scores, strict=True)
    return [None if text.split()[:1] in (["sad"], ["the"], ["good"]) else s for text, s in pairs]


def misbehaves(handler, request):
    """As ``choosy`` pays, but in a bad order and every first attempt in vain; and three ways not to
    give a reward."""
    first = sum(body["id"] == request["id"] for _, body in handler.server.seen) == 1
    if first:
        fails(handler, request)
        return
    rewards = []
    for row in request["rows"]:
        word = row["completion"].split()[:1]
        (score,) = goodness([""], [row["completion"]])
        if word == ["sad"]:
            score = "much"
        elif word == ["the"]:
            rewards.append({"id": row["id"], "reward": 0.0})
        if word != ["good"]:
            rewards.append({"id": row["id"], "reward": score})
    say(handler, {"rewards": [*rewards[::-1], {"id": "99", "reward": 1e9}]})


def test_run_goes_on_with_the_right_rows(tmp_path):
    """A service that misbehaves, and a function that gives the same rewards to the same rows: the
    runs are equal."""
    logged, sample = {}, SampleConfig(max_new_tokens=8, n=4)
    with service(misbehaves) as server:
        asked = ServiceConfig(server.url, batch_size=5, retries=1, backoff=0.001)
        for name, reward in [
            ("service", RewardConfig(service=asked)),
            ("function", RewardConfig(function="test_judge:choosy", isolate=IsolateConfig())),
        ]:
            (tmp_path / name).mkdir()
            config = runs.of("rloo", tmp_path / name, rewards=(reward,), sample=sample, steps=2)
            loop.train(replace(config, max_excluded=0.9), one_device())
            lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
            logged[name] = [json.loads(line) for line in lines]
    keys = ("loss", "score", "valid", "reward/excluded", "length")
    both = [[[row[key] for key in keys] for row in rows] for rows in logged.values()]
    assert both[0] == both[1]
    for row in logged["service"]:
        assert 0 < row["reward/excluded"] < 0.9
        assert row["reward/excluded"] == pytest.approx(1 - row["valid"], abs=1e-6)
        assert row[f"excluded/{server.url}"] == row["reward/excluded"]


def test_run_stops_where_too_many_rows_have_no_reward(tmp_path, monkeypatch, capfd, caplog):
    """And nothing that it has written or said holds the secret of its service."""
    monkeypatch.setenv("REWARD_KEY", "Bearer abc-secret")
    with service(fails) as server:
        asked = ServiceConfig(server.url, retries=0, header_env="REWARD_KEY")
        config = runs.ppo(tmp_path, rewards=(RewardConfig(service=asked), runs.GOODNESS))
        with pytest.raises(InputError) as error:
            loop.train(config, one_device())
    assert server.seen[0][0]["Authorization"] == "Bearer abc-secret"
    files = [x.read_bytes() for x in (tmp_path / "run").rglob("*") if x.is_file()]
    assert any(b"REWARD_KEY" in content for content in files)
    traces = "".join(traceback.format_exception(error.value))
    said = [*capfd.readouterr(), caplog.text, traces]
    assert not any("abc-secret" in text for text in said)
    assert not any(b"abc-secret" in content for content in files)
    message = f"16 of 16 completions got none, and max_excluded=0.5 of them may: {server.url}"
    assert message in str(error.value)
    assert "HTTP 500" in str(error.value)


def test_run_checks_the_truth_of_every_row_before_it_starts(tmp_path):
    config = runs.ppo(tmp_path, rewards=(RewardConfig(verifier="exact"),))
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: verifier exact: the row has no"):
        loop.train(config, one_device())
    assert not (tmp_path / "run").exists()


nan = np.nan


def test_load_rewards_of_every_kind():
    gate = GateConfig(1.0)
    rewards = load_rewards(
        (
            RewardConfig(model="runs/rm", weight=2.0),
            RewardConfig(function="sentiment"),
            RewardConfig(verifier="number", gate=gate),
            RewardConfig(service=ServiceConfig("http://127.0.0.1:1")),
            RewardConfig(length=LengthConfig(1, 2)),
        )
    )
    names = ["runs/rm", "sentiment", "number", "http://127.0.0.1:1", "length"]
    assert [reward.name for reward in rewards] == names
    assert [reward.weight for reward in rewards] == [2.0, 1.0, 1.0, 1.0, 1.0]
    assert [reward.gate for reward in rewards] == [None, None, gate, None, None]
    assert [callable(reward.ask) for reward in rewards] == [False, True, True, True, False]
    assert rewards[4].length == LengthConfig(1, 2)


def test_load_rewards_names_are_unique_and_without_query():
    url = "http://127.0.0.1:1/v1/score"
    configs = [RewardConfig(length=LengthConfig(1, n)) for n in (2, 3, 4)]
    configs += [RewardConfig(service=ServiceConfig(f"{url}?key={i}#there")) for i in range(2)]
    names = ["length", "length#2", "length#3", url, f"{url}#2"]
    assert [reward.name for reward in load_rewards(configs)] == names


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((), "rewards: none given; add one"),
        ((RewardConfig(),), r"rewards\.0: give either function or model"),
        ((RewardConfig("sentiment", "runs/rm"),), r"rewards\.0: .* both given"),
        ((RewardConfig("sentimnet"),), r"rewards\.0: reward function 'sentimnet' is unknown"),
        ((RewardConfig("sentiment", weight=float("nan")),), r"rewards\.0\.weight=nan"),
        (
            (RewardConfig(verifier="regex", pattern="("),),
            r"rewards\.0: pattern='\(': no pattern",
        ),
    ],
)
def test_load_rewards_bad_config(configs, message):
    with pytest.raises(InputError, match=message):
        load_rewards(configs)


def test_check_truths_names_the_place():
    rewards = load_rewards((RewardConfig("sentiment"), RewardConfig(verifier="number")))
    rows = [Prompt("p", {"answer": x}, f"f.jsonl:{i}") for i, x in enumerate(("5", 5, "five"))]
    check_truths(rewards, rows[:2])
    with pytest.raises(InputError, match=r"f\.jsonl:2: verifier number: the truth holds no number"):
        check_truths(rewards, rows)
    with pytest.raises(InputError, match=r"f\.jsonl:9: verifier number: the row has no 'answer'"):
        check_truths(rewards, [Prompt("p", {}, "f.jsonl:9")])


@pytest.mark.parametrize(
    ("scores", "weights", "wanted"),
    [
        ([[1.0, 2.0], [0.5, -1.0]], [2.0, 0.1], [2.05, 3.9]),
        ([[1, 0], [0.7, 0.7]], [1, 1], [1.7, 0.7]),
        ([[1, 2]], [0.7], [0.7, 1.4]),
        ([[1.0, nan, 1.0, nan], [1.0, 1.0, nan, nan]], [1.0, 0.0], [1.0, nan, nan, nan]),
        ([[1e300, 1.0, np.inf]], [1.0], [nan, 1.0, nan]),
    ],
    ids=["sum", "whole numbers", "fractions", "a part is missing", "beyond float32"],
)
def test_combine_weighted_sum(scores, weights, wanted):
    reward_B, valid_B = combine([np.array(x) for x in scores], weights)
    np.testing.assert_allclose(reward_B, wanted, rtol=1e-6)
    assert reward_B.dtype == np.float32
    np.testing.assert_array_equal(valid_B, ~np.isnan(wanted))


def test_combine_what_does_not_go_together():
    with pytest.raises(InputError, match="rewards: none given; add one"):
        combine([], [])
    for scores, weights in [
        ([np.zeros(2), np.zeros(3)], [1, 1]),
        ([np.zeros(2)], [1, 1]),
        ([np.zeros((2, 1))], [1]),
    ]:
        with pytest.raises(ValueError, match="do not combine"):
            combine(scores, weights)


def test_combine_gate_by_hand():
    """open at the threshold, shut, unknown; a shut gate needs no other score."""
    gate = np.array([0.5, 0.4, nan, 0.4, 0.9])
    scores = [gate, np.array([3.0, 3.0, 3.0, nan, nan])]
    gates = [GateConfig(at_least=0.5, otherwise=-1.0), None]
    for xp in (np, jnp):
        got = fold([xp.asarray(x) for x in scores], [7.0, 2.0], gates, xp)
        np.testing.assert_array_equal(got, [6.0, -1.0, nan, -1.0, nan])
    reward_B, valid_B = combine(scores, [7.0, 2.0], gates)
    np.testing.assert_array_equal(reward_B, [6.0, -1.0, nan, -1.0, nan])
    np.testing.assert_array_equal(valid_B, [True, True, False, True, False])


def test_combine_what_does_not_apply_by_hand():
    """Rows: all apply; the first does not; neither; the one that applies is missing; a shut gate;
    a gate that does not apply, shut and open; a gate that applies and is missing."""
    on, off = True, False
    scores = [
        (np.array([1, nan, nan, nan, 1, 1, nan, 1.0]), [on, off, off, on, on, on, off, on]),
        (np.array([2, 2, nan, nan, nan, 2, nan, 2.0]), [on, on, off, off, off, on, off, on]),
        (np.array([1, 1, 1, 1, 0, nan, nan, nan]), [on, on, on, on, on, off, off, on]),
    ]
    parts = [part for part, _ in scores]
    gates = [None, None, GateConfig(1.0, -9.0)]
    wanted = [21, 20, nan, nan, -9, 21, nan, nan]
    reward_B, valid_B = combine(parts, [1, 10, 1], gates, [np.array(at) for _, at in scores])
    np.testing.assert_array_equal(reward_B, wanted)
    np.testing.assert_array_equal(valid_B, np.isfinite(wanted))
    reward_B, _ = combine(parts, [1, 10, 1], gates, [np.array(scores[0][1]), None, None])
    np.testing.assert_array_equal(reward_B, [21, 20, nan, nan, -9, nan, nan, nan])


def test_combine_first_gate_that_is_shut_decides():
    first, second = np.array([0.0, 1.0, 0.0, 1.0, nan]), np.array([0.0, 0.0, nan, nan, 0.0])
    gates = [GateConfig(1.0, -1.0), None, GateConfig(1.0, -2.0)]
    reward_B, _ = combine([first, np.ones(5), second], [1.0, 1.0, 1.0], gates)
    np.testing.assert_array_equal(reward_B, [-1.0, -2.0, -1.0, nan, nan])
