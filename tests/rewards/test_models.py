"""Reward models that judge rollouts, alone, by steps and several together; and their normalisation,
which lies in the checkpoint and survives whatever interrupts it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.apps.generate import complete
from jaxrlhf.config import (
    ListwiseRewardModelConfig,
    LoraConfig,
    RewardConfig,
    RewardModelConfig,
    load,
    save,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Rollout
from jaxrlhf.data.formats import Prompt
from jaxrlhf.mesh.notes import seal, unseal
from jaxrlhf.models.load import Loader
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.rewards.judge import make_judge
from jaxrlhf.rewards.models import load_scorer
from jaxrlhf.run import loop
from jaxrlhf.steps.score import reward, token_scores

MESH = runs.one_device()
TOKENIZER = load_tokenizer(f"words:{runs.WORDS}")
PROMPTS = [Prompt("the good", {}, "x:1"), Prompt("and", {}, "x:2")]


def rollout(*texts):
    """Prompt of one token, answers of up to five."""
    rows = [[*TOKENIZER.encode(text), 1] for text in texts]
    width = max(map(len, rows))
    real = np.array([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
    token = np.array([ids + [0] * (width - len(ids)) for ids in rows], np.int32)
    mask = (real * (np.arange(width) > 0)).astype(np.float32)
    zeros = np.zeros(token.shape, np.float32)
    ended = np.ones(len(rows), bool)
    arrays = (token, real.astype(np.int32), mask, zeros, zeros, ended)
    return Rollout(*map(jax.numpy.asarray, arrays))


ROWS = rollout("the good nice the bad", "and sad", "the warm the", "good the the kind the cold")


def trained(folder, config):
    folder.mkdir()
    config = replace(config, output=str(folder / "run"))
    return loop.train(config, MESH), config.output


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three reward models: adapters over one trunk, two plain and one normalised."""
    folder = tmp_path_factory.mktemp("members")
    samples = [{"prompt": "the", "completion": f"{word} good"} for word in runs.WORDS.split()]
    normalise_on = runs.write(folder / "samples.jsonl", samples)
    base = runs.reward_model(folder)
    base = replace(base, model=replace(base.model, lora=LoraConfig(rank=2, alpha=4)), steps=2)
    changes = ({}, {"centre_coef": 0.5}, {"normalise_on": normalise_on})
    return [
        trained(folder / str(i), replace(base, algorithm=RewardModelConfig(**change)))
        for i, change in enumerate(changes)
    ]


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("process")
    return trained(folder / "a", runs.of("process_reward_model", folder, steps=2))[1]


def scores(config, loader=None, rows=ROWS, vocab=16):
    with jax.set_mesh(MESH):
        scorer = load_scorer(config, loader or Loader(MESH), TOKENIZER, vocab, "rewards[0]")
        return np.asarray(scorer(rows))


def test_scorer_is_the_reward_of_the_network(members):
    loader = Loader(MESH)
    got = scores(RewardConfig(model=members[0][1]), loader)
    network = loader.trained(members[0][1])
    wanted = reward(
        network.model, network.params, ROWS.token_BT, ROWS.attention_mask_BT, network.lora
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_scorer_normalises(members):
    """The third run is the first but for its normalisation: same seed, same data."""
    measured = members[2][0]["normalisation"]
    raw, got = (scores(RewardConfig(model=members[i][1])) for i in (0, 2))
    np.testing.assert_allclose(got, (raw - measured["mean"]) / measured["std"], rtol=1e-4)
    assert np.abs(raw - got).max() > 0.1


def test_normalisation_is_of_its_rows(members):
    """Scored again, they have mean 0 and standard deviation 1."""
    config = load(Path(members[2][1]) / "config.yaml")
    lines = Path(config.algorithm.normalise_on).read_text().splitlines()
    texts = [f"{json.loads(line)['prompt']} {json.loads(line)['completion']}" for line in lines]
    got = scores(RewardConfig(model=members[2][1]), rows=rollout(*texts))
    assert got.mean() == pytest.approx(0, abs=1e-4)
    assert got.std() == pytest.approx(1, abs=1e-4)


def test_scorer_ensemble(members):
    """The members share their trunk: weights are read once."""
    folders = tuple(folder for _, folder in members)
    one_MB = np.stack([scores(RewardConfig(model=folder)) for folder in folders])
    wanted = {
        "mean": one_MB.mean(0),
        "min": one_MB.min(0),
        "lcb": one_MB.mean(0) - 0.5 * one_MB.std(0),
    }
    loader = Loader(MESH)
    for combine, wanted_B in wanted.items():
        k = 0.5 if combine == "lcb" else 1.0
        got = scores(RewardConfig(ensemble=folders, combine=combine, k=k), loader)
        np.testing.assert_allclose(got, wanted_B, rtol=1e-5, atol=1e-6, err_msg=combine)
    assert len(loader.weights) == 1


def test_judge_adds_an_ensemble_to_a_function(members):
    folders = tuple(folder for _, folder in members)
    sources = (RewardConfig(ensemble=folders, weight=2.0), runs.GOODNESS)
    with jax.set_mesh(MESH):
        judge = make_judge(sources, Loader(MESH), TOKENIZER, 16, "rewards")
        found = judge(ROWS, PROMPTS)
    name = f"mean({', '.join(folders)})"
    parts = np.asarray(found.parts[name]), np.asarray(found.parts["jaxrlhf.data.words:goodness"])
    np.testing.assert_allclose(found.reward_B, 2 * parts[0] + parts[1], rtol=1e-5)


def test_complete_with_a_normalised_reward_model(members, tmp_path):
    _, policy = trained(tmp_path / "policy", runs.sft(tmp_path, steps=1))
    wish = runs.SampleConfig(n=2, max_new_tokens=4)
    raw, got = (complete(policy, ("the",), wish, RewardConfig(model=members[i][1])) for i in (0, 2))
    measured = members[2][0]["normalisation"]
    wanted = [(r - measured["mean"]) / measured["std"] for _, r in raw[0]]
    np.testing.assert_allclose([r for _, r in got[0]], wanted, rtol=1e-3, atol=1e-4)


def test_scorer_reads_a_process_at_its_steps(process):
    loader = Loader(MESH)
    got = scores(RewardConfig(model=process), loader)
    network = loader.trained(process)
    score_BT = token_scores(
        network.model, network.params, ROWS.token_BT, ROWS.attention_mask_BT, network.lora
    )
    p_BT = 1 / (1 + np.exp(-np.asarray(score_BT)))
    ends = [[3, 5], [2], [2], [4, 6]]  # a "the" of the prompt ends none, one after another neither
    wanted = [p_BT[row, at].min() for row, at in enumerate(ends)]
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert ((got > 0) & (got < 1)).all()


def test_load_scorer_refuses_what_is_no_reward_model(tmp_path):
    save(runs.sft(tmp_path), tmp_path / "config.yaml")
    with pytest.raises(InputError, match=r"rewards\[0\]\.model=.*: a run of sft: give the folder"):
        scores(RewardConfig(model=str(tmp_path)))


def test_load_scorer_refuses_an_ensemble_of_two_kinds(members, process):
    plain = members[0][1]
    message = r"rewards\[0\]\.ensemble=.*: a run of {}, and its scores cannot be combined with"
    with pytest.raises(InputError, match=message.format("process_reward_model")):
        scores(RewardConfig(ensemble=(plain, process)))
    with pytest.raises(InputError, match=message.format("reward_model")):
        scores(RewardConfig(ensemble=(process, plain)))


def test_load_scorer_refuses_another_vocabulary(process):
    with pytest.raises(InputError, match=r"\.ensemble=.*: its vocabulary has 16 tokens, the pol"):
        scores(RewardConfig(ensemble=(process,) * 2), vocab=17)


def normalised(folder, **changes):
    samples = [{"prompt": "the", "completion": word} for word in runs.WORDS.split()]
    algorithm = ListwiseRewardModelConfig(
        normalise_on=runs.write(folder / "samples.jsonl", samples)
    )
    return runs.of("listwise_reward_model", folder, algorithm=algorithm, **changes)


def head_of(config):
    with jax.set_mesh(MESH):
        return Loader(MESH).trained(config.output).params["head"]


def test_normalisation_lies_in_the_checkpoint(tmp_path, monkeypatch):
    """One that has it is not measured again, whatever becomes of the summary; one without it is
    completed; and a longer run measures anew, as if it had not been interrupted."""
    config = normalised(tmp_path, steps=2)
    summary, saved = Path(config.output) / "summary.json", Path(config.output) / "checkpoints"
    measured, head = loop.train(config, MESH)["normalisation"], head_of(config)
    monkeypatch.delattr(loop, "measure_normalisation")
    assert loop.train(config, MESH)["normalisation"] == measured  # nothing to do
    summary.unlink()  # killed before it was written
    jax.tree.map(np.testing.assert_array_equal, head_of(config), head)
    assert loop.train(config, MESH)["normalisation"] == measured
    monkeypatch.undo()

    path = saved / "2" / "host" / "metadata"
    note = unseal(json.loads(path.read_text()))
    assert note["host"].pop("normalisation") == measured
    path.write_text(json.dumps(seal(note)))  # as it was saved, before it was measured
    summary.write_text(json.dumps({"steps": 2, "normalisation": measured}))
    with pytest.raises(InputError, match="scores are not normalised yet"):
        head_of(config)
    assert loop.train(config, MESH)["normalisation"] == measured
    jax.tree.map(np.testing.assert_array_equal, head_of(config), head)

    whole = tmp_path / "whole"
    whole.mkdir()
    once = loop.train(normalised(whole, steps=4), MESH)
    longer = loop.train(replace(config, steps=4), MESH)
    assert longer["normalisation"] == once["normalisation"] != measured
    assert json.loads(summary.read_text())["normalisation"]


def test_normalisation_that_fails_loses_no_training(tmp_path):
    """It comes after the last checkpoint, and the next launch measures without training again.

    Other columns of its rows are not read: here a score that is a text.
    """
    config = normalised(tmp_path, steps=2)
    kind = config.algorithm
    assert isinstance(kind, ListwiseRewardModelConfig)
    rows = Path(kind.normalise_on).read_text()
    runs.write(Path(kind.normalise_on), [{"prompt": "the", "completion": "good"}] * 3)
    with pytest.raises(InputError, match="all of its training is saved"):
        loop.train(config, MESH)
    metrics = (Path(config.output) / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="scores are not normalised yet"):
        head_of(config)
    scored = [{**json.loads(row), "score": "good"} for row in rows.splitlines()]
    runs.write(Path(kind.normalise_on), scored)
    measured = loop.train(config, MESH)["normalisation"]
    again = (Path(config.output) / "metrics.jsonl").read_text()
    assert again.startswith(metrics)  # the same lines, seconds and all
    assert measured["std"] > 0
    assert np.isfinite(head_of(config)["kernel"]).all()
