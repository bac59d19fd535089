"""Figures of an evaluation by hand: over which prompts, by which judge, at which KL."""

import numpy as np
import pytest
import runs

from jaxrlhf.config import LengthConfig, RewardConfig
from jaxrlhf.core.stats import best_of_n
from jaxrlhf.rewards.judge import Judge, load_rewards
from jaxrlhf.study.evaluate import rule_of
from jaxrlhf.study.figures import best_of_n_curve, describe, solved


def columns(gold_QN, **others):
    gold_QN = np.asarray(gold_QN, float)
    blank = np.full(gold_QN.shape, None, object)
    blank[:] = [["a b a"] * gold_QN.shape[1]] * len(gold_QN)
    tokens = np.empty(gold_QN.shape, object)
    for place in np.ndindex(gold_QN.shape):
        tokens[place] = [1, 2, 1]
    return {
        "gold": gold_QN,
        "text": blank,
        "token": tokens,
        "length": np.full(gold_QN.shape, 3.0),
        "ended": np.ones(gold_QN.shape),
        "logp": np.full(gold_QN.shape, -6.0),
        **others,
    }


def test_describe_by_hand():
    drawn = columns([[1.0, np.nan, 9.0], [3.0, 5.0, 9.0]])
    figures = describe(drawn, 2, ("gold",))
    assert figures["gold"] == pytest.approx((1 + 4) / 2)
    assert figures["gold_ci"] == pytest.approx(12.706205 * np.std([1, 4], ddof=1) / 2**0.5)
    assert figures["unknown"] == 0.25
    assert figures["entropy"] == 2
    assert figures["distinct_1"] == 2 / 12
    assert figures["repetition_3"] == 0
    assert "kl_nats" not in figures


def test_solved_by_hand():
    drawn = columns([[1, 0, 0, 0], [1, 1, 1, 1]])
    drawn["text"][0] = ["yes", "no ", " no", "no"]
    found = solved(drawn, 4, ("gold",), None, str.strip)
    assert found["pass_at_k"]["k"] == [1, 2, 4]
    np.testing.assert_allclose(found["pass_at_k"]["rate"], [0.625, 0.75, 1])
    np.testing.assert_allclose(found["maj_at_k"]["rate"], [0.625, 0.625, 0.5])
    assert solved(columns([[0.5, 1.0]]), 2, ("gold",), None, str.strip) == {}
    assert solved(columns([[0.5, 1.0]]), 2, ("gold",), 0.5, str.strip)["pass_at_k"]["rate"] == [
        1,
        1,
    ]


def test_solved_is_over_the_same_prompts_for_every_k():
    """Prompt 1 has one known completion too few for the largest k: it would drop out there."""
    drawn = columns([[0.0] * 4, [1.0, 1.0, 1.0, np.nan]])
    found = solved(drawn, 4, ("gold",), None, str.strip)
    assert found["pass_at_k"]["rate"] == found["maj_at_k"]["rate"] == [0.0, 0.0, 0.0]
    assert found["solved_prompts"] == 1


def test_figures_of_no_known_prompt_are_left_out():
    drawn = columns([[np.nan, 1.0], [np.nan, np.nan]])
    for correct_at in (None, 0.5):
        assert solved(drawn, 2, ("gold",), correct_at, str.strip) == {}
    assert best_of_n_curve(drawn, 2, ("gold",), {"kl_nats": 0.1}) == {}


def judge_of(*configs):
    return Judge(load_rewards(configs), (None,) * len(configs), None, None)


def test_rule_of_a_verifier():
    correct_at, extract = rule_of(judge_of(RewardConfig(verifier="number", weight=0.7)))
    assert np.float32(0.7) >= correct_at > 0.69
    assert extract("so 1/2") == extract("0.5") != extract("2")
    penalty = RewardConfig(length=LengthConfig(start=1, end=4))
    for others in (runs.GOODNESS,), (RewardConfig(verifier="number"), penalty):
        assert rule_of(judge_of(*others)) == (None, str.strip)


def test_solved_by_the_rule_of_a_verifier():
    """What is nearly right is wrong, and two ways to say the same are one vote."""
    drawn = columns([[1.0, 1.0, 0.6, 0.6], [0.6, 0.6, 0.6, 1.0]])
    drawn["text"][0] = ["7", "3 + 4 = 7", "9", "8"]
    drawn["text"][1] = ["5", "it is 5", "none", "6"]
    found = solved(drawn, 4, ("gold",), *rule_of(judge_of(RewardConfig(verifier="number"))))
    assert found["correct_at"] == 1
    np.testing.assert_allclose(found["pass_at_k"]["rate"], [3 / 8, (5 / 6 + 1 / 2) / 2, 1])
    # Four votes: 7 wins the first, 5 the second. Two: (1 + ½·0)/2 and (0 + 1)/2 of the stretches.
    np.testing.assert_allclose(found["maj_at_k"]["rate"], [3 / 8, (1 / 2 + 1 / 2) / 2, 1 / 2])
    assert solved(drawn, 4, ("gold",), None, str.strip) == {}


def test_best_of_n_curve_is_over_the_same_prompts_for_every_n():
    """Prompt 1 has one sample too few for the largest n: it would drop out there alone."""
    score_QN = np.array([[0.0] * 4, [1.0, 1.0, 1.0, np.nan]])
    found = best_of_n_curve({"proxy": score_QN}, 4, ("proxy",), {})
    assert found["best_of_n"]["proxy"] == [0.0, 0.0, 0.0]
    assert found["best_of_n_prompts"] == 1


def test_best_of_n_curve_judges_gold_by_the_proxy():
    rng = np.random.default_rng(0)
    gold, proxy = rng.standard_normal((2, 3, 8))
    drawn = columns(gold, proxy=proxy)
    found = best_of_n_curve(drawn, 8, ("proxy", "gold"), {"kl_nats": 100.0})
    curve = found["best_of_n"]
    picked = gold[np.arange(3), proxy.argmax(1)]
    assert curve["gold"][-1] == pytest.approx(picked.mean())
    assert curve["proxy"][1] == pytest.approx(best_of_n(proxy, 2).mean())
    assert found["equal_kl"] == {"kl_nats": 100.0, "proxy": None, "gold": None}


def test_best_of_n_curve_of_a_verifier():
    """Half are right: the best of 16 is log 2 away, and that of 2 right three times out of four."""
    right = np.tile([0.0, 1.0], (2, 32))
    found = best_of_n_curve(columns(right), 64, ("gold",), {"kl_nats": 0.1308120})
    curve = found["best_of_n"]
    assert curve["kl_nats"][4] == pytest.approx(0.693, abs=5e-4)
    assert curve["gold"][1] == pytest.approx(0.75, abs=0.01)
    assert found["equal_kl"]["gold"] == pytest.approx(curve["gold"][1], abs=1e-5)
    far = best_of_n_curve(columns(right), 64, ("gold",), {"kl_nats": 0.7})
    assert far["equal_kl"] == {"kl_nats": 0.7, "gold": None}


def test_best_of_n_curve_lies_above_its_chords():
    """Between n = 2 and n = 4 stands n = 3, above the line from one to the other."""
    proxy = np.random.default_rng(0).standard_normal((4, 32))
    drawn = columns(proxy, proxy=proxy)
    kl = float(np.log(3) - 2 / 3)
    found = best_of_n_curve(drawn, 32, ("proxy",), {"kl_nats": kl})
    curve, reached = found["best_of_n"], found["equal_kl"]["proxy"]
    np.testing.assert_allclose(curve["kl_nats"], [np.log(n) - (n - 1) / n for n in curve["n"]])
    assert reached == pytest.approx(best_of_n(proxy, 3).mean(), abs=1e-5)
    assert reached > np.interp(kl, curve["kl_nats"], curve["proxy"]) + 0.005
