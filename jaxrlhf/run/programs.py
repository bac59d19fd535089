"""The jitted programs of a run: the steps, joined to its networks and settings."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.algorithms import Algorithm, greedy_baseline, reweight
from jaxrlhf.config import Config, SampleConfig, has_critic, is_on_policy, on_policy
from jaxrlhf.core.types import AnyBatch, Array, Params, PreferenceBatch, Rollout, TrainState
from jaxrlhf.mesh.sharding import few_rows_layout, row_layout
from jaxrlhf.models.transformer import Model
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
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import score, value
from jaxrlhf.steps.update import make_optimizer, make_update


def on_policy_programs(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    reference_model: Model,
    critic_model: Model,
    states: dict[str, TrainState],
    mesh: Mesh,
) -> dict[str, Callable[..., Any]]:
    """The jitted functions that one iteration is made of, by name.

    Those of policy and critic take (params, frozen, …), that of the reference (params, …).
    ``states`` say where updated states are to lie; what flows between the programs has its rows
    split over ``mesh`` in one way.
    """
    rows, few = row_layout(mesh), few_rows_layout(mesh, config.data.batch_size)
    first, temperature = config.data.max_prompt_tokens, config.sample.temperature
    shared = has_critic(config) and config.critic.kind == "shared"
    settings = on_policy(config)
    assert algorithm.targets is not None

    def rescore(params: Params, frozen: Any, token_BT: Array, mask_BT: Array) -> Array:
        weights, lora = combine_params(params, frozen)
        return score(model, weights, token_BT, mask_BT, temperature, lora, first)

    def estimate(params: Params, frozen: Any, token_BT: Array, mask_BT: Array) -> Array:
        weights, lora = combine_params(params, frozen)
        return value(critic_model, weights, token_BT, mask_BT, lora)

    def scorer(temperature: float) -> Callable[..., Any]:
        def reference_score(params: Params, token_BT: Array, mask_BT: Array) -> Array:
            return score(reference_model, params, token_BT, mask_BT, temperature, first=first)

        return jax.jit(reference_score, out_shardings=rows)

    def take(batch: AnyBatch, row_M: Array) -> AnyBatch:
        part = jax.tree.map(lambda x: x[row_M], batch)
        return reweight(part, settings.aggregation, settings.length)

    def baseline(greedy: Rollout, reward_Q: Array) -> Array:
        return greedy_baseline(settings, greedy, reward_Q, config.sample.n)

    return {
        "sample": sampler(model, config.sample, rows, shared),
        "eval_sample": sampler(model, evaluation_sampling(config), rows),
        "reference": scorer(temperature),
        "eval_reference": scorer(1.0),
        "rescore": jax.jit(rescore, out_shardings=rows),
        "value": jax.jit(estimate, out_shardings=rows),
        "targets": jax.jit(algorithm.targets, out_shardings=(rows, None)),
        "take": jax.jit(take, out_shardings=rows),
        "merge": jax.jit(merge, out_shardings=rows),
        "greedy": sampler(model, replace(config.sample, n=1, temperature=0.0), few),
        "baseline": jax.jit(baseline, out_shardings=rows),
        **updates(config, algorithm, model, critic_model, states),
    }


def sampler(
    model: Model, settings: SampleConfig, layout: Any, value: bool = False
) -> Callable[..., Rollout]:
    """(params, frozen, prompt_QP, prompt_mask_QP, key, row_B = None) → Rollout; see ``sample``."""

    def draw(
        params: Params,
        frozen: Any,
        prompt_QP: Array,
        prompt_mask_QP: Array,
        key: Array,
        row_B: Array | None = None,
    ) -> Rollout:
        weights, lora = combine_params(params, frozen)
        return sample(model, weights, prompt_QP, prompt_mask_QP, key, settings, lora, value, row_B)

    return jax.jit(draw, out_shardings=layout)


def merge(rollouts: tuple[Rollout, ...], row_B: Array) -> Rollout:
    """Rows out of several rollouts."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[row_B], *rollouts)


def evaluation_sampling(config: Config) -> SampleConfig:
    """How held-out prompts are completed: at T = 1, untruncated, ``eval.n`` times each."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return replace(config.sample, n=config.eval.n, **plain)


def updates(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    critic_model: Model,
    states: dict[str, TrainState],
) -> dict[str, Callable[..., Any]]:
    """The optimizer steps: of the policy, of a separate critic, of a shared head's warm-up."""
    first, temperature = config.data.max_prompt_tokens, config.sample.temperature

    def update(loss: Any, who: str, settings: Config) -> Callable[..., Any]:
        layout = layout_of(states[who])
        return make_update(optimizer(settings), loss, config.optim.microbatches, layout=layout)

    if algorithm.reads == "pairs":
        return {
            "update": update(pairs_loss(model, algorithm, temperature, first), "policy", config)
        }
    if "value" not in algorithm.needs:
        return {
            "update": update(policy_loss(model, algorithm, temperature, first), "policy", config)
        }
    shared = config.critic.kind == "shared"
    settings: Any = config.algorithm  # one that learns values
    coefficient = settings.value_coef if shared else None
    loss = policy_loss(model, algorithm, temperature, first, coefficient)
    programs = {"update": update(loss, "policy", config)}
    if shared and config.critic.warmup:
        warmup = critic_loss(model, algorithm, head_only=True)
        programs["warmup"] = update(warmup, "policy", config)
    if not shared:
        loss = critic_loss(critic_model, algorithm)
        programs["critic_update"] = update(loss, "critic", critic_config(config))
    return programs


def offline_programs(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    reference_model: Model | None,
    states: dict[str, TrainState],
    mesh: Mesh,
) -> dict[str, Callable[..., Any]]:
    """The programs of learning from rows: the update, and what held-out rows are measured with."""
    join = {
        "scores": reward_model_loss,
        "steps": reward_model_loss,
        "pairs": pairs_loss,
        "outputs": sft_loss,
    }
    loss = join[algorithm.reads](model, algorithm)
    layout = layout_of(states["policy"])
    programs: dict[str, Callable[..., Any]] = {
        "update": make_update(optimizer(config), loss, config.optim.microbatches, layout=layout),
    }
    if reference_model is not None:

        def compare(params: Params, batch: PreferenceBatch) -> PreferenceBatch:
            logp_BCT = candidate_logp(reference_model, params, batch)
            return replace(batch, ref_logp_BCT=logp_BCT)

        programs["reference"] = jax.jit(compare, out_shardings=row_layout(mesh))
    scores = {"scores": candidate_scores, "steps": candidate_token_scores}.get(algorithm.reads)
    if scores is None:
        return {**programs, "loss": jax.jit(loss)}
    judged = {"scores": jax.jit(partial(scores, model)), "loss_of_scores": jax.jit(algorithm.loss)}
    return programs | judged


def optimizer(config: Config) -> Any:
    """The optimizer of a run, its schedule over all of the run's updates."""
    updates = 1
    if is_on_policy(config):
        updates = on_policy(config).epochs * on_policy(config).minibatches
    return make_optimizer(config.optim, config.steps * updates)


def critic_config(config: Config) -> Config:
    """The config with the optimizer of a separate critic."""
    rate = config.critic.learning_rate
    return replace(config, optim=replace(config.optim, learning_rate=rate)) if rate else config


def layout_of(state: TrainState) -> Any:
    """Where each array of a state lies."""
    return jax.tree.map(lambda x: x.sharding, state)


def minibatch_rows(config: Config, rows: int, step: int, epoch: int) -> list[np.ndarray]:
    """The rows of each minibatch of one pass: a permutation drawn from (seed, step, epoch)."""
    generator = np.random.Generator(
        np.random.PCG64(np.random.SeedSequence([config.seed, step, epoch, 1]))
    )
    return np.split(generator.permutation(rows).astype(np.int32), on_policy(config).minibatches)
