"""Rewards that say nothing, in the wrong size, or that are missing."""

from dataclasses import replace

import numpy as np
import pytest
from histories import STEPS, grpo, measured, policy, reward_model, rows, severity_of, texts

from jaxrlhf.config import DAPOConfig, GRPOConfig
from jaxrlhf.study.diagnose import signal

ONES = np.ones(STEPS)


def test_equal_rewards_always():
    history = policy(score=0.5 * ONES, score_std=0 * ONES)
    finding = signal.equal_rewards(history)
    assert finding.severity == "problem"
    assert "in 40 of 40 iterations, the last of them 0.5" in finding.evidence


def test_equal_rewards_in_the_end():
    spread = np.where(np.arange(STEPS) < 30, 0.4, 0)
    assert severity_of(signal.equal_rewards(policy(score_std=spread))) == "warning"
    spread = np.where(np.arange(STEPS) < 37, 0.4, 0)  # three of the last eight
    assert signal.equal_rewards(policy(score_std=spread)) is None


def test_equal_rewards_relative_to_their_size():
    history = policy(score=1e6 * ONES, score_std=0.5 * ONES)  # float32 has no more digits
    assert severity_of(signal.equal_rewards(history)) == "problem"


@pytest.mark.parametrize(
    ("silent", "severity"), [(0.79, None), (0.81, "warning"), (1.0, "problem")]
)
def test_groups_without_signal(silent, severity):
    found = signal.groups_without_signal(grpo(groups_without_signal=silent * ONES))
    assert severity_of(found) == severity


def test_groups_without_signal_dynamic_sampling():
    history = policy(DAPOConfig(), groups_kept=0.4 * ONES)
    assert "filled 40% of groups" in signal.groups_without_signal(history).evidence
    assert signal.groups_without_signal(policy(DAPOConfig(), groups_kept=0.6 * ONES)) is None


@pytest.mark.parametrize(
    ("spread", "severity"),
    [
        (50 * ONES, "warning"),
        (0.01 * ONES, "warning"),
        (15 * ONES, None),
        (0.03 * ONES, None),
        (np.where(np.arange(STEPS) < 20, 0.5, 5.5), "problem"),
        (np.where(np.arange(STEPS) < 20, 0.5, 4.5), None),
    ],
)
def test_reward_scale(spread, severity):
    found = signal.reward_scale(policy(score_std=spread))
    assert severity_of(found) == severity


def test_reward_scale_of_algorithms_that_divide_by_it():
    assert signal.reward_scale(grpo(score_std=50 * ONES)) is None
    priced = policy(GRPOConfig(kl_in="reward"), score_std=50 * ONES)
    assert severity_of(signal.reward_scale(priced)) == "warning"


def at_limit(share, kinds=32):
    """The last 32 rewards: a share of them exactly 1, the first of this many kinds."""
    history = policy()
    early = {
        i: rows(texts(4), reward=[(4 * i + j) % kinds / 64 for j in range(4)]) for i in range(1, 33)
    }
    late = {
        i: rows(
            texts(4),
            reward=[1.0 if 4 * i + j < 132 + 32 * share else (i + j) / 99 for j in range(4)],
        )
        for i in range(33, 41)
    }
    return replace(history, samples=early | late)


def test_reward_scale_at_its_limit():
    assert "have exactly the highest reward" in signal.reward_scale(at_limit(0.85)).evidence
    assert signal.reward_scale(at_limit(0.7)) is None
    assert signal.reward_scale(at_limit(0.85, kinds=2)) is None  # right or wrong


def test_reward_scale_at_a_limit_of_zero():
    """As a penalty has it."""
    history = at_limit(0.85)
    samples = {
        step: [{**row, "reward": row["reward"] - 1} for row in judged]
        for step, judged in history.samples.items()
    }
    finding = signal.reward_scale(replace(history, samples=samples))
    assert "have exactly the highest reward" in finding.evidence


def test_length_correlation_of_samples():
    lengths = np.random.default_rng(0).permutation(60) + 4
    for slope, expected in ((1.0, "warning"), (-1.0, "warning"), (0.0, None)):
        proxy = slope * lengths + np.random.default_rng(1).normal(size=60)
        judged = rows(["a " * n for n in lengths], proxy=proxy.tolist())
        found = signal.length_correlation(replace(policy(), eval_samples={0: judged}))
        assert severity_of(found) == expected


def test_length_correlation_of_a_reward_model():
    history = measured(reward_model(), length_correlation=[0.0, 0.4, 0.6])
    assert "0.60 between reward and length" in signal.length_correlation(history).evidence
    assert signal.length_correlation(measured(history, length_correlation=[0, 0.8, 0.4])) is None


def test_excluded_rows():
    finding = signal.excluded_rows(policy(valid=np.where(np.arange(STEPS) == 3, 0.2, 0.9)))
    assert finding.severity == "warning"
    assert finding.evidence == "11.8% of completions have no reward, 80.0% at step 4"
    assert severity_of(signal.excluded_rows(policy(valid=0.4 * ONES))) == "problem"
    assert signal.excluded_rows(policy(valid=0.96 * ONES)) is None
