"""Responses that never end, and empty ones."""

from dataclasses import replace

import numpy as np
from histories import STEPS, policy

from jaxrlhf.config import SampleConfig
from jaxrlhf.study.diagnose import endings

ONES = np.ones(STEPS)


def test_no_eos_never():
    (finding,) = endings.no_eos(policy(ended=0 * ONES))
    assert finding.severity == "warning"
    assert "48 tokens" in finding.evidence
    assert endings.no_eos(policy(ended=0.01 * ONES)) == []


def test_no_eos_of_few_responses():
    """Of 8 an iteration, 25 iterations have 200; the last eight, which a trend has, only 64."""
    history = policy()
    config = replace(history.config, sample=replace(history.config.sample, n=1))
    assert config.data.batch_size == 8
    for zeros, severities in ((24, []), (25, ["warning"])):
        ended = np.where(np.arange(STEPS) < STEPS - zeros, 0.15, 0)
        found = endings.no_eos(replace(policy(ended=ended), config=config))
        assert [finding.severity for finding in found] == severities


def test_no_eos_unlearnt():
    ended = np.where(np.arange(STEPS) < 20, 0.8, 0)
    (finding,) = endings.no_eos(policy(ended=ended))
    assert finding.severity == "problem"
    assert "0.8 (steps 1-8) → 0 (steps 33-40)" in finding.evidence


def test_empty_responses():
    (finding,) = endings.empty_responses(policy(length=ONES))
    assert finding.severity == "problem"
    assert endings.empty_responses(policy(length=1.1 * ONES)) == []


def test_empty_responses_of_one_token_by_config():
    history = policy(length=ONES)
    config = replace(history.config, sample=SampleConfig(max_new_tokens=1))
    assert endings.empty_responses(replace(history, config=config)) == []
