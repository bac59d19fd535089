"""What keeps experts busy: transformers' number and gradient on the same logits, the same however a
minibatch is split, in every loss there is."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxrlhf.algorithms import dpo, ppo, process_reward_model, reward_model, sft
from jaxrlhf.config import (
    Config,
    DPOConfig,
    MoeConfig,
    OptimConfig,
    PPOConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SFTConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import PreferenceBatch, TokenBatch, TrainState
from jaxrlhf.models.experts import Routed, added_up
from jaxrlhf.models.transformer import Model
from jaxrlhf.run.programs import balance_of
from jaxrlhf.steps.balance import Balance, load_balance, measured, z_loss
from jaxrlhf.steps.update import make_update, pairs_loss, policy_loss, reward_model_loss, sft_loss

LAYERS, EXPERTS, EACH = 3, 6, 2
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((LAYERS, 2, 5, EXPERTS)).astype(np.float32)
MASK = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def sums_of(logits):
    def layer(logits):
        expert = jax.lax.top_k(logits, EACH)[1]
        return added_up(Routed(expert, jnp.zeros(expert.shape), logits), MASK)

    found = jax.tree.map(lambda *x: jnp.stack(x), *map(layer, logits))
    return replace(found, tokens=found.tokens[0])


def test_load_balance_and_its_gradient_equal_transformers():
    logits = torch.tensor(LOGITS, requires_grad=True)
    rows = tuple(x.reshape(-1, EXPERTS) for x in logits)
    expected = load_balancing_loss_func(rows, EXPERTS, EACH, torch.tensor(MASK))
    expected.backward()
    found, slope = jax.value_and_grad(lambda x: load_balance(sums_of(x)))(jnp.array(LOGITS))
    np.testing.assert_allclose(found, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(slope, logits.grad, atol=1e-7)


def test_what_is_measured_by_hand():
    real = LOGITS.astype(np.float64)[:, MASK != 0]
    total = np.log(np.exp(real).sum(-1))
    chance = np.exp(real - total[..., None])
    load = np.zeros((LAYERS, EXPERTS))
    for layer, row in np.ndindex(real.shape[:2]):
        load[layer, np.argsort(-real[layer, row])[:EACH]] += 1
    found = measured({"routers": sums_of(jnp.array(LOGITS)), "loss": 1})
    expected = {
        "loss": 1,
        "router_z_loss": (total**2).mean(),
        "router_entropy": -(chance * np.log(chance)).sum(-1).mean(),
        "router_load_max": (load / load.mean(1, keepdims=True)).max(),
        "router_aux_loss": EXPERTS * (load.mean(0) * chance.mean((0, 1))).sum() / real.shape[1],
    }
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5)


@pytest.fixture(scope="module")
def mixture(decoder):
    return Model(replace(decoder, moe=MoeConfig(experts=4, per_token=2), mlp=16))


@pytest.fixture(scope="module")
def weights(mixture, random_weights):
    return random_weights(mixture.shapes(head=True), 0)


def test_a_split_minibatch_is_balanced_as_a_whole(mixture, weights, batch):
    """Pieces of unequal numbers of tokens, and packed rows: one gradient, and that of the formula,
    where the loss itself has none."""
    tx, balance = optax.sgd(1.0), Balance(aux=3.0, z=0.1)
    loss = policy_loss(mixture, ppo(PPOConfig()), first=4, routers=True)
    still = replace(batch, weight_BT=0 * batch.weight_BT)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def added(params):
        rows = batch.token_BT, batch.attention_mask_BT
        _, sums = mixture.apply(params, *rows, routers=True)
        numbers = load_balance(sums), z_loss(sums)
        return balance.aux * numbers[0] + balance.z * numbers[1], numbers

    slope, numbers = added(weights)
    for how in ({}, {"microbatches": 4}, {"packed": 1, "model": mixture}):
        state = TrainState.create(jax.tree.map(jnp.copy, weights), tx)
        state, metrics = make_update(tx, loss, balance=balance, **how)(state, still)
        found = jax.tree.map(jnp.subtract, weights, state.params)
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, slope)
        measures = [metrics[f"router_{name}_loss"] for name in ("aux", "z")]
        np.testing.assert_allclose(measures, numbers, rtol=1e-5)


def test_every_loss_is_balanced(mixture, weights, batch):
    """By what they return: nothing is compiled."""
    token, real = batch.token_BT, batch.attention_mask_BT
    ones = np.ones((4, 2, 10), np.float32)
    pairs = PreferenceBatch(
        token_BCT=token.reshape(4, 2, 10),
        attention_mask_BCT=real.reshape(4, 2, 10),
        margin_B=np.zeros(4, np.float32),
        weight_B=np.full(4, 0.25, np.float32),
        mask_BCT=ones,
        ref_logp_BCT=ones,
        step_mask_BCT=ones,
        label_BCT=ones,
    )
    alone = jax.tree.map(lambda x: x.reshape(8, 1, 10) if x.ndim == 3 else x.repeat(2), pairs)
    rows = TokenBatch(token, real, batch.weight_BT)
    steps = process_reward_model(ProcessRewardModelConfig())
    losses = [
        (policy_loss(mixture, ppo(PPOConfig()), routers=True), batch),
        (sft_loss(mixture, sft(SFTConfig()), routers=True), rows),
        (pairs_loss(mixture, dpo(DPOConfig()), routers=True), pairs),
        (reward_model_loss(mixture, reward_model(RewardModelConfig()), routers=True), pairs),
        (reward_model_loss(mixture, steps, routers=True), alone),
    ]
    tx = optax.sgd(1.0)
    state = jax.eval_shape(partial(TrainState.create, tx=tx), weights)
    for loss, given in losses:
        update = make_update(tx, loss, balance=Balance(aux=0.1))
        _, metrics = jax.eval_shape(update, state, given)
        assert metrics["router_aux_loss"].shape == metrics["router_load_max"].shape == ()


def test_balance_is_for_mixtures(mixture, model):
    config = Config(SFTConfig(), optim=OptimConfig(router_aux_loss_coef=0.01))
    record = sft(SFTConfig())
    assert balance_of(config, record, mixture) == Balance(aux=0.01)
    with pytest.raises(InputError, match=r"optim\.router_aux_loss_coef=0\.01: the model is no mix"):
        balance_of(config, record, model)
    assert balance_of(replace(config, optim=OptimConfig()), record, model) is None
    taught = record._replace(needs=frozenset({"teacher"}))
    assert balance_of(replace(config, optim=OptimConfig()), taught, mixture) is None
    with pytest.raises(InputError, match=r"router_aux_loss_coef=0\.01: distillation has none"):
        balance_of(config, taught, mixture)
    with pytest.raises(ValueError, match="routers=True: the model is no mixture"):
        model.apply({}, jnp.zeros((1, 1), int), jnp.ones((1, 1), int), routers=True)
