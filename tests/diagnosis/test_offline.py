"""Reward models and DPO: chance, overfitting, falling log-probs, margins."""

import numpy as np
import pytest
from histories import STEPS, dpo, line, policy, reward_model

from jaxrlhf.diagnosis import offline

ONES = np.ones(STEPS)


def severities(found):
    return [finding.severity for finding in found]


@pytest.mark.parametrize(
    ("accuracy", "severity", "words"),
    [
        (0.56, "problem", "0.560 ± 0.069 on 200 held-out pairs (step 40)"),
        (0.58, None, ""),
        (0.42, "problem", "below chance"),
    ],
)
def test_chance_accuracy_of_a_reward_model(accuracy, severity, words):
    found = offline.chance_accuracy(reward_model({"accuracy": np.array([0.5, 0.7, accuracy])}))
    assert severities(found) == ([severity] if severity else [])
    assert all(words in finding.evidence for finding in found)


def test_chance_accuracy_of_others_is_a_warning():
    found = offline.chance_accuracy(dpo({"accuracy": np.full(3, 0.5)}))
    assert severities(found) == ["warning"]


def test_chance_accuracy_needs_pairs():
    few = {"accuracy": np.full(3, 0.5), "rows": np.full(3, 29.0)}
    assert offline.chance_accuracy(reward_model(few)) == []


@pytest.mark.parametrize(
    ("loss", "severity"),
    [([0.69, 0.5, 0.56], "warning"), ([0.69, 0.5, 0.77], "problem"), ([0.69, 0.5, 0.54], None)],
)
def test_overfitting_loss(loss, severity):
    found = offline.overfitting(reward_model({"loss": np.array(loss)}))
    assert severities(found) == ([severity] if severity else [])


def test_overfitting_accuracy():
    wide = reward_model({"accuracy": np.array([0.5, 0.8, 0.7])}, accuracy=0.9 * ONES)
    (finding,) = offline.overfitting(wide)
    assert "accuracy 0.900 in training (steps 33-40), 0.700 held out" in finding.evidence
    near = reward_model({"accuracy": np.array([0.5, 0.8, 0.76])}, accuracy=0.9 * ONES)
    assert offline.overfitting(near) == []


@pytest.mark.parametrize(
    ("end", "severity"), [(1.6, None), (1.9, "warning"), (3.5, "problem"), (1.0, None)]
)
def test_chosen_logp_falls(end, severity):
    found = offline.chosen_logp_falls(dpo(nll=line(1.5, end, 0.02)))
    assert severities(found) == ([severity] if severity else [])


def test_margin_explosion():
    for margin, expected in ((19, []), (21, ["warning"]), (101, ["problem"])):
        assert severities(offline.margin_explosion(dpo(margin=margin * ONES))) == expected
    assert "centre_coef" in offline.margin_explosion(reward_model(margin=30 * ONES))[0].remedy


@pytest.mark.parametrize(
    "detect",
    [
        offline.chance_accuracy,
        offline.overfitting,
        offline.chosen_logp_falls,
        offline.margin_explosion,
    ],
)
def test_offline_detectors_leave_policies_alone(detect):
    history = policy(nll=line(1, 9), margin=500 * ONES, accuracy=ONES)
    assert detect(history) == []
