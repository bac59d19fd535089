"""An algorithm's losses joined to a model: loss(params, frozen, batch), for ``make_update``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms import Algorithm
from jaxrlhf.core.types import Array, Batch, Outputs, Params, PreferenceBatch, TokenBatch
from jaxrlhf.models.transformer import Model, combine_params
from jaxrlhf.steps.score import forward, reward, score, token_scores, value

Metrics = dict[str, Array]
Loss = Callable[[Params, Any, Any], tuple[Array, Metrics]]
"""loss(params, frozen, batch) → (scalar, metrics), both additive over rows."""


def policy_loss(
    model: Model,
    algorithm: Algorithm,
    temperature: float = 1.0,
    first: int = 1,
    value_coef: float | None = None,
) -> Loss:
    """Join an algorithm's losses to a model: loss(params, frozen, batch) for ``make_update``.

    Args:
      temperature: that of the sampler.
      first: static; the first response column (P), which saves the prompt's logits.
      value_coef: if given, the head on the policy's trunk learns the value function too, with this
        weight.
    """
    entropy = "entropy" in algorithm.needs

    def loss(params: Params, frozen: Params | None, batch: Batch) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        outputs = forward(
            model,
            weights,
            batch.token_BT,
            batch.attention_mask_BT,
            temperature,
            entropy=entropy,
            value=value_coef is not None,
            lora=lora,
            first=first,
        )
        total, metrics = algorithm.loss(outputs, batch)
        if value_coef is not None:
            assert algorithm.value_loss is not None
            extra, more = algorithm.value_loss(outputs, batch)
            total, metrics = total + value_coef * extra, {**metrics, **more}
        return total, metrics

    return loss


def critic_loss(model: Model, algorithm: Algorithm, head_only: bool = False) -> Loss:
    """Join an algorithm's value loss to a critic.

    ``head_only`` holds the trunk still: the warm-up of a head that shares the policy's trunk.
    """

    def loss(params: Params, frozen: Params | None, batch: Batch) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        if head_only:
            trunk = {name: child for name, child in weights.items() if name != "head"}
            trunk, lora = jax.lax.stop_gradient((trunk, lora))
            weights = {**trunk, "head": weights["head"]}
        value_BT = value(model, weights, batch.token_BT, batch.attention_mask_BT, lora)
        outputs = Outputs(logp_BT=jnp.zeros_like(value_BT), value_BT=value_BT)
        assert algorithm.value_loss is not None
        return algorithm.value_loss(outputs, batch)

    return loss


def candidate_scores(
    model: Model, params: Params, frozen: Params | None, batch: PreferenceBatch
) -> Array:
    """The reward of every candidate of a batch, [B, C]."""
    weights, lora = combine_params(params, frozen)
    rows, candidates, tokens = batch.token_BCT.shape
    token = batch.token_BCT.reshape(rows * candidates, tokens)
    mask = batch.attention_mask_BCT.reshape(rows * candidates, tokens)
    return reward(model, weights, token, mask, lora).reshape(rows, candidates)


def candidate_token_scores(
    model: Model, params: Params, frozen: Params | None, batch: PreferenceBatch
) -> Array:
    """The head at every token of every candidate of a batch, [B, C, T]."""
    weights, lora = combine_params(params, frozen)
    rows, candidates, tokens = batch.token_BCT.shape
    token = batch.token_BCT.reshape(rows * candidates, tokens)
    mask = batch.attention_mask_BCT.reshape(rows * candidates, tokens)
    return token_scores(model, weights, token, mask, lora).reshape(rows, candidates, tokens)


def reward_model_loss(model: Model, algorithm: Algorithm) -> Loss:
    """Join a reward-model loss to a model: scores [B, C] of the candidates, or of their tokens."""
    scores = candidate_token_scores if algorithm.reads == "steps" else candidate_scores

    def loss(
        params: Params, frozen: Params | None, batch: PreferenceBatch
    ) -> tuple[Array, Metrics]:
        return algorithm.loss(scores(model, params, frozen, batch), batch)

    return loss


def sft_loss(model: Model, algorithm: Algorithm) -> Loss:
    """Join an imitation loss to a model."""

    def loss(params: Params, frozen: Params | None, batch: TokenBatch) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        rows = (batch.token_BT, batch.attention_mask_BT)
        outputs = forward(model, weights, *rows, lora=lora, segment_BT=batch.segment_BT)
        return algorithm.loss(outputs, batch)

    return loss


def candidate_logp(
    model: Model,
    params: Params,
    batch: PreferenceBatch,
    lora: Params | None = None,
    temperature: float = 1.0,
    first: int = 1,
) -> Array:
    """log π of every token of every candidate, nats, [B, C, T]; see ``forward``."""
    rows, candidates, tokens = batch.token_BCT.shape
    token = batch.token_BCT.reshape(rows * candidates, tokens)
    mask = batch.attention_mask_BCT.reshape(rows * candidates, tokens)
    logp = score(model, params, token, mask, temperature, lora, first)
    return logp.reshape(rows, candidates, tokens)


def pairs_loss(
    model: Model, algorithm: Algorithm, temperature: float = 1.0, first: int = 1
) -> Loss:
    """Join a loss on whole answers to a model: log-probs [B, C, T] of the candidates."""

    def loss(
        params: Params, frozen: Params | None, batch: PreferenceBatch
    ) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        logp_BCT = candidate_logp(model, weights, batch, lora, temperature, first)
        return algorithm.loss(logp_BCT, batch)

    return loss
