"""All detectors together: silent on what is well, each speaks of its own illness, in a run too.

What is printed and written of findings. A reward with a hole: the run is told to be hacked, its
curve shows it, a strong KL helps.
"""

import json
from dataclasses import replace
from pathlib import Path

import histories
import numpy as np
import pytest
import runs

from jaxrlhf.config import DPOConfig, EvalConfig, GRPOConfig, ModelConfig, OptimConfig, load
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.words import write_corpus
from jaxrlhf.run import loop
from jaxrlhf.study.diagnose import (
    DETECTORS,
    diagnose,
    examine,
    lines,
    read_history,
    save,
    show,
    to_json,
)
from jaxrlhf.study.diagnose.history import Series

ILL = histories.ILL["kl_negative"]


@pytest.mark.parametrize("kind", histories.HEALTHY)
def test_examine_healthy_finds_nothing(kind):
    assert examine(histories.HEALTHY[kind]) == []


def test_every_detector_has_an_illness():
    assert list(histories.ILL) == list(DETECTORS)  # which is the order of what is found


@pytest.mark.parametrize("name", DETECTORS)
def test_examine_ill_is_found(name):
    (found,) = [f for f in examine(histories.ILL[name]) if f.name == name]
    assert any(digit in found.evidence for digit in "0123456789")
    assert found.remedy
    assert DETECTORS[name](histories.ILL[name]) == found


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
        assert DETECTORS[name](history) is None


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11])
def test_detectors_take_short_runs(steps):
    for history in histories.ILL.values():
        training = Series(
            history.training.step_I[:steps],
            {name: x[:steps] for name, x in history.training.values.items()},
        )
        examine(type(history)(history.config, training, history.evaluation))


def test_to_json_has_the_step_and_four_fields():
    found = json.loads(to_json(ILL, examine(ILL)))
    assert found["step"] == histories.STEPS
    (row,) = found["findings"]
    assert list(row) == ["name", "severity", "evidence", "remedy"]
    assert (row["name"], row["severity"]) == ("kl_negative", "problem")


def test_save_writes_diagnosis(tmp_path):
    save(tmp_path, ILL, examine(ILL))
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert found["findings"][0]["name"] == "kl_negative"


def test_save_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"diagnosis\.json: cannot be written \(No such file"):
        save(tmp_path / "no", ILL, [])


def test_show_is_plain_where_nobody_looks(capsys):
    show("runs/x", ILL, examine(ILL))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[:3] == [
        "runs/x: ppo, 40 of 100 iterations, 3 evaluations",
        "",
        "PROBLEM  kl_negative",
    ]


def test_lines_say_what_was_not_looked_at():
    texts = [text for text, _ in lines("x", histories.HEALTHY["ppo"], [])]
    assert texts[1:] == ["nothing found"]
    bare = histories.policy()
    del bare.evaluation.values["gold"]
    texts = [text for text, _ in lines("x", bare, [])]
    assert texts[1:] == [
        "nothing found",
        "not looked at: gold against proxy (there is no eval.gold)",
    ]
    texts = [text for text, _ in lines("x", histories.HEALTHY["dpo"], [])]
    assert texts[1:] == ["nothing found"]


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


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains configs/hackable_tiny.yaml from a fresh model, at a coefficient of the KL."""
    folder = tmp_path_factory.mktemp("hackable")
    write_corpus(folder, 0)
    config = load("configs/hackable_tiny.yaml")
    files = {"train": str(folder / "prompts.jsonl"), "eval": str(folder / "held_out.jsonl")}

    def train(kl_coef):
        run = replace(
            config,
            algorithm=replace(config.algorithm, kl_coef=kl_coef),
            model=ModelConfig(decoder=runs.DECODER, tokenizer=f"words:{runs.WORDS}"),
            data=replace(config.data, **files),
            output=str(folder / f"kl-{kl_coef}"),
        )
        loop.train(run)
        return run.output

    return train


@pytest.fixture(scope="module")
def hacked(train):
    return train(0.0)


@pytest.mark.slow
def test_hackable_is_diagnosed(hacked):
    found = {finding.name: finding for finding in diagnose(hacked)}
    assert found["reward_hacking"].severity == "problem"
    assert found["phrase_takeover"].severity == "problem"
    assert found["phrase_takeover"].evidence.startswith("'and' went from")


@pytest.mark.slow
def test_hackable_curve_turns(hacked):
    """The proxy rises over the KL; gold rises with it at first, then falls."""
    curve = read_history(hacked).evaluation
    gold, proxy, kl = curve["gold"], curve["proxy"], curve["kl_nats"]
    best = gold.argmax()
    assert 0 < best < len(gold) - 1
    assert gold[best] > gold[0] + 0.2
    assert gold[-1] < gold[best] - 0.2
    assert proxy[-1] > proxy[best] > proxy[0]
    assert kl[-1] > kl[best] > kl[0]


@pytest.mark.slow
def test_hackable_curve_is_in_the_report(hacked):
    page = Path(hacked, "report.html").read_text(encoding="utf-8")
    assert "Gold against proxy" in page
    best = read_history(hacked).evaluation["gold"].argmax()
    assert best > 0
    assert page.count("<svg") >= 1


@pytest.mark.slow
def test_hackable_strong_kl_helps(hacked, train):
    held = train(0.2)
    weak, strong = (read_history(run).evaluation["gold"][-1] for run in (hacked, held))
    assert strong > weak + 0.2
