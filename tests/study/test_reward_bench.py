"""A reward model's accuracy by subset: by hand, and of a folder that transformers scores too."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny_models
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from jaxrlhf.apps import cli
from jaxrlhf.config import EvaluateConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.chat import PLAIN
from jaxrlhf.study import reward_bench

WORDS = ("good", "bad", "he", "go", "hello", "bye", "no", "yes")


def rows(count=14):
    """Pairs of text, as RewardBench's file has them."""
    subsets = ("mt-bench-easy", "mt-bench-med", "mine")
    return [
        {
            "prompt": f"{WORDS[i % 8]} {i}?",
            "chosen": f"{WORDS[(3 * i + 1) % 8]} {'he ' * (i % 4)}",
            "rejected": f"{WORDS[(5 * i + 4) % 8]}.",
            "subset": subsets[i % 3],
            "chosen_model": "a",
            "id": i,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """(folder of a sequence classifier, r(text) by transformers)."""
    folder = str(tmp_path_factory.mktemp("judge"))
    tokenizer = tiny_models.byte_level()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64, num_labels=1,
        pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)

    def score(text):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            return float(model.eval()(ids).logits[0, 0])

    return folder, score


CHAT = "<|user|>{prompt}<|end|><|assistant|>{answer}<|end|><eos>"


def test_the_command_agrees_with_transformers(judge, tmp_path, capsys):
    """Rows of text as a chat."""
    folder, score = judge
    path = runs.write(tmp_path / "pairs.jsonl", rows())
    score_N2 = np.array(
        [
            [score(CHAT.format(prompt=row["prompt"], answer=row[name]))
             for name in ("chosen", "rejected")]
            for row in rows()
        ]
    )  # fmt: skip
    right_N = score_N2[:, 0] > score_N2[:, 1]
    words = ["eval", folder, "--data", path, "--output", str(tmp_path), "--rows", "4"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / reward_bench.FILE).read_text(encoding="utf-8"))
    assert 0 < right_N.mean() < 1  # or nothing would be seen
    assert found["accuracy"] == pytest.approx(right_N.mean())
    assert found["score_mean"] == pytest.approx(score_N2.mean(), abs=1e-4)
    assert found["score_std"] == pytest.approx(score_N2.std(), abs=1e-4)
    for i, name in enumerate(("mt-bench-easy", "mt-bench-med", "mine")):
        assert found["subsets"][name]["accuracy"] == pytest.approx(right_N[i::3].mean())
    easy, medium = right_N[0::3].mean(), right_N[1::3].mean()
    section = found["sections"]["Chat"]
    assert section["accuracy"] == pytest.approx((28 * easy + 40 * medium) / 68)
    assert section["pairs"] == 10
    assert list(found["sections"]) == ["Chat"]
    assert "score" not in found  # of a part of the subsets there is none
    assert re.search(r"Chat +[\d.]+ ± [\d.]+ +10 *\n", out)


def test_figures_of_a_reward_model_by_url(judge, store, tmp_path, capsys):
    """So is where they go; what is no run has no place of its own for them."""
    for path in filter(Path.is_file, Path(judge[0]).rglob("*")):
        store.pipe_file(f"/bucket/judge/{path.name}", path.read_bytes())
    pairs = runs.write(tmp_path / "pairs.jsonl", rows())
    words = ["eval", "memory://bucket/judge", "--data", pairs, "--rows", "4"]
    assert cli.main(words) == 2
    assert "memory://bucket/judge is no run's folder" in capsys.readouterr().err
    assert cli.main([*words, "--output", "memory://bucket/figures"]) == 0
    there = json.loads(store.cat_file(f"/bucket/figures/{reward_bench.FILE}"))
    assert there["pairs"] == 14


def test_text_becomes_a_chat_unless_raw(tmp_path):
    tokenizer = tiny_models.byte_level()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    given = [*rows(1), {"chosen": chat, "rejected": [chat[0], {**chat[1], "content": "c"}]}]
    path = runs.write(tmp_path / "pairs.jsonl", given)
    texts = {
        raw: [
            (pair.prompt, pair.chosen)
            for pair in reward_bench.read(path, tokenizer, PLAIN, raw).items
        ]
        for raw in (False, True)
    }
    rendered = ("<|user|>a<|end|><|assistant|>", "b<|end|>")
    first = given[0]
    assert texts[True] == [(first["prompt"], first["chosen"]), rendered]
    asked = f"<|user|>{first['prompt']}<|end|><|assistant|>"
    assert texts[False] == [(asked, f"{first['chosen']}<|end|>"), rendered]


def test_figures_by_hand():
    """Three right of five known, one of them a tie; calibration of what is known."""
    score_N2 = np.array([[1, 0], [2, 1], [0, 3], [1, 1], [4, 0], [np.nan, 0]], float)
    length_N2 = np.ones((6, 2))
    found = reward_bench.figures(score_N2, ["a", "a", "a", "b", "b", "b"], length_N2)
    assert found["accuracy"] == 0.7
    assert (found["pairs"], found["unknown"]) == (5, 1)
    assert found["subsets"]["a"]["accuracy"] == pytest.approx(2 / 3)
    assert found["subsets"]["b"]["accuracy"] == 0.75
    assert found["sections"] == {}
    said = 1 / (1 + np.exp(-np.abs([1, 1, -3, 0, 4])))
    assert found["ece"] == pytest.approx(abs(said.mean() - 0.7))  # five pairs are one bin


def test_the_score_is_the_mean_of_four_sections():
    names = [name for text in reward_bench.SECTIONS.values() for name in text.split()]
    assert sorted(names) == sorted(reward_bench.PAIRS)
    wrong = {"donotanswer", "hep-rust"}
    score_N2 = np.array([[0.0, 1.0] if name in wrong else [1.0, 0.0] for name in names])
    found = reward_bench.figures(score_N2, names, np.ones((len(names), 2)))
    safety, reasoning = 1 - 136 / 740, 1 - 164 / 1968
    assert found["sections"]["Safety"]["accuracy"] == pytest.approx(safety)
    assert found["score"] == pytest.approx((2 + safety + reasoning) / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 4}, "n=4: not read where a reward model judges pairs: leave it out"),
        ({"data": ""}, "data: missing: give a file of pairs"),
        ({"output": ""}, "output: missing: .* give one for reward_bench.json"),
    ],
)
def test_refusals(judge, changes, message, tmp_path):
    given = {"data": "x.jsonl", "output": str(tmp_path), **changes}
    with pytest.raises(InputError, match=message):
        reward_bench.measure(EvaluateConfig(judge[0], **given))


def test_a_policy_has_no_raw(tmp_path, capsys):
    assert cli.main(["eval", "smollm2", "--data", "x.jsonl", "--raw", "--output", "x"]) == 2
    assert "raw: a policy continues prompts of text as they are" in capsys.readouterr().err
