"""The demo end to end, as a user runs it, on the tiny model."""

import json

import pytest
from command import run

from jaxrlhf.apps.demo import HELD_OUT, OPENINGS
from jaxrlhf.config import check, load
from jaxrlhf.config.load import packaged
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tasks import write_sums
from jaxrlhf.data.words import BAD, STEP_END, goodness, hackable, write_corpus
from jaxrlhf.rewards.functions import resolve


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_tiny_raises_the_reward(seed, tmp_path):
    words = ["demo", "--tiny", "--seed", str(seed), "--output", str(tmp_path / "demo")]
    done = run(*words, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["gold_after"] - summary["gold_before"] > 0.4
    assert summary["gold_rise"] - summary["gold_rise_ci"] > 0.3
    assert summary["proxy_after"] > summary["proxy_before"]
    assert summary["reward_model_accuracy"] > 0.85
    assert 0 < summary["kl_nats"] < 12
    assert summary["tokens_per_second"] > 0
    assert {"pairs", "reward_model/update", "ppo/sample"} <= set(summary["seconds"])
    assert "gold measure" in done.stdout


@pytest.mark.parametrize("name", sorted(p.name for p in packaged(".").glob("*.yaml")))
def test_configs_load_and_pass_their_checks(name):
    check(load(packaged(name)))


def test_openings_are_apart_and_neutral():
    train, held_out = (
        [row.values["prompt"] for row in read_rows(path).items] for path in (OPENINGS, HELD_OUT)
    )
    assert len(train) >= 64
    assert len(held_out) >= 32
    assert not set(train) & set(held_out)
    assert set(resolve("sentiment")([""] * len(train), train)) == {0.0}


def test_goodness_is_the_balance_of_words():
    assert goodness([""] * 3, ["good bad nice the", "", "poor"]) == [0.25, 0.0, -1.0]


def test_hackable_pays_most_for_and():
    texts = ["good good", "and and and", "good and bad the", ""]
    assert hackable([""] * 4, texts) == [1.0, 1.5, 0.375, 0.0]


def test_write_corpus_is_the_same_for_a_seed(tmp_path):
    texts = []
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name, seed)
        texts.append((tmp_path / name / "sft.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_write_corpus_labels_steps_without_bad_words(tmp_path):
    write_corpus(tmp_path, 0)
    for row in read_rows(str(tmp_path / "steps.jsonl")).items:
        steps = row.values["steps"]
        good = [not set(step.split()) & set(BAD) for step in steps]
        assert good == row.values["labels"]
        assert STEP_END not in " ".join(steps)


def test_write_sums_labels_until_the_first_mistake(tmp_path):
    write_sums(tmp_path, 0, rows=50)
    wrong = 0
    for row in read_rows(str(tmp_path / "steps.jsonl")).items:
        sums = [step.split(" = ") for step in row.values["steps"]]
        right = [sum(map(int, left.split(" + "))) == int(total) for left, total in sums]
        assert row.values["labels"] == [all(right[: i + 1]) for i in range(len(right))]
        wrong += not all(right)
    assert 10 < wrong < 40
