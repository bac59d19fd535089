"""Which reader a run's rows go through, and what it is told."""

from dataclasses import replace
from typing import get_args

import pytest
import runs

from jaxrlhf.config import (
    AlgorithmConfig,
    OfflineConfig,
    PointwiseRewardModelConfig,
    RewardModelConfig,
    normalise_path,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import READERS
from jaxrlhf.data.tokens import load_data, load_normalise_rows
from jaxrlhf.models.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(f"words:{runs.WORDS}")


def test_every_kind_of_rows_has_a_reader():
    kinds = [kind for kind in get_args(AlgorithmConfig) if issubclass(kind, OfflineConfig)]
    assert {kind.rows for kind in kinds} == READERS.keys()


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("listwise_reward_model", [2, 3, 4]),
        ("pointwise_reward_model", [1, 1, 1]),
        ("process_reward_model", [1, 1, 1]),
    ],
)
def test_load_data_reads_rows_for_reward_models(name, answers, tmp_path):
    config = runs.of(name, tmp_path)
    rows = load_data(config, config.data.train, TOKENIZER, 16).items
    assert [len(row.answers) for row in rows[:3]] == answers
    if name == "process_reward_model":  # its separator is read
        assert [len(row.ends) for row in rows[:2]] == [1, 2]


def test_load_data_tells_a_classifier_that_scores_are_probabilities(tmp_path):
    config = runs.of("pointwise_reward_model", tmp_path)
    row = {"prompt": "the", "completion": "good", "score": 2.0}
    path = runs.write(tmp_path / "rows.jsonl", [row])
    assert len(load_data(config, path, TOKENIZER, 16)) == 1
    config = replace(config, algorithm=PointwiseRewardModelConfig(kind="binary"))
    with pytest.raises(InputError, match=r"rows.jsonl:1: score=2: a probability is in"):
        load_data(config, path, TOKENIZER, 16)


def test_normalise_path_of_runs_without_scores(tmp_path):
    assert normalise_path(runs.sft(tmp_path)) == ""
    assert normalise_path(runs.of("process_reward_model", tmp_path)) == ""


def test_load_normalise_rows_takes_the_first_128(tmp_path):
    words = runs.WORDS.split()
    rows = [{"prompt": words[i % 14], "completion": words[(i + 1) % 14]} for i in range(130)]
    path = runs.write(tmp_path / "samples.jsonl", rows)
    config = runs.reward_model(tmp_path, algorithm=RewardModelConfig(normalise_on=path))
    found = load_normalise_rows(config, TOKENIZER, 16)
    assert [row.source.prompt for row in found.items] == [row["prompt"] for row in rows[:128]]
