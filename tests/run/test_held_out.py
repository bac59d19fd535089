"""What held-out rows say: of a policy with the same draws, of a reward model by its scores."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import runs
from runs import one_device

from jaxrlhf.config import (
    DataConfig,
    EvalConfig,
    ListwiseRewardModelConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    RewardConfig,
    RewardModelConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.data.formats import Completion, Pair, Ranked, Stepwise
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.data.words import goodness
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.run import loop
from jaxrlhf.run.held_out import evaluate, judge_scores, measure_normalisation
from jaxrlhf.run.setup import setup


def pair(gap=None, margin=0.0):
    columns = {} if gap is None else {"gap": gap}
    return Encoded([1], ([2, 3], [4]), Pair("a", "b c", "d", margin, columns, "x:1"))


def test_judge_scores_pairs():
    score = np.array([[1.0, 0], [0, 1], [2, 2], [5, 1]])
    rows = [pair(0.1), pair(0.7), pair(), pair(margin=0.5)]
    found, curve = judge_scores(RewardModelConfig(), list(zip(rows, score, strict=True)))
    assert found["accuracy"] == 0.625
    assert found["pairs"] == 4
    assert found["accuracy_large_gap"] == 0.5
    assert found["pairs_large_gap"] == 2
    assert [found[f"accuracy_gap_{i}"] for i in (1, 2, 3)] == [1, 1, 0]
    assert curve["gap_edges"] == [0.1, 0.5, 0.7]
    assert found["score_mean"] == 1.5
    x = np.array([1, 0, 0, 1, 2, 2, 5, 1.0])
    assert found["length_correlation"] == pytest.approx(np.corrcoef(x, [2, 1] * 4)[0, 1])
    assert sum(curve["count"]) == 4
    assert 0 < found["ece"] < 0.5


def test_judge_scores_rankings_compare_all_unequal_ranks():
    answers, columns = ([2], [3, 3], [4, 4, 4]), {"scores": [0.9, 0.1, 0.1]}
    source = Ranked("a", ("b", "c", "d"), (1, 2, 2), (True,) * 3, columns, "x:1")
    rows = [(Encoded([1], answers, source), np.array([1.0, 2, 0, 99]))]  # the fourth is absent
    found, _ = judge_scores(ListwiseRewardModelConfig(), rows)
    assert found["pairs"] == 2  # the tie is none
    assert found["accuracy"] == 0.5
    assert found["pairs_large_gap"] == 2
    assert found["score_mean"] == 1


def test_judge_scores_rankings_that_only_tie():
    source = Ranked("a", ("b", "c"), (1, 1), (True, True), {}, "x:1")
    found, curve = judge_scores(
        ListwiseRewardModelConfig(), [(Encoded([1], ([2], [3]), source), np.array([1.0, 2]))]
    )
    assert curve is None
    assert found["pairs"] == 0
    assert "accuracy" not in found


def test_judge_scores_answers():
    rows = [
        (Encoded([1], ([2],), Completion("a", "b", {"score": y}, "x:1")), np.array([s]))
        for s, y in [(1.0, 1.0), (-2.0, 0.0), (3.0, 0.0)]
    ]
    found, curve = judge_scores(PointwiseRewardModelConfig(), rows)
    assert curve is None
    assert found["correlation"] == pytest.approx(np.corrcoef([1, -2, 3], [1, 0, 0])[0, 1])
    assert found["rank_correlation"] == pytest.approx(0)
    found, curve = judge_scores(PointwiseRewardModelConfig(kind="binary"), rows)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert sum(curve["count"]) == 3


def test_judge_scores_steps():
    rows = []
    for labels, score in [((1.0, 0.0), [9, 1.0, 9, -2]), ((1.0, 1.0), [9, -1, 9, 2])]:
        source = Stepwise("a", "b\nc", "\n", labels, {}, "x:1")
        rows.append((Encoded([1], ([2, 3, 4],), source, (0, 2)), np.array([score], np.float32)))
    found, curve = judge_scores(ProcessRewardModelConfig(aggregate="last"), rows)
    assert found["accuracy"] == 0.75
    assert found["steps"] == 2
    assert found["score_mean"] == pytest.approx((0.1192029 + 0.8807971) / 2)
    assert sum(curve["count"]) == 4


def normalised(folder, rows):
    path = runs.write(folder / "samples.jsonl", rows)
    return runs.reward_model(folder, algorithm=RewardModelConfig(normalise_on=path))


def test_measure_normalisation_refuses_scores_without_spread(tmp_path):
    """Whatever the network: all rows are one."""
    config = normalised(tmp_path, [{"prompt": "the", "completion": "good"}] * 9)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = setup(config, mesh)
        with pytest.raises(InputError, match=r"normalise_on=.*: its 9 answers score .* no spread"):
            measure_normalisation(run, run.states["policy"].params)


def test_measure_normalisation_refuses_one_row(tmp_path):
    config = normalised(tmp_path, [{"prompt": "the", "completion": "good"}])
    with pytest.raises(InputError, match="one row has no spread"):
        setup(config, make_mesh(config.mesh, jax.devices()[:1]), abstract=True)


def test_train_on_held_out_ties_reports_no_accuracy(tmp_path):
    config = runs.of("listwise_reward_model", tmp_path, steps=1)
    tie = {"prompt": "the", "responses": ["good", "bad"], "ranks": [1, 1]}
    data = replace(config.data, eval=runs.write(tmp_path / "ties.jsonl", [tie] * 3))
    summary = loop.train(replace(config, data=data), runs.one_device())
    assert summary["pairs_after"] == 0
    assert not [name for name in summary if "accuracy" in name]
    assert "eval/accuracy" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_train_reports_calibration(tmp_path):
    config = replace(runs.reward_model(tmp_path), steps=2)
    summary = loop.train(config, make_mesh(config.mesh, jax.devices()[:1]))
    names = {"ece_before", "ece_after", "score_std_after", "length_correlation_after"}
    assert names <= summary.keys()
    assert sum(summary["reliability"]["count"]) == 10


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
        rewards=(RewardConfig("test_held_out:lacking", in_process=True),),
        data=DataConfig(
            train=runs.prompts(tmp_path),
            eval=runs.write(tmp_path / "held_out.jsonl", held_out),
            batch_size=8,
            max_prompt_tokens=4,
        ),
        eval=EvalConfig(
            n=2, batch_size=4, gold=(RewardConfig("test_held_out:never", in_process=True),)
        ),
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
