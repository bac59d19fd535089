"""``forward_backward``, ``optim_step``, ``sample``, ``save_state``: four functions for loops.

Those of Tinker's interface, as functions of a TrainState that run here and not by a service:

    grads, out = forward_backward(model, state, batch, "importance_sampling")
    grads, out = forward_backward(model, state, more, "importance_sampling", grads=grads)
    state, metrics = optim_step(state, grads, tx)
    rollout = sample(model, state, prompt_QP, prompt_mask_QP, key, sample_config)
    path = save_state(state, "runs/loop")

Losses are sums over tokens, as there, so that gradients of several calls add up to that of one call
on all of their rows. ``batch_of`` makes a batch of that interface's data.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf.algorithms import cispo_loss, policy_gradient_loss, ppo_policy_loss
from jaxrlhf.config import CheckpointConfig, SampleConfig
from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, Batch, Params, Rollout, StopTable, TrainState
from jaxrlhf.mesh.checkpoint import Checkpoints, load
from jaxrlhf.models.transformer import Model, combine_params
from jaxrlhf.steps.sample import sample as draw
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import Metrics, apply_gradients

TokenLoss = Callable[..., tuple[Array, Metrics]]
"""(logp_BT, batch, **settings) → (Σ over tokens, metrics that are sums too, or _max, _min)."""


def cross_entropy(logp_BT: Array, batch: Batch) -> tuple[Array, Metrics]:
    """−Σ weight·log π."""
    logp_BT = masked.fill(logp_BT, batch.mask_BT)
    return -(batch.weight_BT * logp_BT).sum(), {}


def importance_sampling(logp_BT: Array, batch: Batch) -> tuple[Array, Metrics]:
    """−Σ weight·(π/π_old)·A."""
    arrays = logp_BT, batch.old_logp_BT, batch.advantage_BT, batch.mask_BT
    # Clipped nowhere: what is left of PPO's loss is the ratio times the advantage.
    return ppo_policy_loss(*arrays, jnp.inf, jnp.inf, weight_BT=batch.weight_BT)


def ppo(
    logp_BT: Array, batch: Batch, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Array, Metrics]:
    """Σ weight·max(−ρ·A, −clip(ρ, 1 − clip_low, 1 + clip_high)·A); see ``ppo_policy_loss``."""
    arrays = logp_BT, batch.old_logp_BT, batch.advantage_BT, batch.mask_BT
    return ppo_policy_loss(*arrays, clip_low, clip_high, weight_BT=batch.weight_BT)


def cispo(
    logp_BT: Array, batch: Batch, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Array, Metrics]:
    """−Σ weight·stop(clip(ρ))·A·log π; see ``cispo_loss``."""
    arrays = logp_BT, batch.old_logp_BT, batch.advantage_BT, batch.mask_BT
    return cispo_loss(*arrays, clip_low, clip_high, weight_BT=batch.weight_BT)


def reinforce(logp_BT: Array, batch: Batch) -> tuple[Array, Metrics]:
    """−Σ weight·A·log π."""
    arrays = logp_BT, batch.advantage_BT, batch.mask_BT
    return policy_gradient_loss(*arrays, weight_BT=batch.weight_BT)


LOSSES: dict[str, TokenLoss] = {
    loss.__name__: loss for loss in (cross_entropy, importance_sampling, ppo, cispo, reinforce)
}
"""What ``forward_backward`` knows by name."""


def batch_of(data: Sequence[Mapping[str, Any]], width: int, pad: int = 0) -> Batch:
    """Tinker's data as a Batch, right-padded to T = ``width`` tokens.

    Args:
      data: a row each: ``model_input``, N ids, and ``loss_fn_inputs``: ``target_tokens``, for each
        of those the id that follows it, and N numbers each of ``weights`` (1 where left out),
        ``logprobs`` (under the policy that sampled, nats) and ``advantages`` (0 where left out).
      width: at least N + 1.

    Raises:
      InputError: targets that are not the inputs one on, numbers that are not N, a row too long.
    """
    numbers = {"weights": 1.0, "logprobs": 0.0, "advantages": 0.0}
    token_BT = np.full((len(data), width), pad, np.int32)
    real_BT = np.zeros((len(data), width), np.int32)
    arrays = {name: np.zeros((len(data), width), np.float32) for name in numbers}
    for b, datum in enumerate(data):
        ids, more = list(datum["model_input"]), datum["loss_fn_inputs"]
        targets = list(more["target_tokens"])
        if targets[:-1] != ids[1:] or len(targets) != len(ids):
            raise InputError(f"data[{b}]: target_tokens must be model_input, moved by one token")
        if len(ids) >= width:
            raise InputError(f"data[{b}]: {len(ids) + 1} tokens, and width={width}: widen it")
        token_BT[b, : len(ids) + 1] = [*ids, targets[-1]]
        real_BT[b, : len(ids) + 1] = 1
        for name, default in numbers.items():
            given = more.get(name)
            given = [default] * len(ids) if given is None else list(given)
            if len(given) != len(ids):
                raise InputError(f"data[{b}].{name}: {len(given)} of them for {len(ids)} tokens")
            # Column t speaks of the token in it, which is target t − 1.
            arrays[name][b, 1 : len(ids) + 1] = given
    weight_BT = arrays["weights"]
    return Batch(
        token_BT=jnp.asarray(token_BT),
        attention_mask_BT=jnp.asarray(real_BT),
        mask_BT=jnp.asarray(weight_BT != 0, jnp.float32),
        old_logp_BT=jnp.asarray(arrays["logprobs"]),
        advantage_BT=jnp.asarray(arrays["advantages"]),
        weight_BT=jnp.asarray(weight_BT),
    )


def forward_backward(
    model: Model,
    state: TrainState,
    batch: Batch,
    loss_fn: str | TokenLoss = "cross_entropy",
    grads: Params | None = None,
    frozen: Params | None = None,
    temperature: float = 1.0,
    **settings: Any,
) -> tuple[Params, Metrics]:
    """The gradient of a loss, added to ``grads``; the state is only read.

    Args:
      batch: of ``batch_of``, or of an algorithm's targets.
      loss_fn: a name of ``LOSSES``, or such a function; hashable.
      grads: what earlier calls gave since the last ``optim_step``; None: nothing.
      frozen: the weights under adapters.
      temperature: that of the sampler.
      settings: the loss's own, such as ``clip_high``.

    Returns:
      The gradients, a tree as ``state.params``; and ``loss``, the sum, ``logp_BT``, nats (in
      column t that of token t: ``logp_BT[:, 1:]`` are Tinker's), and the metrics of the loss.

    Raises:
      InputError: an unknown loss.
    """
    if isinstance(loss_fn, str) and loss_fn not in LOSSES:
        raise InputError(f"loss_fn={loss_fn}: unknown (choose one of {', '.join(LOSSES)})")
    function = LOSSES[loss_fn] if isinstance(loss_fn, str) else loss_fn
    names = tuple(sorted(settings.items()))
    found, out = _gradient(model, function, names, state.params, frozen, batch, temperature)
    return found if grads is None else _add(grads, found), out


@partial(jax.jit, static_argnums=(0, 1, 2))
def _gradient(
    model: Model,
    loss_fn: TokenLoss,
    settings: tuple[tuple[str, Any], ...],
    params: Params,
    frozen: Params | None,
    batch: Batch,
    temperature: float,
) -> tuple[Params, Metrics]:
    def total(params: Params) -> tuple[Array, Metrics]:
        weights, lora = combine_params(params, frozen)
        texts = batch.token_BT, batch.attention_mask_BT
        logp_BT = score(model, weights, *texts, temperature, lora)
        loss, metrics = loss_fn(logp_BT, batch, **dict(settings))
        return loss, {**metrics, "loss": loss, "logp_BT": logp_BT}

    grads, out = jax.grad(total, has_aux=True)(params)
    return grads, out


@jax.jit
def _add(left: Params, right: Params) -> Params:
    return jax.tree.map(jnp.add, left, right)


def optim_step(
    state: TrainState, grads: Params, tx: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One step of ``tx`` by summed gradients; what is not finite is skipped, as in ``make_update``.

    Returns:
      The new state; and ``grad_norm`` and ``skipped`` (1 if the step was not taken).
    """
    return _step(tx, state, grads)


@partial(jax.jit, static_argnums=0)
def _step(
    tx: optax.GradientTransformation, state: TrainState, grads: Params
) -> tuple[TrainState, Metrics]:
    state, metrics = apply_gradients(tx, state, jnp.zeros(()), {}, grads)
    return state, {name: metrics[name] for name in ("grad_norm", "skipped")}


def sample(
    model: Model,
    state: TrainState,
    prompt_QP: Array,
    prompt_mask_QP: Array,
    key: Array,
    sample_config: SampleConfig,
    frozen: Params | None = None,
    stops: StopTable | None = None,
) -> Rollout:
    """``jaxrlhf.sample`` of the state's policy, jitted: nothing is sent anywhere first."""
    prompts = prompt_QP, prompt_mask_QP
    return _draw(model, state.params, frozen, *prompts, key, sample_config, stops)


@partial(jax.jit, static_argnums=(0, 6))
def _draw(
    model: Model,
    params: Params,
    frozen: Params | None,
    prompt_QP: Array,
    prompt_mask_QP: Array,
    key: Array,
    sample_config: SampleConfig,
    stops: StopTable | None,
) -> Rollout:
    weights, lora = combine_params(params, frozen)
    prompts = prompt_QP, prompt_mask_QP
    return draw(model, weights, *prompts, key, sample_config, lora, stops=stops)


def save_state(state: TrainState, folder: str, keep: int = 1) -> str:
    """Write a state, parameters and optimizer, to ``folder/<its step>``; the newest ``keep`` stay.

    Returns:
      ``folder``, which ``load_state`` reads.

    Raises:
      InputError: it could not be written, or holds a later step.
    """
    with Checkpoints(folder, CheckpointConfig(keep=keep)) as checkpoints:
        checkpoints.save(int(state.step), {"policy": state}, {})
    return folder


def load_state(folder: str, like: TrainState) -> TrainState:
    """The newest state in a folder of ``save_state``, bit for bit.

    Args:
      like: a state of the same model and optimizer, whose shapes and layouts it gets.

    Raises:
      InputError: there is none, or it is of another model or optimizer.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"policy": like}
    )
    _, found, _ = load(folder, abstract)
    return found["policy"]
