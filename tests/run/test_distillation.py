"""A student and its teacher through the loop, with answers of the data; and what is refused."""

import json
from dataclasses import replace

import pytest
import runs
from tiny_models import rigged_folder

from jaxrlhf.config import (
    GKDConfig,
    LoraConfig,
    OptimConfig,
    ReferenceConfig,
    SampleConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.batches import samples_at
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.run.loop import train
from jaxrlhf.run.setup import setup


def test_answers_of_the_data_are_learnt_too(tmp_path):
    """Adapters, λ = ½, and a teacher that says one word: the student comes to it."""
    words = runs.WORDS.split()
    rows = [{"prompt": f"{word} the", "completion": f" {word} and"} for word in words]
    base = runs.gkd(tmp_path)
    config = replace(
        base,
        algorithm=GKDConfig(beta=0.0, lmbda=0.5),
        model=replace(base.model, lora=LoraConfig(rank=4)),
        data=replace(base.data, train=runs.write(tmp_path / "answers.jsonl", rows)),
        sample=SampleConfig(max_new_tokens=4, n=1),
        optim=OptimConfig(learning_rate=3e-2),
        steps=8,
    )
    train(config, runs.one_device())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [x for x in map(json.loads, lines) if "loss" in x]
    own = [samples_at(0.5, config.seed, step) for step in range(8)]
    assert [bool(x["on_policy"]) for x in steps] == own
    assert 0 < sum(own) < 8
    for x, sampled in zip(steps, own, strict=True):
        assert ("entropy_estimate" in x) == sampled
        if not sampled:  # two words and the end
            assert x["length"] == 3
            assert x["ended"] == 1
    both = 1 + max(own.index(True), own.index(False))  # by then all is compiled
    assert [x["recompiles"] for x in steps[both:]] == [0] * (8 - both)
    assert steps[-1]["divergence"] < 0.5 * steps[0]["divergence"]


def test_an_answer_longer_than_a_response_is_refused(tmp_path):
    base = runs.gkd(tmp_path)
    rows = [{"prompt": "the", "completion": " good" * 8}]
    data = replace(base.data, train=runs.write(tmp_path / "long.jsonl", rows))
    config = replace(base, data=data, algorithm=GKDConfig(lmbda=0.5), sample=SampleConfig(8, n=1))
    with pytest.raises(InputError, match=r"long.jsonl:1: 9 tokens, and sample.max_new_tokens is 8"):
        setup(config, runs.one_device(), abstract=True)


@pytest.mark.parametrize(
    ("words", "vocab", "message"),
    [
        (runs.WORDS, 20, "a vocabulary of 20, and the policy's has 16: give one with"),
        (
            runs.WORDS.replace("nice", "fine"),
            16,
            r"another tokenizer: token 4 of its 16 is .fine., and of the policy's 16 .nice.",
        ),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(words, vocab, message, tmp_path):
    folder = rigged_folder(tmp_path / "other", load_tokenizer(f"words:{words}"), vocab)
    config = runs.gkd(tmp_path, reference=ReferenceConfig(folder))
    with pytest.raises(InputError, match=f"reference.path: {message}"):
        setup(config, runs.one_device(), abstract=True)
