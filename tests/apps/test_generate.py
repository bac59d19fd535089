"""Completions of a policy, their rewards, and which of several is kept."""

import jax
import numpy as np
import pytest

from jaxrlhf.apps.generate import choose, complete
from jaxrlhf.config import RewardConfig, SampleConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.words import goodness

GOODNESS = RewardConfig(function="jaxrlhf.data.words:goodness")
PROMPTS = ("the good", "the")


def test_complete_keeps_the_best_of_all(policy):
    wish = SampleConfig(n=6, max_new_tokens=5)
    rows = complete(policy, PROMPTS, wish, GOODNESS)
    best = complete(policy, PROMPTS, wish, GOODNESS, keep="best")
    assert [len(row) for row in rows] == [6, 6]
    for row, (kept,) in zip(rows, best, strict=True):
        np.testing.assert_allclose([r for _, r in row], goodness(PROMPTS, [t for t, _ in row]))
        assert kept in row
        assert kept.reward == max(reward for _, reward in row)
    assert len({text for text, _ in rows[0]}) > 1


def test_complete_without_a_reward(policy):
    (row, _) = complete(policy, PROMPTS, SampleConfig(n=2, max_new_tokens=5))
    assert [reward for _, reward in row] == [None, None]
    with pytest.raises(InputError, match="keep=best: needs a reward"):
        complete(policy, PROMPTS, SampleConfig(n=2), keep="best")
    with pytest.raises(InputError, match="ask for fewer"):
        complete(policy, PROMPTS, SampleConfig(n=2, max_new_tokens=64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 10**20}, "seed=100000000000000000000: must be below 4294967296"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"beta": -3.0}, "beta=-3: must be above 0"),
        ({"beta": float("nan"), "keep": "resample"}, "beta=nan: must be above 0"),
        ({"beta": 0.5}, "beta=0.5: keep=all does not read it: leave it out"),
        ({"beta": 0.5, "keep": "best"}, "beta=0.5: keep=best does not read it"),
    ],
)
def test_complete_refuses_numbers(options, message):
    with pytest.raises(InputError, match=message):
        complete("nowhere", PROMPTS, SampleConfig(n=2), GOODNESS, **options)


def test_choose_resamples_in_proportion_to_exp_reward():
    reward_QN = np.tile(np.array([[0.0, np.nan, np.log(3.0)]], np.float32), (4000, 1))
    kept_Q = choose(reward_QN, "resample", 1.0, jax.random.key(0))
    share = np.bincount(kept_Q, minlength=3) / 4000
    np.testing.assert_allclose(share, [0.25, 0, 0.75], atol=0.03)
    sharp_Q = choose(reward_QN, "resample", 0.05, jax.random.key(0))
    assert (sharp_Q == 2).all()


def test_choose_best_and_unknown():
    key = jax.random.key(0)
    reward_QN = np.array([[0.0, np.nan, 2.0], [1.0, 0.0, -1.0]])
    np.testing.assert_array_equal(choose(reward_QN, "best", 1.0, key), [2, 0])
    with pytest.raises(InputError, match="prompt 2: no completion got a reward"):
        choose(np.array([[0.0], [np.nan]]), "best", 1.0, key)
