"""The real model on a mesh, and greedy decoding of real text."""

import jax
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig, SampleConfig
from jaxrlhf.networks import load_model
from jaxrlhf.sharding import make_mesh, put_rows
from jaxrlhf.steps.sampling import sample
from jaxrlhf.steps.scoring import score

PROMPTS = (
    "The pizza from the corner last week was",
    "My new phone turned out to be",
    "The capital of France is",
    "Once upon a time there was",
    "Two plus two is",
    "The weather on our trip was",
    "In the morning she likes to",
    "The best way to learn is",
)


@pytest.mark.slow
def test_smollm2_draws_the_same_tokens_on_a_mesh_of_eight():
    draw, rescore = jax.jit(sample, static_argnums=(0, 5)), jax.jit(score, static_argnums=0)
    drawn = []
    for sizes, devices in ((MeshConfig(), 1), (MeshConfig(data=4, fsdp=2), 8)):
        mesh = make_mesh(sizes, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            model, params, tokenizer = load_model("smollm2", mesh)
            batch = tokenizer(list(PROMPTS), return_tensors="np", padding=True)
            arrays = (batch["input_ids"].astype(np.int32), batch["attention_mask"])
            config = SampleConfig(max_new_tokens=12, n=1, stop=(2,), pad=2)
            key = jax.random.key(0)
            rollout = draw(model, params, *put_rows(arrays, mesh), key, config)
            logp = rescore(model, params, rollout.token_BT, rollout.attention_mask_BT)
            gap = np.abs(np.asarray(logp * rollout.mask_BT - rollout.logp_BT))
            assert gap.max() <= 1e-4
            drawn.append(np.asarray(rollout.token_BT))
    assert (drawn[0] == drawn[1]).mean() >= 0.999


@pytest.mark.slow
def test_smollm2_greedy_decode_equals_full_forwards():
    model, params, tokenizer = load_model("smollm2", make_mesh(MeshConfig(), jax.devices()[:1]))
    batch = tokenizer(list(PROMPTS[:3]), return_tensors="np", padding=True)
    token, mask = batch["input_ids"].astype(np.int32), batch["attention_mask"]
    config = SampleConfig(max_new_tokens=8, n=1, temperature=0.0)
    draw = jax.jit(sample, static_argnums=(0, 5))
    rollout = draw(model, params, token, mask, jax.random.key(0), config)
    width = token.shape[1] + 8

    @jax.jit
    def last_logits(params, token, mask, column):
        hidden, _ = model.apply(params, token, mask)
        return model.logits(params, hidden[:, column])

    whole = np.pad(token, ((0, 0), (0, 8)))
    seen = np.pad(mask, ((0, 0), (0, 8)))
    for column in range(token.shape[1], width):
        whole[:, column] = np.argmax(last_logits(params, whole, seen, column - 1), axis=1)
        seen[:, column] = 1
    np.testing.assert_array_equal(np.asarray(rollout.token_BT), whole)
    assert "Paris" in tokenizer.decode(whole[2])
