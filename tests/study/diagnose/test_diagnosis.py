"""All detectors together: silent on what is well, each speaks of its own illness."""

import histories
import numpy as np
import pytest
import runs

from jaxrlhf.config import DPOConfig, EvalConfig, GRPOConfig, OptimConfig
from jaxrlhf.run import loop
from jaxrlhf.study.diagnose import DETECTORS, diagnose, examine
from jaxrlhf.study.diagnose.history import Series


@pytest.mark.parametrize("kind", histories.HEALTHY)
def test_examine_healthy_finds_nothing(kind):
    assert examine(histories.HEALTHY[kind]) == []


def test_every_detector_has_an_illness():
    assert histories.ILL.keys() == DETECTORS.keys()


@pytest.mark.parametrize("name", DETECTORS)
def test_examine_ill_is_found(name):
    (found,) = [f for f in examine(histories.ILL[name]) if f.name == name]
    assert any(digit in found.evidence for digit in "0123456789")
    assert found.remedy
    assert DETECTORS[name](histories.ILL[name]) == [found]


def test_examine_puts_problems_first():
    history = histories.policy(
        skipped=np.where(np.arange(histories.STEPS) == 3, 0.5, 0),
        kl=histories.line(0, -3, 0.2),
        valid=histories.line(0.8, 0.8, 0.02),
    )
    found = [(f.name, f.severity) for f in examine(history)]
    assert found == [
        ("kl_negative", "problem"),
        ("non_finite_updates", "warning"),
        ("excluded_rows", "warning"),
    ]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_need_no_metric(name):
    """A run of one iteration that logged nothing but its loss."""
    bare = Series(np.array([1]), {"loss": np.array([0.5])})
    for healthy in histories.HEALTHY.values():
        none = Series(np.array([], int), {})
        history = type(healthy)(healthy.config, bare, none)
        assert DETECTORS[name](history) == []


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11])
def test_detectors_take_short_runs(steps):
    for history in histories.ILL.values():
        training = Series(
            history.training.step_I[:steps],
            {name: x[:steps] for name, x in history.training.values.items()},
        )
        examine(type(history)(history.config, training, history.evaluation))


TINY = OptimConfig(learning_rate=3e-3)


@pytest.mark.parametrize(
    "kind",
    [
        lambda folder: runs.ppo(folder, steps=12, optim=TINY),
        lambda folder: runs.ppo(folder, algorithm=GRPOConfig(), steps=12, optim=TINY),
        lambda folder: runs.reward_model(folder, steps=24, optim=TINY),
        lambda folder: runs.reward_model(
            folder, algorithm=DPOConfig(), steps=24, optim=TINY, eval=EvalConfig(every=8)
        ),
    ],
    ids=["ppo", "grpo", "reward_model", "dpo"],
)
def test_diagnose_real_run_has_no_problem(kind, tmp_path):
    config = kind(tmp_path)
    loop.train(config)
    assert [f for f in diagnose(config.output) if f.severity == "problem"] == []
