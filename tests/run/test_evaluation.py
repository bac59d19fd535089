"""What a run measures on held-out prompts where some, or all, have no reward."""

import json

import jax
import numpy as np
import pytest
import runs
from test_loop import one_device

from jaxrlhf.config import DataConfig, EvalConfig, RewardConfig
from jaxrlhf.data.words import goodness
from jaxrlhf.run import loop
from jaxrlhf.run.held_out import evaluate
from jaxrlhf.run.setup import setup


def lacking(prompts, completions, **_):
    """Goodness; none for the prompt that is not trained on."""
    pairs = zip(prompts, goodness(prompts, completions), strict=True)
    return [None if prompt == "sad sad" else score for prompt, score in pairs]


def never(prompts, completions, **_):
    return [None] * len(completions)


def test_evaluate_policy_goes_on_without_rewards(tmp_path, caplog):
    """The last of five prompts fills its batch of four and has no reward; gold has none at all."""
    held_out = [{"prompt": text} for text in ("the", "and", "bad", "good", "sad sad")]
    config = runs.ppo(
        tmp_path,
        steps=1,
        rewards=(RewardConfig("test_evaluation:lacking"),),
        data=DataConfig(
            train=runs.prompts(tmp_path),
            eval=runs.write(tmp_path / "held_out.jsonl", held_out),
            batch_size=8,
            max_prompt_tokens=4,
        ),
        eval=EvalConfig(n=2, batch_size=4, gold=(RewardConfig("test_evaluation:never"),)),
    )
    summary = loop.train(config, one_device())
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] == 1 and "proxy" in row]
    assert len(rows) == 10
    assert [row["proxy"] for row in rows[8:]] == [None, None]
    known = goodness([], [row["completion"] for row in rows[:8]])
    assert summary["proxy_after"] == pytest.approx(np.mean(known))
    assert all(row["gold"] is None for row in rows)
    assert "eval/proxy: 2 of 10 completions have none" in caplog.text
    assert "eval/gold: 10 of 10 completions have none" in caplog.text


def test_evaluate_policy_draws_the_same_in_any_batches(tmp_path):
    def texts(batch_size):
        held_out = [{"prompt": text} for text in ("the", "and", "bad", "the", "sad sad")]
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        train = runs.prompts(folder)
        held_out = runs.write(folder / "held_out.jsonl", held_out)
        config = runs.ppo(
            folder,
            data=DataConfig(train=train, eval=held_out, batch_size=8, max_prompt_tokens=4),
            eval=EvalConfig(n=3, batch_size=batch_size),
        )
        mesh = one_device()
        with jax.set_mesh(mesh):
            run = setup(config, mesh)
            samples = evaluate(run, run.states["policy"].params).samples
        return [(row["prompt"], row["completion"]) for row in samples]

    whole = texts(5)
    assert texts(2) == whole
    assert whole[:3] != whole[9:12]  # of one prompt, but of two rows
