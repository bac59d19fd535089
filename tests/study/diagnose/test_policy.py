"""Thresholds, evidence and exceptions of KL, entropy, update size, sampler against update, updates
left out, a critic that explains nothing, and responses that never end or are empty."""

from dataclasses import replace

import numpy as np
import pytest
from histories import STEPS, grpo, line, policy, severity_of

from jaxrlhf.config import CriticConfig, GRPOConfig, GSPOConfig, PPOConfig, SampleConfig
from jaxrlhf.study.diagnose import DETECTORS
from jaxrlhf.study.diagnose.history import Series
from jaxrlhf.study.diagnose.policy import (
    empty_responses,
    kl_blow_up,
    kl_stall,
    large_updates,
    no_eos,
    non_finite_updates,
    sampler_mismatch,
    value_function,
)

ONES = np.ones(STEPS)
I = np.arange(STEPS)
ADAPTIVE = PPOConfig(kl_controller="adaptive", kl_target=6.0)
STILL = {"kl": line(0, 0, 1e-3), "score": line(0, 0, 0.05)}


def with_config(history, **changes):
    return replace(history, config=replace(history.config, **changes))


@pytest.mark.parametrize(
    ("name", "algorithm", "changes", "severity"),
    [
        ("kl_blow_up", None, {"kl": 50 * ONES, "length": 24 * ONES}, "problem"),  # 2.1 a token
        ("kl_blow_up", None, {"kl": 46 * ONES, "length": 24 * ONES}, None),
        ("kl_blow_up", None, {"kl": np.where(I == 20, 14.9, 2.0)}, None),  # 5 · 2 + 5 = 15
        ("kl_blow_up", ADAPTIVE, {"kl": 13 * ONES}, "warning"),
        ("kl_blow_up", ADAPTIVE, {"kl": 11 * ONES}, None),
        ("kl_stall", None, STILL, "warning"),
        ("kl_stall", None, STILL | {"kl": line(0, 0.1)}, None),
        ("kl_stall", None, STILL | {"score": line(0, 1, 0.05)}, None),
        ("kl_negative", None, {"kl": -0.2 * ONES}, "problem"),
        ("kl_negative", None, {"kl": -0.05 * ONES}, None),
        ("kl_negative", None, {"kl": np.tile([-1.0, 0.6], STEPS // 2)}, None),  # −0.2 ± 0.6
        ("entropy_collapse", None, {"entropy_estimate": line(0.15, 0)}, None),  # none to lose
        ("entropy_collapse", None, {"entropy_estimate": np.where(I < 20, 2, 0.09)}, "problem"),
        ("entropy_collapse", None, {"entropy_estimate": np.where(I < 20, 2, 0.3)}, "warning"),
        ("entropy_collapse", None, {"entropy_estimate": np.where(I < 20, 2, 0.41)}, None),
        ("large_updates", None, {"clip_fraction": 0.31 * ONES}, "warning"),
        ("large_updates", None, {"clip_fraction": 0.29 * ONES}, None),
        ("large_updates", None, {"clip_fraction": 0.51 * ONES}, "problem"),
        (
            "large_updates",
            None,
            {"clip_fraction": 10 * ONES, "weight": 50 * ONES, "approx_kl": 0.1 * ONES},  # 0.2
            None,
        ),
        ("large_updates", None, {"ratio_max": 11 * ONES}, "warning"),
        ("large_updates", None, {"ratio_max": 1001 * ONES}, "problem"),
        ("large_updates", None, {"ratio_max": np.where(I == 39, 5000, 2)}, None),  # one of eight
        ("large_updates", None, {"approx_kl": 0.11 * ONES}, "warning"),
        ("large_updates", None, {"approx_kl": 0.09 * ONES}, None),
        ("large_updates", GSPOConfig(), {"clip_fraction": 0.8 * ONES}, None),  # by design
        ("sampler_mismatch", None, {"sample_gap": 0.05 * ONES}, "problem"),  # log 1.05 = 0.0488
        ("sampler_mismatch", None, {"sample_gap": 0.048 * ONES}, None),
        ("sampler_mismatch", None, {"sample_gap": None, "sample_ratio": 0.9 * ONES}, "problem"),
        ("sampler_mismatch", None, {"sample_gap": None, "sample_ratio": 0.96 * ONES}, None),
        ("sampler_mismatch", GRPOConfig(), {"clip_fraction": 0.02 * ONES}, "problem"),  # the only
        ("sampler_mismatch", GRPOConfig(minibatches=2), {"clip_fraction": 0.02 * ONES}, None),
        ("non_finite_updates", None, {"skipped": np.where(I < 3, 1.0, 0)}, "problem"),  # 7.5 %
        ("value_function", None, {"explained_variance": 0.01 * ONES}, None),
        ("value_function", None, {"explained_variance": 0.0 * ONES}, "warning"),
        ("value_function", None, {"explained_variance": -0.9 * ONES}, "warning"),
        # it is given 20 iterations
        ("value_function", None, {"explained_variance": np.where(I < 19, -0.5, np.nan)}, None),
        ("no_eos", None, {"ended": 0.01 * ONES}, None),
        ("empty_responses", None, {"length": 1.1 * ONES}, None),
    ],
)
def test_severity(name, algorithm, changes, severity):
    assert severity_of(DETECTORS[name](policy(algorithm, **changes))) == severity


def test_kl_blow_up_jump():
    finding = kl_blow_up(policy(kl=np.where(I == 20, 16.0, 2.0)))  # 5 · 2 + 5 = 15
    assert finding.severity == "warning"
    assert finding.evidence == "KL 16 nats at step 21 after a median of 2"


def test_kl_stall_spares_the_critics_warmup():
    assert kl_stall(with_config(policy(**STILL), critic=CriticConfig(warmup=25))) is None


@pytest.mark.parametrize(("largest", "severity"), [(78.0, None), (1001.0, "problem")])
def test_large_updates_of_a_run_that_has_just_begun(largest, severity):
    history = policy(ratio_max=largest * ONES)
    history = replace(history, training=history.training.where(I < 9))
    assert severity_of(large_updates(history)) == severity


def test_sampler_mismatch_of_truncated_sampling():
    cut = with_config(policy(sample_gap=0.05 * ONES), sample=SampleConfig(top_p=0.9))
    finding = sampler_mismatch(cut)
    assert finding.severity == "warning"
    assert finding.evidence.endswith(" nats a token (steps 33-40), with truncated sampling")


def test_non_finite_updates():
    some = np.where(np.isin(I, [4, 17]), 0.5, 0)
    finding = non_finite_updates(policy(skipped=some))
    assert finding.severity == "warning"
    assert "2.5% of updates left out, in 2 of 40 iterations (steps 5, 18)" in finding.evidence
    critic = policy(**{"critic/skipped": some})
    assert "critic's" in non_finite_updates(critic).evidence


def test_value_function_evidence():
    finding = value_function(policy(explained_variance=-1.1 * ONES))
    assert finding.severity == "problem"
    assert finding.evidence == "explained variance -1.1 (steps 33-40, median) after 40 iterations"


def test_value_function_where_rewards_are_equal():
    """From step 21 on they hardly differ, and nothing of it counts."""
    late = I >= 20
    changes = {"explained_variance": np.where(late, -20.0, 0.5), "score_std": 0.5 - 0.48 * late}
    assert value_function(policy(**changes)) is None
    changes["score_std"] = 0.5 - 0.4 * late
    assert severity_of(value_function(policy(**changes))) == "problem"


def test_value_function_of_algorithms_with_a_critic_only():
    history = grpo()
    values = history.training.values | {"explained_variance": line(0, -2)}
    assert value_function(replace(history, training=Series(I + 1, values))) is None


def test_no_eos_never():
    finding = no_eos(policy(ended=0 * ONES))
    assert finding.severity == "warning"
    assert "48 tokens" in finding.evidence


@pytest.mark.parametrize(("zeros", "severity"), [(24, None), (25, "warning")])
def test_no_eos_of_few_responses(zeros, severity):
    """Of 8 an iteration, 25 iterations have 200; the last eight, which a trend has, only 64."""
    history = policy(ended=np.where(STEPS - zeros > I, 0.15, 0))
    assert history.config.data.batch_size == 8
    history = with_config(history, sample=replace(history.config.sample, n=1))
    assert severity_of(no_eos(history)) == severity


def test_no_eos_unlearnt():
    finding = no_eos(policy(ended=np.where(I < 20, 0.8, 0)))
    assert finding.severity == "problem"
    assert "0.8 (steps 1-8) → 0 (steps 33-40)" in finding.evidence


def test_empty_responses():
    history = policy(length=ONES)
    assert severity_of(empty_responses(history)) == "problem"
    # which is what max_new_tokens 1 asks for
    assert empty_responses(with_config(history, sample=SampleConfig(max_new_tokens=1))) is None
