"""KL, entropy, update size, sampler against update, updates left out."""

from dataclasses import replace

import numpy as np
import pytest
from histories import STEPS, line, policy

from jaxrlhf.config import CriticConfig, GRPOConfig, GSPOConfig, PPOConfig, SampleConfig
from jaxrlhf.study.diagnose import divergence

ONES = np.ones(STEPS)


def severities(found):
    return [finding.severity for finding in found]


def test_kl_blow_up_per_token():
    assert severities(divergence.kl_blow_up(policy(kl=50 * ONES, length=24 * ONES))) == ["problem"]
    assert divergence.kl_blow_up(policy(kl=46 * ONES, length=24 * ONES)) == []


def test_kl_blow_up_jump():
    kl = np.where(np.arange(STEPS) == 20, 16.0, 2.0)  # 5 · 2 + 5 = 15
    (finding,) = divergence.kl_blow_up(policy(kl=kl))
    assert finding.severity == "warning"
    assert finding.evidence == "KL 16 nats at step 21 after a median of 2"
    assert divergence.kl_blow_up(policy(kl=np.minimum(kl, 14.9))) == []


def test_kl_blow_up_off_target():
    adaptive = PPOConfig(kl_controller="adaptive", kl_target=6.0)
    assert severities(divergence.kl_blow_up(policy(adaptive, kl=13 * ONES))) == ["warning"]
    assert divergence.kl_blow_up(policy(adaptive, kl=11 * ONES)) == []


def test_kl_stall():
    still = {"kl": line(0, 0, 1e-3), "score": line(0, 0, 0.05)}
    assert severities(divergence.kl_stall(policy(**still))) == ["warning"]
    assert divergence.kl_stall(policy(**still | {"kl": line(0, 0.1)})) == []
    assert divergence.kl_stall(policy(**still | {"score": line(0, 1, 0.05)})) == []


def test_kl_stall_spares_the_critics_warmup():
    history = policy(kl=line(0, 0, 1e-3), score=line(0, 0, 0.05))
    config = replace(history.config, critic=CriticConfig(warmup=25))
    assert divergence.kl_stall(replace(history, config=config)) == []


def test_kl_negative():
    assert severities(divergence.kl_negative(policy(kl=-0.2 * ONES))) == ["problem"]
    assert divergence.kl_negative(policy(kl=-0.05 * ONES)) == []
    scatter = np.tile([-1.0, 0.6], STEPS // 2)  # mean −0.2 ± 0.6
    assert divergence.kl_negative(policy(kl=scatter)) == []


def test_entropy_collapse_needs_entropy_to_lose():
    assert divergence.entropy_collapse(policy(entropy_estimate=line(0.15, 0))) == []


def test_entropy_collapse_severity():
    left = np.where(np.arange(STEPS) < 20, 2.0, 0.09)  # 0.045 of it
    assert severities(divergence.entropy_collapse(policy(entropy_estimate=left))) == ["problem"]
    left = np.where(np.arange(STEPS) < 20, 2.0, 0.3)
    assert severities(divergence.entropy_collapse(policy(entropy_estimate=left))) == ["warning"]
    left = np.where(np.arange(STEPS) < 20, 2.0, 0.41)
    assert divergence.entropy_collapse(policy(entropy_estimate=left)) == []


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"clip_fraction": 0.31 * ONES}, "warning"),
        ({"clip_fraction": 0.29 * ONES}, None),
        ({"clip_fraction": 0.51 * ONES}, "problem"),
        ({"clip_fraction": 10 * ONES, "weight": 50 * ONES, "approx_kl": 0.1 * ONES}, None),  # 0.2
        ({"ratio_max": 11 * ONES}, "warning"),
        ({"ratio_max": 1001 * ONES}, "problem"),
        ({"ratio_max": np.where(np.arange(STEPS) == 39, 5000, 2)}, None),  # one of eight
        ({"approx_kl": 0.11 * ONES}, "warning"),
        ({"approx_kl": 0.09 * ONES}, None),
    ],
)
def test_large_updates(changes, severity):
    assert severities(divergence.large_updates(policy(**changes))) == (
        [severity] if severity else []
    )


@pytest.mark.parametrize(("largest", "severity"), [(78.0, None), (1001.0, "problem")])
def test_large_updates_of_a_run_that_has_just_begun(largest, severity):
    history = policy(ratio_max=largest * ONES)
    history = replace(history, training=history.training.where(np.arange(STEPS) < 9))
    assert severities(divergence.large_updates(history)) == ([severity] if severity else [])


def test_large_updates_gspo_clips_by_design():
    assert divergence.large_updates(policy(GSPOConfig(), clip_fraction=0.8 * ONES)) == []


def test_sampler_mismatch_gap():
    history = policy(sample_gap=0.05 * ONES)  # log 1.05 = 0.0488
    assert severities(divergence.sampler_mismatch(history)) == ["problem"]
    assert divergence.sampler_mismatch(policy(sample_gap=0.048 * ONES)) == []
    cut = replace(history, config=replace(history.config, sample=SampleConfig(top_p=0.9)))
    assert severities(divergence.sampler_mismatch(cut)) == ["warning"]


def test_sampler_mismatch_ratio_alone():
    history = policy(sample_gap=None, sample_ratio=0.9 * ONES)
    assert severities(divergence.sampler_mismatch(history)) == ["problem"]
    assert divergence.sampler_mismatch(policy(sample_gap=None, sample_ratio=0.96 * ONES)) == []


def test_sampler_mismatch_only_update_is_clipped():
    once = policy(GRPOConfig(), clip_fraction=0.02 * ONES)
    assert severities(divergence.sampler_mismatch(once)) == ["problem"]
    twice = policy(GRPOConfig(minibatches=2), clip_fraction=0.02 * ONES)
    assert divergence.sampler_mismatch(twice) == []


def test_non_finite_updates():
    some = np.where(np.isin(np.arange(STEPS), [4, 17]), 0.5, 0)
    (finding,) = divergence.non_finite_updates(policy(skipped=some))
    assert finding.severity == "warning"
    assert "2.5% of updates left out, in 2 of 40 iterations (steps 5, 18)" in finding.evidence
    many = np.where(np.arange(STEPS) < 3, 1.0, 0)  # 7.5 %
    assert severities(divergence.non_finite_updates(policy(skipped=many))) == ["problem"]
    critic = policy(**{"critic/skipped": some})
    assert "critic's" in divergence.non_finite_updates(critic)[0].evidence
