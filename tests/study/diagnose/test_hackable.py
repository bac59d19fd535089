"""A reward with a hole: the run is told to be hacked, its curve shows it, a strong KL helps."""

from dataclasses import replace
from pathlib import Path

import pytest
import runs

from jaxrlhf.config import ModelConfig, load
from jaxrlhf.data.words import write_corpus
from jaxrlhf.run import loop
from jaxrlhf.study.diagnose import diagnose, read_history

pytestmark = pytest.mark.slow


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


def test_hackable_is_diagnosed(hacked):
    found = {finding.name: finding for finding in diagnose(hacked)}
    assert found["reward_hacking"].severity == "problem"
    assert found["phrase_takeover"].severity == "problem"
    assert found["phrase_takeover"].evidence.startswith("'and' went from")


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


def test_hackable_curve_is_in_the_report(hacked):
    page = Path(hacked, "report.html").read_text(encoding="utf-8")
    assert "Gold against proxy" in page
    best = read_history(hacked).evaluation["gold"].argmax()
    assert best > 0
    assert page.count("<svg") >= 1


def test_hackable_strong_kl_helps(hacked, train):
    held = train(0.2)
    weak, strong = (read_history(run).evaluation["gold"][-1] for run in (hacked, held))
    assert strong > weak + 0.2
