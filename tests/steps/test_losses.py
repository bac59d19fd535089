"""Losses joined to a model: what is scored, what is differentiated, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.algorithms import Algorithm, ppo, process_reward_model, reward_model, sft
from jaxrlhf.config import (
    OptimConfig,
    PPOConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SFTConfig,
)
from jaxrlhf.core import masked
from jaxrlhf.core.types import PreferenceBatch, TokenBatch, TrainState
from jaxrlhf.data.batches import packed_batch, token_batch
from jaxrlhf.data.formats import Completion
from jaxrlhf.data.tokens import Encoded
from jaxrlhf.steps.losses import (
    candidate_logp,
    candidate_scores,
    candidate_token_scores,
    combine_params,
    critic_loss,
    pairs_loss,
    policy_loss,
    reward_model_loss,
    sft_loss,
)
from jaxrlhf.steps.score import reward, score
from jaxrlhf.steps.update import make_optimizer, make_update

P = 4
PPO = ppo(PPOConfig(entropy_coef=0.01))


score_rows = jax.jit(score, static_argnums=0)


def start(params, tx):
    """A state whose arrays may be donated."""
    return TrainState.create(jax.tree.map(jnp.copy, params), tx)


def close(left, right, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), left, right)


def test_policy_loss_microbatches_change_nothing(model, params, lora, batch):
    """The same step in one piece and in four, with adapters, entropy and a shared critic."""
    tx = optax.sgd(1.0)
    loss = policy_loss(model, PPO, 0.7, P, value_coef=0.3)
    trainable = {"lora": lora, "head": params["head"]}
    whole, four = (
        make_update(tx, loss, microbatches)(start(trainable, tx), batch, params)
        for microbatches in (1, 4)
    )
    assert whole[1]["grad_norm"] > 0.01
    close(whole[0].params, four[0].params, 1e-5)
    close(whole[1], four[1], 1e-5)


# What is learnt, and what is not


def test_policy_loss_is_the_algorithms_at_the_samplers_temperature(model, params, batch):
    """The ratio is 1 where old log-probs come from ``score``, over two passes at rate 0."""
    gap = Algorithm(
        targets=None,
        loss=lambda outputs, batch: (
            (outputs.logp_BT * batch.weight_BT).sum(),
            {"gap_max": jnp.abs((outputs.logp_BT - batch.old_logp_BT) * batch.mask_BT).max()},
        ),
    )
    tx = make_optimizer(OptimConfig(learning_rate=0.0))
    update = make_update(tx, policy_loss(model, gap, 0.7, P))
    old = score_rows(model, params, batch.token_BT, batch.attention_mask_BT, 0.7)
    batch = batch.replace(old_logp_BT=old)
    state = start(params, tx)
    for _ in range(2):
        for rows in (slice(0, 4), slice(4, 8)):
            state, metrics = update(state, jax.tree.map(lambda x, r=rows: x[r], batch))
            assert metrics["gap_max"] <= 1e-5
    assert state.step == 4


def test_policy_loss_value_coef(model, params, batch):
    """Policy loss plus ``value_coef`` times the value loss, both from one forward pass."""

    @jax.jit
    def losses(params):
        alone, _ = policy_loss(model, PPO, 0.7, P)(params, None, batch)
        both, metrics = policy_loss(model, PPO, 0.7, P, value_coef=0.3)(params, None, batch)
        value, _ = critic_loss(model, PPO)(params, None, batch)
        return alone, both, value, metrics["value_loss"]

    alone, both, value, metric = losses(params)
    np.testing.assert_allclose(both, alone + 0.3 * value, rtol=1e-5)
    np.testing.assert_allclose(metric, value, rtol=1e-5)
    assert value > 0.1


def test_policy_loss_has_no_gradient_in_its_targets(model, params, batch):
    loss = policy_loss(model, PPO, 0.7, P, value_coef=0.3)
    names = ["old_logp_BT", "advantage_BT", "return_BT", "old_value_BT"]

    def of_targets(targets):
        return loss(params, None, batch.replace(**targets))[0]

    grads = jax.jit(jax.grad(of_targets))({name: getattr(batch, name) for name in names})
    for name in names:
        assert (grads[name] == 0).all(), name


def test_critic_loss_head_only_holds_the_trunk(model, params, lora, batch):
    trainable = {"lora": lora, "head": params["head"]}

    @jax.jit
    def grads(trainable, frozen):
        loss = critic_loss(model, PPO, head_only=True)
        return jax.grad(lambda p, f: loss(p, f, batch)[0], argnums=(0, 1))(trainable, frozen)

    learnt, held = grads(trainable, params)
    assert jnp.abs(learnt["head"]["kernel"]).max() > 0.01
    for leaf in jax.tree.leaves((learnt["lora"], held)):
        assert (leaf == 0).all()


def test_combine_params(params, lora):
    head = {"kernel": jnp.ones(32), "bias": jnp.ones(())}
    assert combine_params(params, None) == (params, None)
    weights, adapters = combine_params({"lora": lora, "head": head}, params)
    assert weights["head"] is head
    assert weights["layers"] is params["layers"]
    assert adapters is lora
    assert params["head"] is not head
    with pytest.raises(ValueError, match="adapters need the frozen weights"):
        combine_params({"lora": lora}, None)


# Reward models and imitation


def test_reward_model_loss_scores_every_candidate(model, params, batch):
    """Candidates are rows of their own: [B, C, T] is scored as [B·C, T]."""
    token, real = batch.token_BT, batch.attention_mask_BT
    pairs = PreferenceBatch(
        token_BCT=token.reshape(4, 2, 10),
        attention_mask_BCT=real.reshape(4, 2, 10),
        margin_B=np.zeros(4, np.float32),
        weight_B=np.full(4, 0.25, np.float32),
    )
    alone = jax.jit(reward, static_argnums=0)(model, params, token, real).reshape(4, 2)
    scores = jax.jit(candidate_scores, static_argnums=0)(model, params, None, pairs)
    np.testing.assert_allclose(scores, alone, atol=1e-6)
    loss = jax.jit(reward_model_loss(model, reward_model(RewardModelConfig())))
    total, metrics = loss(params, None, pairs)
    chosen, rejected = np.asarray(alone, np.float64).T
    np.testing.assert_allclose(total, np.log1p(np.exp(rejected - chosen)).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (chosen > rejected).mean())


def test_reward_model_loss_reads_steps_at_their_tokens(model, params, batch):
    """The head at columns 5 and 7: p of the first is to be 1, of the second 0."""
    token, real = batch.token_BT[:, None], batch.attention_mask_BT[:, None]
    step, label = np.zeros((2, *token.shape), np.float32)
    step[..., [5, 7]] = label[..., 5] = 1
    rows = PreferenceBatch(
        token_BCT=token,
        attention_mask_BCT=real,
        margin_B=np.zeros(8, np.float32),
        weight_B=np.full(8, 1 / 8, np.float32),
        step_mask_BCT=step,
        label_BCT=label,
    )
    scores = jax.jit(candidate_token_scores, static_argnums=0)(model, params, None, rows)
    hidden, _ = model.apply(params, batch.token_BT, batch.attention_mask_BT)
    np.testing.assert_allclose(scores[:, 0], model.scalar(params, hidden), atol=1e-5)
    loss = jax.jit(reward_model_loss(model, process_reward_model(ProcessRewardModelConfig())))
    first, second = np.asarray(scores, np.float64)[:, 0, [5, 7]].T
    wanted = (np.log1p(np.exp(-first)) + np.log1p(np.exp(second))).mean() / 2
    np.testing.assert_allclose(loss(params, None, rows)[0], wanted, rtol=1e-5)


def test_sft_loss_is_the_mean_negative_logp(model, params, batch):
    rows = TokenBatch(batch.token_BT, batch.attention_mask_BT, batch.weight_BT)
    loss, _ = jax.jit(sft_loss(model, sft(SFTConfig())))(params, None, rows)
    logp = score_rows(model, params, batch.token_BT, batch.attention_mask_BT, 1.0)
    np.testing.assert_allclose(loss, -masked.mean(logp, batch.mask_BT), rtol=1e-5)


def test_sft_loss_packed_is_that_of_the_rows(model, params):
    """Seven rows, and the same seven in four packed rows: one loss, one gradient."""
    rng = np.random.default_rng(0)
    rows = [
        Encoded(
            rng.integers(0, model.decoder.vocab, p).tolist(),
            (rng.integers(0, model.decoder.vocab, a).tolist(),),
            Completion("", "", {}, "x:1"),
        )
        for p, a in ((1, 5), (4, 3), (2, 2), (3, 6), (1, 1), (5, 4), (2, 7))
    ]
    alone = token_batch(rows, 20, 0)
    packed = packed_batch([rows[:2], rows[2:5], rows[5:6], rows[6:]], 20, 0)
    assert packed.token_BT.shape == (4, 20)
    loss = sft_loss(model, sft(SFTConfig()))
    tx = optax.sgd(1.0)

    def step(batch, pieces):
        update = make_update(tx, loss, pieces)
        state, metrics = update(start(params, tx), jax.tree.map(jnp.asarray, batch))
        return state.params, metrics

    (apart, one), (together, other) = step(alone, 1), step(packed, 2)
    assert one["tokens"] == other["tokens"] == 28
    np.testing.assert_allclose(one["loss"], other["loss"], atol=1e-5)
    close(apart, together, 1e-5)


def test_pairs_loss_gives_the_log_probs_of_every_candidate(model, params, batch):
    """What an algorithm that reads pairs is handed: score's, reshaped, 0 on the first column."""
    seen = []

    def loss(logp_BCT, rows):
        seen.append(logp_BCT)
        return (logp_BCT * rows.mask_BCT).sum(), {}

    token = jnp.asarray(batch.token_BT).reshape(4, 2, 10)
    real = jnp.asarray(batch.attention_mask_BT).reshape(4, 2, 10)
    pairs = PreferenceBatch(
        token_BCT=token,
        attention_mask_BCT=real,
        margin_B=jnp.zeros(4),
        weight_B=jnp.full(4, 0.25),
        mask_BCT=jnp.asarray(batch.mask_BT).reshape(4, 2, 10),
    )
    algorithm = Algorithm(None, loss, reads="pairs")
    total, _ = pairs_loss(model, algorithm, temperature=0.7)(params, None, pairs)
    rows = score(model, params, batch.token_BT, batch.attention_mask_BT, 0.7)
    np.testing.assert_allclose(seen[0], rows.reshape(4, 2, 10), atol=1e-6)
    np.testing.assert_allclose(total, (rows * batch.mask_BT).sum(), rtol=1e-5)
    again = candidate_logp(model, params, pairs, temperature=0.7, first=P)
    np.testing.assert_allclose(again[..., P:], rows.reshape(4, 2, 10)[..., P:], atol=1e-6)
    assert (again[..., :P] == 0).all()
