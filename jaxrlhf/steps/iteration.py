"""One iteration of policy learning as one compiled function, for research code.

    >>> import jax, optax
    >>> import jaxrlhf as rl
    >>> from jaxrlhf.config import DecoderConfig, ModelConfig, RLOOConfig, SampleConfig
    >>> shape = DecoderConfig(
    ...     vocab=16, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16
    ... )
    >>> model = rl.build(ModelConfig(decoder=shape))
    >>> params, tx = model.init(jax.random.key(0)), optax.adam(1e-2)
    >>> iteration = rl.make_iteration(
    ...     model,
    ...     tx,
    ...     lambda rollout: (rollout.token_BT == 7).sum(1),
    ...     config=RLOOConfig(kl_coef=0.0),
    ...     sample_config=SampleConfig(max_new_tokens=8, n=4),
    ...     donate=False,
    ... )
    >>> state = rl.TrainState.create(params, tx)
    >>> prompt_QP, mask_QP = jax.numpy.full((8, 2), 3), jax.numpy.ones((8, 2))
    >>> for step in range(30):
    ...     key = jax.random.fold_in(jax.random.key(1), step)
    ...     state, metrics, rollout = iteration(state, params, prompt_QP, mask_QP, key)
    >>> bool(metrics["score"] > 6)  # of eight tokens nearly all are sevens; at first half a one
    True

Many seeds at once: ``jax.vmap(iteration, in_axes=(0, None, None, None, 0))`` of states and keys.
``run.loop.iterate`` is the same for a run, whose rewards may be Python, with its programs apart.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.algorithms import ALGORITHMS, Algorithm, greedy_baseline, reweight
from jaxrlhf.config import CriticTargetsConfig, OnPolicyConfig, PPOConfig, SampleConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import AnyBatch, Array, Params, Rollout, StopTable, TrainState
from jaxrlhf.mesh.sharding import take_rows
from jaxrlhf.models.transformer import Model, combine_params
from jaxrlhf.steps.sample import replays, sample
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import Loss, Metrics, make_update, pairs_loss, policy_loss

Iteration = Callable[..., tuple[TrainState, Metrics, Rollout]]

UNREAD = {"target_kl": None, "kl_controller": "fixed", "normalise": "sum", "rounds": 1}
"""Settings that look at numbers between steps, and the values with which they do not."""


class Parts(NamedTuple):
    """What an iteration is made of: all that is no array."""

    model: Model
    config: OnPolicyConfig
    algorithm: Algorithm
    sample_config: SampleConfig
    sampler: Callable[..., Rollout]
    stops: StopTable | None
    reward: Callable[..., Array]
    update: Callable[..., tuple[TrainState, Metrics]]


def make_iteration(
    model: Model,
    tx: optax.GradientTransformation,
    reward: Callable[..., Array],
    *,
    config: OnPolicyConfig = PPOConfig(),  # noqa: B008 (frozen)
    sample_config: SampleConfig = SampleConfig(),  # noqa: B008
    algorithm: Algorithm | None = None,
    loss: Loss | None = None,
    sampler: Callable[..., Rollout] = sample,
    stops: StopTable | None = None,
    microbatches: int = 1,
    donate: bool = True,
) -> Iteration:
    """iteration(state, reference, prompt_QP, prompt_mask_QP, key, …) → (state, metrics, rollout).

    Jitted: sample, score, price, credit, update, with nothing of the host in between. ``iterate``
    says what it takes; the module has an example.

    Args:
      tx: ``make_optimizer(…)``, or any other of optax.
      reward: reward(rollout, *given) → reward_B, traceable, reward units; a row that is not finite
        does not learn. ``given`` are what iteration is called with after ``key``: the weights of a
        reward model are to come that way, not by closure, which would compile them in.
      config: the algorithm and its settings, β, epochs and minibatches among them.
      sample_config: how responses are drawn, ``n`` of them a prompt; ``read_ends(…).settle`` adds
        what ends a model's responses.
      algorithm: instead of ``ALGORITHMS[config.name](config)``: a record of your own.
      loss: instead of ``policy_loss`` (``pairs_loss``) of the algorithm: loss(params, frozen,
        batch) → (scalar, metrics), additive over rows; ``frozen`` is the reference.
      sampler: instead of ``sample``: called as it is.
      stops: as in ``sample``.
      microbatches: as in ``make_update``.
      donate: the old state's buffers are reused, so ``reference`` has to be a copy.

    Raises:
      InputError: a setting that needs numbers between steps: ``target_kl``, ``kl_controller:
        adaptive``, ``normalise: each``, DAPO's ``rounds``; a teacher's; greedy samples; one sample
        a prompt where several are compared.
    """
    if config.has_teacher:
        raise InputError(f"{config.name}: learns from no reward: call distillation_loss instead")
    for name, value in UNREAD.items():
        if (given := getattr(config, name, value)) != value:
            raise InputError(f"{name}={given}: one compiled iteration cannot: {name}={value!r}")
    if not sample_config.temperature > 0:
        raise InputError(f"temperature={sample_config.temperature:g}: greedy: give more than 0")
    if config.in_groups and sample_config.n < 2:
        raise InputError(f"n={sample_config.n}: {config.name} compares samples: give at least 2")
    algorithm = algorithm or ALGORITHMS[config.name](config)
    kept = replays(model, sample_config) and algorithm.reads == "outputs"
    sample_config = replace(sample_config, router_replay=kept)
    loss = loss or _loss_of(model, config, algorithm, sample_config.temperature)
    update = make_update(tx, loss, microbatches)
    parts = Parts(model, config, algorithm, sample_config, sampler, stops, reward, update)
    return jax.jit(partial(iterate, parts), donate_argnums=(0,) if donate else ())


def _loss_of(
    model: Model, config: OnPolicyConfig, algorithm: Algorithm, temperature: float
) -> Loss:
    if algorithm.reads == "pairs":
        return pairs_loss(model, algorithm, temperature)
    coefficient = None
    if "value" in algorithm.needs:
        assert isinstance(config, CriticTargetsConfig)
        coefficient = config.value_coef
    return policy_loss(model, algorithm, temperature, value_coef=coefficient)


def iterate(
    parts: Parts,
    state: TrainState,
    reference: Params,
    prompt_QP: Array,
    prompt_mask_QP: Array,
    key: Array,
    *given: Any,
    kl_coef: Array | float | None = None,
) -> tuple[TrainState, Metrics, Rollout]:
    """One iteration, not jitted.

    Args:
      state: its params hold a ``head`` where the algorithm learns values; or ``{"lora": …}``.
      reference: the weights of π_ref, and those under the adapters.
      prompt_QP, prompt_mask_QP: as in ``sample``.
      key: of this iteration alone.
      given: what the reward is called with after the rollout.
      kl_coef: β, traced, in place of the config's.

    Returns:
      The new state; the metrics of the algorithm's targets, and means over the updates of those of
      its loss; and the rollout.
    """
    model, config, algorithm, sample_config = parts[:4]
    weights, lora = combine_params(state.params, reference)

    def draw(how: SampleConfig, value: bool) -> Rollout:
        prompts = prompt_QP, prompt_mask_QP
        return parts.sampler(model, weights, *prompts, key, how, lora, value, stops=parts.stops)

    def judge(rollout: Rollout) -> Array:
        return jnp.asarray(parts.reward(rollout, *given), jnp.float32)

    rollout = draw(sample_config, "value" in algorithm.needs)
    texts, temperature = (rollout.token_BT, rollout.attention_mask_BT), sample_config.temperature
    if config.old_logp == "rescore":
        how = *texts, temperature, lora
        logp_BT = score(model, weights, *how, expert_BTM=rollout.expert_BTM)
        rollout = replace(rollout, logp_BT=logp_BT * rollout.mask_BT)
    ref_logp_BT = score(model, reference, *texts, temperature)
    reward_B = judge(rollout)
    expected: list[Array] = []
    if "greedy" in algorithm.needs:
        greedy = draw(replace(sample_config, n=1, temperature=0.0, router_replay=False), False)
        expected = [greedy_baseline(config, greedy, judge(greedy), sample_config.n)]
    coefficients = {"kl_coef": jnp.asarray(config.kl_coef if kl_coef is None else kl_coef)}
    assert algorithm.targets is not None
    batch, measured = algorithm.targets(
        rollout, ref_logp_BT, reward_B, jnp.isfinite(reward_B), coefficients, *expected
    )
    state, learnt = _updates(config, parts.update, state, batch, reference, key)
    return state, {**measured, **learnt}, rollout


def _updates(
    config: OnPolicyConfig,
    update: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    batch: AnyBatch,
    frozen: Params,
    key: Array,
) -> tuple[TrainState, Metrics]:
    """Epochs × minibatches updates on one batch; metrics are means; _max, _min what they say."""
    epochs, pieces = config.epochs, config.minibatches
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % pieces:
        raise ValueError(f"{rows} rows % minibatches={pieces}: must be 0")
    if pieces == 1:
        row_KM = jnp.broadcast_to(jnp.arange(rows), (epochs, rows))
    else:
        # Draws have the numbers of their rows folded in, which begin at 0: these are far from them.
        orders = (jax.random.fold_in(key, 2**32 - 1 - epoch) for epoch in range(epochs))
        row_KM = jnp.stack([jax.random.permutation(order, rows) for order in orders])
        row_KM = row_KM.reshape(epochs * pieces, rows // pieces)

    def step(state: TrainState, row_M: Array) -> tuple[TrainState, Metrics]:
        part = batch
        if pieces > 1:
            part = jax.tree.map(lambda x: take_rows(x, row_M), batch)
            part = reweight(part, config.aggregation, config.length)
        return update(state, part, frozen)

    state, metrics = jax.lax.scan(step, state, row_KM)
    how = {"_max": jnp.max, "_min": jnp.min}
    return state, {name: how.get(name[-4:], jnp.mean)(x) for name, x in metrics.items()}
