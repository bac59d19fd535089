"""Reward hacking: proxy against gold, training against held-out, length, loops, phrases; of which
completions, and where the thresholds are."""

from dataclasses import replace

import numpy as np
import pytest
from histories import ending, line, measured, policy, rows, severity_of, texts

from jaxrlhf.study.diagnose import hacking


@pytest.mark.parametrize(
    ("proxy", "gold", "severity"),
    [
        ([0, 0.4, 0.8], [0, 0.4, -0.2], "problem"),  # turned down
        ([0, 0.4, 0.8], [0, -0.1, -0.3], "problem"),  # down from the start
        ([0, 0.4, 0.8], [0, 0.6, 0.45], "warning"),  # turned, with most of its rise kept
        ([0, 0.4, 0.8], [0, 0, 0.01], "warning"),  # flat, the proxy up by 0.8 / 0.6 deviations
        ([0, 0.2, 0.3], [0, 0, 0.01], None),  # flat, but the proxy has moved little
        ([0, 0.4, 0.8], [0, 0.5, 0.45], None),  # down within the intervals
        ([0, 0.4, 0.02], [0, 0.4, -0.2], None),  # the proxy fell too: no hacking
        ([0, 0.9, 0.8], [0, 0.4, 0.2], None),  # both fell from their best
    ],
)
def test_reward_hacking(proxy, gold, severity):
    found = hacking.reward_hacking(measured(policy(), proxy=proxy, gold=gold))
    assert severity_of(found) == severity


def test_reward_hacking_evidence():
    finding = hacking.reward_hacking(measured(policy(), gold=[0.0, 0.4, -0.2]))
    assert finding.evidence == (
        "held-out proxy 0 → 0.8 (steps 0 and 40) while gold fell from 0.4 (step 20) to -0.2, "
        "at KL 6 nats"
    )
    assert "algorithm.kl_coef" in finding.remedy


def test_reward_hacking_needs_both_measures():
    assert hacking.reward_hacking(measured(policy(), gold=[np.nan] * 3)) is None


@pytest.mark.parametrize(
    ("last", "severity"), [(-0.2, "problem"), (0.05, "warning"), (0.3, None), (0.8, None)]
)
def test_held_out_gap(last, severity):
    found = hacking.held_out_gap(measured(policy(), proxy=[0.0, last / 2, last]))
    assert severity_of(found) == severity


def test_held_out_gap_needs_a_rise_in_training():
    history = measured(policy(score=line(0, 0, 0.05)), proxy=[0.0, -0.2, -0.4])
    assert hacking.held_out_gap(history) is None


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"length": line(20, 45, 1)}, "warning"),
        ({"length": line(20, 45, 1), "ended": line(0.9, 0.0, 0.01)}, "problem"),
        ({"length": line(20, 6, 1)}, "warning"),
        ({"length": line(20, 26, 1)}, None),
        ({"length": line(20, 45, 1), "score": line(0, 0, 0.05)}, None),  # nobody is paid for it
    ],
)
def test_length_takeover(changes, severity):
    found = hacking.length_takeover(policy(**changes))
    assert severity_of(found) == severity


@pytest.mark.parametrize(
    ("text", "severity"),
    [
        ("so so so so so so so so", "problem"),  # 6 of 7 bigrams are repeats
        ("a b a b a b c d e f", "warning"),  # 3 of 9 are
        ("a b c d e f g h", None),
        ("so so so", None),  # too short to be a text
    ],
)
def test_repetition(text, severity):
    found = hacking.repetition(ending(policy(), [text] * 60))
    assert severity_of(found) == severity


def test_repetition_from_the_start_is_the_task():
    both = dict.fromkeys((0, 40), rows(["so so so so so so so so"] * 60))
    assert hacking.repetition(replace(policy(), eval_samples=both)) is None


def test_repetition_distinct_bigrams():
    finding = hacking.repetition(measured(policy(), distinct_2=[0.8, 0.5, 0.2]))
    assert finding.evidence == "distinct_2 0.8 → 0.2 (steps 0 and 40)"
    assert hacking.repetition(measured(policy(), distinct_2=[0.8, 0.5, 0.3])) is None


def test_phrase_takeover_names_the_whole_phrase():
    finding = hacking.phrase_takeover(ending(policy(), [f"{t} I am so happy" for t in texts(60)]))
    assert finding.severity == "warning"
    assert finding.evidence == "'I am so happy' stands in 0% → 100% of completions"


def test_phrase_takeover_word_in_half_of_them():
    words = texts(60)
    some = [t + " amazing" if i % 5 < 3 else t for i, t in enumerate(words)]
    finding = hacking.phrase_takeover(ending(policy(), some))
    assert "'amazing' stands in 0% → 60%" in finding.evidence
    few = [t + " amazing" if i % 5 < 2 else t for i, t in enumerate(words)]
    assert hacking.phrase_takeover(ending(policy(), few)) is None


def test_phrase_takeover_word_is_all_there_is():
    finding = hacking.phrase_takeover(ending(policy(), ["good good good good bad"] * 60))
    assert finding.severity == "problem"
    assert finding.evidence.startswith("'good' went from 0% to 80% of all words; 'good good good")


def test_completions_of_training_without_two_evaluations():
    history = replace(policy(), eval_samples={})
    first, last = hacking.completions(history)
    assert (len(first), len(last)) == (32, 32)  # 4 of each of 8 iterations
    assert first[:4] == [row["completion"] for row in history.samples[1]]
    assert last[-4:] == [row["completion"] for row in history.samples[40]]


def test_completions_too_few():
    history = policy()
    few = {step: history.samples[step] for step in range(1, 20)}
    assert hacking.completions(replace(history, eval_samples={}, samples=few)) is None
