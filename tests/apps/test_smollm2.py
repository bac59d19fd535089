"""The real model on a mesh, and greedy decoding of real text."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxrlhf.config import EvalConfig, MeshConfig, RewardConfig, SampleConfig, load
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models.hf import write_hf
from jaxrlhf.models.load import load_model
from jaxrlhf.models.quantise import is_quantised, made, quantised
from jaxrlhf.run import loop
from jaxrlhf.run.session import Session
from jaxrlhf.run.setup import setup
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import score

PROMPTS = (
    "The pizza from the corner last week was",
    "My new phone turned out to be",
    "The capital of France is",
)


@pytest.mark.slow
def test_smollm2_greedy_decode_equals_full_forwards():
    model, params, tokenizer = load_model("smollm2", make_mesh(MeshConfig(), jax.devices()[:1]))
    batch = tokenizer(list(PROMPTS), return_tensors="np", padding=True)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_smollm2_in_few_bits_says_what_its_levels_stand_for(kind):
    """Sampled and scored over quantised weights, as over those that they are made into: its first
    three layers."""
    pytest.importorskip("qwix", reason="the extra quantise")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model, params, tokenizer = load_model("smollm2", mesh)
    model = replace(model, decoder=replace(model.decoder, layers=3))
    params = {**params, "layers": jax.tree.map(lambda x: x[:3], params["layers"])}
    batch = tokenizer(list(PROMPTS), return_tensors="np", padding=True)
    token, mask = batch["input_ids"].astype(np.int32), batch["attention_mask"]
    small = quantised(params, kind)
    whole = jax.tree.map(lambda x: made(x, "float32"), small, is_leaf=is_quantised)
    draw, logp_of = jax.jit(sample, static_argnums=(0, 5)), jax.jit(score, static_argnums=0)
    rollout = draw(model, small, token, mask, jax.random.key(0), SampleConfig(8, n=1))
    texts = rollout.token_BT, rollout.attention_mask_BT
    expected, plain = (logp_of(model, x, *texts) for x in (whole, params))
    np.testing.assert_allclose(logp_of(model, small, *texts), expected, atol=1e-3)
    np.testing.assert_allclose(rollout.logp_BT, expected * rollout.mask_BT, atol=1e-3)
    assert np.abs(plain - expected).max() > 1e-3  # it is not nothing


def vowels(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / 10 for text in completions]


def first_layers(count, folder):
    """The model cut short, in a folder; and there."""
    model, params, tokenizer = load_model("smollm2", make_mesh(MeshConfig(), jax.devices()[:1]))
    params = {**params, "layers": jax.tree.map(lambda x: x[:count], params["layers"])}
    write_hf(folder, replace(model.decoder, layers=count), params, tokenizer)
    return str(folder)


@pytest.mark.slow
def test_smollm2_learns_alike_on_a_mesh_of_four(tmp_path):
    """One iteration of PPO with adapters on 2 × 2 × 1, beside the same on one device, by its first
    six layers: all thirty take twice as long, and are of one kind.

    It draws the same tokens, with the log-probs that a forward of the whole text gives them.
    """
    config = load("configs/ppo_smollm2_sentiment.yaml", ["--output", str(tmp_path)])
    config = replace(
        config,
        model=replace(config.model, path=first_layers(6, tmp_path / "model")),
        data=replace(config.data, eval="", batch_size=8),
        eval=EvalConfig(),
        # So few layers write no words whose sentiment is known.
        rewards=(RewardConfig(function="test_smollm2:vowels"),),
        sample=replace(config.sample, n=2, max_new_tokens=8),
    )
    tokens, learnt = [], []
    for sizes, devices in ((MeshConfig(), 1), (MeshConfig(data=2, fsdp=2), 4)):
        mesh = make_mesh(sizes, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            run = setup(config, mesh)
            session = Session(run)
            session.host["kl_coef"] = 0.2
            start = jax.device_get(run.states["policy"].params)
            states, metrics, rollout, _ = loop.iterate(run, session, 0)
            # The policy has started as the reference.
            texts = rollout.token_BT, rollout.attention_mask_BT
            logp_BT = run.programs.reference(run.reference.params, *texts)
            gap_BT = np.abs(np.asarray(logp_BT * rollout.mask_BT - rollout.logp_BT))
            assert gap_BT.max() <= 1e-4
            tokens.append(np.asarray(rollout.token_BT))
            learnt.append(jax.device_get(states["policy"].params))
        assert metrics["updates"] == 2
        assert 0 < metrics["grad_norm"] < np.inf
    assert (tokens[0] == tokens[1]).mean() >= 0.999
    assert norm(start, learnt[0]) > 0
    assert norm(*learnt) <= 0.02 * norm(start, learnt[0])


def norm(left, right):
    """‖left − right‖ over two trees."""
    squares = jax.tree.map(lambda a, b: np.square(a - b, dtype=np.float64).sum(), left, right)
    return np.sqrt(sum(jax.tree.leaves(squares)))
