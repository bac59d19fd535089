"""The sources that a config lists, found or refused; and their gated sum, by hand: a row without a
reward is NaN and not valid."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import GateConfig, LengthConfig, RewardConfig, ServiceConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import Prompt
from jaxrlhf.rewards.combine import check_truths, combine, fold, load_rewards

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


def test_combine_first_gate_that_is_shut_decides():
    first, second = np.array([0.0, 1.0, 0.0, 1.0, nan]), np.array([0.0, 0.0, nan, nan, 0.0])
    gates = [GateConfig(1.0, -1.0), None, GateConfig(1.0, -2.0)]
    reward_B, _ = combine([first, np.ones(5), second], [1.0, 1.0, 1.0], gates)
    np.testing.assert_array_equal(reward_B, [-1.0, -2.0, -1.0, nan, nan])
