"""The batch of each step, and what is shown of the first."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.config import DPOConfig, MeshConfig
from jaxrlhf.data.batches import order
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.run.feed import batches, example, host_batch, packing_metrics
from jaxrlhf.run.setup import setup


@pytest.fixture
def ready():
    """A run without its weights, and so without a compilation."""

    def make(config):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(mesh):
            return setup(config, mesh, abstract=True)

    return make


def test_batches_follow_the_order_of_rows(ready, tmp_path):
    run = ready(runs.sft(tmp_path))
    chosen = [run.train_rows.items[i] for i in order(14, 8, 0, 3)]
    expected = host_batch(run, chosen)
    found = batches(run)(3)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.segment_BT is None
    assert packing_metrics(found) == {}


@pytest.mark.parametrize(("context", "width"), [(1, 5), (2, 6), (8, 8)])
def test_batches_are_as_wide_as_the_longest_row(context, width, tmp_path):
    """However many ``max_tokens`` are allowed: 5 tokens, rounded up to what ``context`` divides."""
    config = runs.sft(tmp_path)
    config = replace(config, data=replace(config.data, max_tokens=64, eval=config.data.train))
    mesh = make_mesh(MeshConfig(context=context), jax.devices()[:context])
    with jax.set_mesh(mesh):
        run = setup(config, mesh, abstract=True)
        assert batches(run)(0).token_BT.shape == (8, width)


def test_batches_are_as_wide_as_a_longer_row_that_is_held_out(ready, tmp_path):
    rows = [{"prompt": "the the", "completion": "good and good and"}]
    config = runs.sft(tmp_path)
    held_out = runs.write(tmp_path / "held_out.jsonl", rows)
    run = ready(replace(config, data=replace(config.data, eval=held_out)))
    assert batches(run)(0).token_BT.shape == (8, 7)


def test_batches_have_as_many_answers_as_a_longer_ranking_that_is_held_out(ready, tmp_path):
    answers = ["good", "kind", "nice", "bad", "sad", "dark"]
    row = {"prompt": "the", "responses": answers, "ranks": [1, 2, 3, 4, 5, 6]}
    config = runs.of("listwise_reward_model", tmp_path)
    held_out = runs.write(tmp_path / "held_out.jsonl", [row])
    run = ready(replace(config, data=replace(config.data, eval=held_out)))
    assert max(len(row.answers) for row in run.train_rows.items) < 6
    assert batches(run)(0).token_BCT.shape[1] == 6


def test_batches_packed_hold_every_row_once_an_epoch(ready, tmp_path):
    """14 rows of 5 tokens, 4 to a row of 20: an epoch is 4 packed rows, two steps."""
    run = ready(runs.sft_packed(tmp_path))
    batch_of = batches(run)
    for epoch in range(2):
        steps = [batch_of(2 * epoch + i) for i in range(2)]
        words = run.tokenizer.decode(np.concatenate([b.token_BT.ravel() for b in steps])).split()
        assert all(words.count(word) == 2 for word in runs.WORDS.split() if word not in "the and")
        assert sum(packing_metrics(b)["rows"] for b in steps) == 14
        real = sum(packing_metrics(b)["packing_efficiency"] * b.token_BT.size for b in steps)
        assert real == pytest.approx(70)


def test_example_of_rows(ready, tmp_path):
    shown = example(ready(runs.sft(tmp_path)))
    word = shown.split()[1]
    assert shown == f"the⟦ {word} and {word} <eos>⟧"
    assert example(ready(runs.sft_packed(tmp_path))).count("⟦") == 1
    pair = example(ready(replace(runs.reward_model(tmp_path), algorithm=DPOConfig()))).split("\n")
    assert [line[:4] for line in pair] == ["[1] ", "[2] "]
    assert pair[0].endswith(" nice <eos>⟧")


def test_example_on_policy_is_a_prompt(ready, tmp_path):
    assert example(ready(runs.ppo(tmp_path))).endswith(" the⟦…⟧")
