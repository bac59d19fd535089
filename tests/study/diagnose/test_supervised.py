"""Reward models and DPO: chance, overfitting, falling log-probs, margins."""

import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from histories import STEPS, dpo, line, policy, reward_model, severity_of
from histories import offline as rows_of

from jaxrlhf.algorithms import kto
from jaxrlhf.config import (
    CPOConfig,
    DPOConfig,
    EvalConfig,
    KTOConfig,
    ListwiseRewardModelConfig,
    ORPOConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SimPOConfig,
)
from jaxrlhf.core.types import PreferenceBatch
from jaxrlhf.study.diagnose import supervised

ONES = np.ones(STEPS)


@pytest.mark.parametrize(
    ("accuracy", "severity", "words"),
    [
        (0.56, "problem", "0.560 ± 0.069 on 200 held-out pairs (step 40)"),
        (0.58, None, ""),
        (0.42, "problem", "below chance"),
    ],
)
def test_chance_accuracy_of_a_reward_model(accuracy, severity, words):
    found = supervised.chance_accuracy(reward_model({"accuracy": np.array([0.5, 0.7, accuracy])}))
    assert severity_of(found) == severity
    assert words in (found.evidence if found else "")


def test_chance_accuracy_of_others_is_a_warning():
    found = supervised.chance_accuracy(dpo({"accuracy": np.full(3, 0.5)}))
    assert severity_of(found) == "warning"


def test_chance_accuracy_needs_pairs():
    few = {"accuracy": np.full(3, 0.5), "pairs": np.full(3, 29.0)}
    assert supervised.chance_accuracy(reward_model(few)) is None


def test_chance_accuracy_counts_the_pairs_of_rankings():
    """20 rankings of four have 120 pairs, and 0.56 is within 0.5 ± 0.089."""
    rankings = {"accuracy": np.full(3, 0.56), "rows": np.full(3, 20.0), "pairs": np.full(3, 120.0)}
    finding = supervised.chance_accuracy(rows_of(ListwiseRewardModelConfig(), rankings))
    assert "0.560 ± 0.089 on 120 held-out pairs" in finding.evidence
    assert finding.severity == "problem"


@pytest.mark.parametrize(
    "kind", [KTOConfig(), PointwiseRewardModelConfig(kind="binary"), ProcessRewardModelConfig()]
)
def test_chance_accuracy_needs_something_to_compare(kind):
    """Of labels, 0.5 may be far above or below what guessing gets."""
    assert supervised.chance_accuracy(rows_of(kind, {"accuracy": np.full(3, 0.5)})) is None


@pytest.mark.parametrize(
    ("loss", "severity"),
    [([0.69, 0.5, 0.56], "warning"), ([0.69, 0.5, 0.77], "problem"), ([0.69, 0.5, 0.54], None)],
)
def test_overfitting_loss(loss, severity):
    found = supervised.overfitting(reward_model({"loss": np.array(loss)}))
    assert severity_of(found) == severity


def test_overfitting_of_a_run_that_ends_with_its_best():
    """Loss is least at step 20: neither its rise nor the gap after it are in the run's policy."""
    figures = {"loss": np.array([0.69, 0.5, 0.9]), "accuracy": np.array([0.5, 0.8, 0.6])}
    rising = np.where(np.arange(STEPS) < 20, 0.85, 1.0)
    history = reward_model(figures, accuracy=rising)
    assert severity_of(supervised.overfitting(history)) == "problem"
    patient = replace(history.config, eval=EvalConfig(every=20, patience=1))
    assert supervised.overfitting(replace(history, config=patient)) is None
    figures["accuracy"][1] = 0.65
    gap = reward_model(figures, accuracy=rising)
    finding = supervised.overfitting(replace(gap, config=patient))
    assert finding.evidence == (
        "accuracy 0.850 in training (steps 17-20), 0.650 held out (step 20)"
    )


def test_overfitting_accuracy():
    wide = reward_model({"accuracy": np.array([0.5, 0.8, 0.7])}, accuracy=0.9 * ONES)
    finding = supervised.overfitting(wide)
    assert "accuracy 0.900 in training (steps 33-40), 0.700 held out" in finding.evidence
    near = reward_model({"accuracy": np.array([0.5, 0.8, 0.76])}, accuracy=0.9 * ONES)
    assert supervised.overfitting(near) is None


@pytest.mark.parametrize(
    ("end", "severity"), [(1.6, None), (1.9, "warning"), (3.5, "problem"), (1.0, None)]
)
def test_chosen_logp_falls(end, severity):
    found = supervised.chosen_logp_falls(dpo(nll=line(1.5, end, 0.02)))
    assert severity_of(found) == severity


def test_chosen_logp_falls_of_desirable_answers():
    """KTO as it should be: those marked true get likelier, the others less so."""
    share = 0.5 + 0.2 * np.sin(np.arange(STEPS))  # of the batch is desirable
    logp_IBCT = np.zeros((STEPS, 2, 2, 2), np.float32)
    logp_IBCT[:, 0, 0, 1], logp_IBCT[:, 1, 0, 1] = line(-1.5, -1.0), line(-1.5, -5.0)
    nll, desirable = [], []
    for logp_BCT, part in zip(logp_IBCT, share, strict=True):
        batch = PreferenceBatch(
            token_BCT=jnp.zeros((2, 2, 2), jnp.int32),
            attention_mask_BCT=jnp.ones((2, 2, 2), jnp.int32),
            margin_B=jnp.zeros(2),
            weight_B=jnp.array([part, 1 - part]),
            mask_BCT=jnp.ones((2, 2, 2)).at[:, :, 0].set(0),
            ref_logp_BCT=jnp.full((2, 2, 2), -1.5),
            label_B=jnp.array([1.0, 0]),
        )
        _, metrics = kto(KTOConfig()).loss(jnp.array(logp_BCT), batch)
        nll.append(float(metrics["nll"]))
        desirable.append(float(metrics["desirable"]))
    given = {"nll": np.array(nll), "desirable": np.array(desirable)}
    assert supervised.chosen_logp_falls(rows_of(KTOConfig(), **given)) is None
    worse = {**given, "nll": line(1.5, 3.5) * share}
    finding = supervised.chosen_logp_falls(rows_of(KTOConfig(), **worse))
    assert finding.severity == "problem"
    assert "1.68 (steps 1-8) → 3.32 (steps 33-40)" in finding.evidence


def test_margin_explosion():
    for margin, expected in ((19, None), (21, "warning"), (101, "problem")):
        assert severity_of(supervised.margin_explosion(dpo(margin=margin * ONES))) == expected
    assert "centre_coef" in supervised.margin_explosion(reward_model(margin=30 * ONES)).remedy


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DPOConfig(), ["label_smoothing"]),
        (DPOConfig(kind="exo_pair", label_smoothing=0.1), ["label_smoothing"]),
        (DPOConfig(kind="robust"), []),  # there it asks for more
        (DPOConfig(kind="apo_zero"), []),
        (DPOConfig(kind="apo_down"), []),
        (CPOConfig(), ["label_smoothing"]),
        (SimPOConfig(), []),
        (ORPOConfig(), []),
        (RewardModelConfig(), ["centre_coef", "score_l2", "label_smoothing"]),
        (ListwiseRewardModelConfig(), ["score_l2"]),
    ],
)
def test_margin_explosion_names_what_there_is(kind, options):
    finding = supervised.margin_explosion(rows_of(kind, margin=30 * ONES))
    assert re.findall(r"algorithm\.(\w+)", finding.remedy) == options
    assert finding.remedy.startswith(f"lower optim.learning_rate or steps{';,'[bool(options)]} ")


@pytest.mark.parametrize("kind", ["ipo", "hinge", "sppo_hard"])
def test_margin_explosion_is_of_sigmoids(kind):
    assert supervised.margin_explosion(rows_of(DPOConfig(kind=kind), margin=500 * ONES)) is None


@pytest.mark.parametrize(
    "detect",
    [
        supervised.chance_accuracy,
        supervised.overfitting,
        supervised.chosen_logp_falls,
        supervised.margin_explosion,
    ],
)
def test_offline_detectors_leave_policies_alone(detect):
    history = policy(nll=line(1, 9), margin=500 * ONES, accuracy=ONES)
    assert detect(history) is None
