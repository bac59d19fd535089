import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import GateConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards.combine import combine, fold


def test_combine_weighted_sum_by_hand():
    reward_B, valid_B = combine([np.array([1.0, 2.0]), np.array([0.5, -1.0])], [2.0, 0.1])
    np.testing.assert_allclose(reward_B, [2.05, 3.9], rtol=1e-6)
    assert reward_B.dtype == np.float32
    np.testing.assert_array_equal(valid_B, [True, True])


def test_combine_row_is_valid_only_if_every_part_is():
    nan = np.nan
    parts = [np.array([1.0, nan, 1.0, nan]), np.array([1.0, 1.0, nan, nan])]
    reward_B, valid_B = combine(parts, [1.0, 0.0])
    np.testing.assert_array_equal(valid_B, [True, False, False, False])
    np.testing.assert_array_equal(reward_B, [1.0, nan, nan, nan])


def test_combine_fractions_survive_whole_numbers():
    reward_B, _ = combine([np.array([1, 0]), np.array([0.7, 0.7])], [1, 1])
    np.testing.assert_allclose(reward_B, [1.7, 0.7], rtol=1e-6)
    reward_B, _ = combine([np.array([1, 2])], [0.7])
    np.testing.assert_allclose(reward_B, [0.7, 1.4], rtol=1e-6)


def test_combine_sum_beyond_float32_is_no_reward():
    reward_B, valid_B = combine([np.array([1e300, 1.0, np.inf])], [1.0])
    np.testing.assert_array_equal(valid_B, [False, True, False])
    np.testing.assert_array_equal(reward_B, [np.nan, 1.0, np.nan])


def test_combine_nothing_is_an_error():
    with pytest.raises(InputError, match="rewards: none given; add one"):
        combine([], [])


def test_combine_shapes_that_differ():
    for scores, weights in [
        ([np.zeros(2), np.zeros(3)], [1, 1]),
        ([np.zeros(2)], [1, 1]),
        ([np.zeros((2, 1))], [1]),
    ]:
        with pytest.raises(ValueError, match="do not combine"):
            combine(scores, weights)


def test_combine_gate_by_hand():
    """open at the threshold, shut, unknown; a shut gate needs no other score."""
    nan = np.nan
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
    nan = np.nan
    first, second = np.array([0.0, 1.0, 0.0, 1.0, nan]), np.array([0.0, 0.0, nan, nan, 0.0])
    gates = [GateConfig(1.0, -1.0), None, GateConfig(1.0, -2.0)]
    reward_B, _ = combine([first, np.ones(5), second], [1.0, 1.0, 1.0], gates)
    np.testing.assert_array_equal(reward_B, [-1.0, -2.0, -1.0, nan, nan])
