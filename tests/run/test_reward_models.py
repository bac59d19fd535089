"""A reward model recovers the utilities that rankings were drawn from."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import runs

from jaxrlhf.config import EvalConfig, ListwiseRewardModelConfig, OptimConfig
from jaxrlhf.core.stats import rank_correlation
from jaxrlhf.data.batches import scored_batch
from jaxrlhf.data.formats import read_scored
from jaxrlhf.data.rows import read_rows
from jaxrlhf.data.tokens import encode_rows
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.load import Loader
from jaxrlhf.models.tokenizer import load_tokenizer
from jaxrlhf.run import loop
from jaxrlhf.steps.update import candidate_scores

WORDS = runs.WORDS.split()


def items(generator):
    """Two-word answers and their utilities, a sum over words; those held out come last."""
    value = dict(zip(WORDS, generator.normal(0, 1.5, len(WORDS)), strict=True))
    texts = [f"{first} {second}" for first in WORDS for second in WORDS]
    generator.shuffle(texts)
    return texts, np.array([sum(value[word] for word in text.split()) for text in texts])


@pytest.mark.parametrize("as_pairs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_listwise_reward_model_learns_the_utilities(as_pairs, tmp_path):
    """Rankings of four are drawn best first with probability ∝ exp(u): argsort of u + Gumbel."""
    generator = np.random.default_rng(0)
    texts, utility = items(generator)
    rows = []
    for _ in range(600):
        picked = generator.choice(150, 4, replace=False)
        order = np.argsort(-(utility[picked] + generator.gumbel(size=4)))
        rank = np.empty(4, int)
        rank[order] = np.arange(1, 5)
        responses = [texts[i] for i in picked]
        rows.append({"prompt": "the", "responses": responses, "ranks": rank.tolist()})
    base = runs.reward_model(tmp_path)
    config = replace(
        base,
        algorithm=ListwiseRewardModelConfig(as_pairs=as_pairs),
        data=replace(
            base.data, train=runs.write(tmp_path / "ranked.jsonl", rows), eval="", batch_size=32
        ),
        eval=EvalConfig(),
        optim=OptimConfig(learning_rate=2e-3, schedule="linear", warmup=10),
        steps=120,
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    loop.train(config, mesh)
    tokenizer = load_tokenizer(f"words:{runs.WORDS}")
    held_out = [{"prompt": "the", "completion": text, "score": 0.0} for text in texts[150:]]
    path = runs.write(tmp_path / "held_out.jsonl", held_out)
    found = encode_rows(read_scored(read_rows(path), tokenizer), tokenizer, 16, 8).items
    with jax.set_mesh(mesh):
        network = Loader(mesh).trained(config.output)
        batch = scored_batch(found, 8, 0)
        score = jax.jit(candidate_scores, static_argnums=0)(
            network.model, network.params, None, batch
        )
    assert rank_correlation(np.asarray(score)[:, 0], utility[150:]) >= 0.95
