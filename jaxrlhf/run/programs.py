"""The jitted programs of a run: the steps, joined to its networks and settings, as two records.

A program is a pure function of arrays. Those of policy and critic take ``params, frozen, …``:
what is trained, and the weights under it where that is adapters (else None). Those of the
reference take its ``params`` alone. What flows between programs has its rows split over the mesh
in one way, so that no program waits for rows to move.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.algorithms import Algorithm, greedy_baseline, reweight
from jaxrlhf.config import (
    Config,
    SampleConfig,
    has_critic,
    is_on_policy,
    on_policy,
    rows_at_once,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import (
    AnyBatch,
    Array,
    Params,
    PreferenceBatch,
    Rollout,
    States,
    StopTable,
    TrainState,
)
from jaxrlhf.mesh.sharding import few_rows_layout, row_layout, take_rows
from jaxrlhf.models.decode import Weights, decode_layout, lay_out
from jaxrlhf.models.transformer import Model, combine_params
from jaxrlhf.steps.balance import Balance
from jaxrlhf.steps.packed import PackedRows, in_pieces, keeps_apart
from jaxrlhf.steps.sample import replays, sample
from jaxrlhf.steps.score import forward, value
from jaxrlhf.steps.update import (
    at_position,
    candidate_rows,
    candidate_scores,
    candidate_token_scores,
    critic_loss,
    distillation_loss,
    make_optimizer,
    make_update,
    pairs_loss,
    policy_loss,
    rate_schedule,
    reward_model_loss,
    sft_loss,
)

Program = Callable[..., Any]


@dataclass(frozen=True)
class OnPolicyPrograms:
    """What one iteration of policy learning calls, in its order, and what held-out prompts need."""

    lay_out: Program
    """(params, frozen) → Weights of the policy as decoding reads them: a copy."""
    sample: Program
    """(params, frozen, Weights, prompt_QP, prompt_mask_QP, key) → Rollout of Q·n responses."""
    greedy: Program
    """The same, but one greedy response a prompt: what ReMax compares with."""
    baseline: Program
    """(greedy Rollout, reward_Q) → baseline_B: what that response is worth, for each sample."""
    merge: Program
    """(Rollouts, row_B) → Rollout of these rows of them: DAPO's rounds as one."""
    rescore: Program
    """(params, frozen, token_BT, attention_mask_BT, expert_BTM) → logp_BT, by a forward like the
    update's; of a Rollout that has no experts None."""
    reference: Program
    """(params, token_BT, attention_mask_BT) → ref_logp_BT, at the sampler's temperature."""
    value: Program
    """(params, frozen, token_BT, attention_mask_BT) → value_BT, by a critic of its own."""
    targets: Program
    """(Rollout, ref_logp_BT, reward_B, valid_B, coefficients, …) → (Batch, metrics), with a teacher
    Rollout → (TokenBatch, metrics); see ``Algorithm.targets``."""
    take: Program
    """(Batch, row_M) → the minibatch of these rows, with weights of its own."""
    update: Program
    """(TrainState, Batch, frozen) → (TrainState, metrics): one optimizer step of the policy; with a
    teacher ``frozen`` is a ``Taught``."""
    critic_update: Program | None
    """The same of a critic of its own; None where the policy's trunk serves, or none is learnt."""
    warmup: Program | None
    """As ``update``, but only the head on the policy's trunk learns; None without a warm-up."""
    eval_sample: Program
    """As ``sample``, for held-out prompts: T = 1, no truncation, ``eval.n`` responses each."""
    eval_reference: Program
    """As ``reference``, at T = 1."""


@dataclass(frozen=True)
class OfflinePrograms:
    """What learning from rows calls."""

    update: Program
    """(TrainState, batch, frozen) → (TrainState, metrics): one optimizer step."""
    reference: Program | None
    """(params, PreferenceBatch) → PreferenceBatch with ref_logp_BCT; None without a reference."""
    loss: Program | None = None
    """(params, frozen, batch) → (loss, metrics) of held-out rows; None for reward models."""
    scores: Program | None = None
    """(params, frozen, batch) → score_BC, or of steps score_BCT; reward models alone."""
    loss_of_scores: Program | None = None
    """(scores, batch) → (loss, metrics); reward models alone."""


def on_policy_programs(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    reference_model: Model,
    critic_model: Model,
    states: dict[str, TrainState],
    frozen: Params | None,
    mesh: Mesh,
    stops: StopTable | None = None,
) -> OnPolicyPrograms:
    """The programs of an iteration; ``states`` say where updated states are to lie, ``frozen`` what
    is under the policy's, and ``stops`` which strings end a response."""
    rows, few = row_layout(mesh), few_rows_layout(mesh, config.data.batch_size)
    temperature, settings = config.sample.temperature, on_policy(config)
    assert algorithm.targets is not None

    estimate = packed_value(critic_model)

    def packed(model: Model, temperature: float) -> Program:
        return packed_logp(model, temperature, config.data.max_prompt_tokens)

    def scorer(temperature: float) -> Program:
        logp = packed(reference_model, temperature)

        def reference_score(params: Params, token_BT: Array, mask_BT: Array) -> Array:
            return logp(params, None, token_BT, mask_BT)

        return jax.jit(reference_score, out_shardings=rows)

    def take(batch: AnyBatch, row_M: Array) -> AnyBatch:
        part = jax.tree.map(lambda x: take_rows(x, row_M), batch)
        return reweight(part, settings.aggregation, settings.length)

    def baseline(greedy: Rollout, reward_Q: Array) -> Array:
        return greedy_baseline(settings, greedy, reward_Q, config.sample.n)

    shared = has_critic(config) and config.critic.kind == "shared"
    # Held-out samples are from the policy itself, whatever truncation it is trained under.
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    held_out = replace(config.sample, n=config.eval.n, router_replay=False, **plain)
    # Of a loss on pairs, or on a teacher's distributions, the sampler's log-probs are no part.
    learns = algorithm.reads == "outputs" and "teacher" not in algorithm.needs
    drawn = replace(config.sample, router_replay=learns and replays(model, config.sample))
    once = replace(config.sample, n=1, temperature=0.0, router_replay=False)
    return OnPolicyPrograms(
        lay_out=decode_weights(model, mesh, states["policy"].params, frozen),
        sample=sampler(model, drawn, rows, shared, stops),
        greedy=sampler(model, once, few, stops=stops),
        baseline=jax.jit(baseline, out_shardings=rows),
        merge=jax.jit(merge, out_shardings=rows),
        rescore=jax.jit(packed(model, temperature), out_shardings=rows),
        reference=scorer(temperature),
        value=jax.jit(estimate, out_shardings=rows),
        targets=jax.jit(algorithm.targets, out_shardings=(rows, None)),
        take=jax.jit(take, out_shardings=rows),
        **updates(config, algorithm, model, reference_model, critic_model, states),
        eval_sample=sampler(model, held_out, rows, stops=stops),
        eval_reference=scorer(1.0),
    )


def sampler(
    model: Model,
    settings: SampleConfig,
    layout: Any,
    value: bool = False,
    stops: StopTable | None = None,
) -> Program:
    """(params, frozen, Weights, prompt_QP, prompt_mask_QP, key, row_B = None) → Rollout; see
    ``sample``."""

    def draw(
        params: Params,
        frozen: Any,
        decoding: Weights,
        prompt_QP: Array,
        prompt_mask_QP: Array,
        key: Array,
        row_B: Array | None = None,
    ) -> Rollout:
        weights, lora = combine_params(params, frozen)
        prompts = prompt_QP, prompt_mask_QP
        how = settings, lora, value, row_B, stops
        return sample(model, weights, *prompts, key, *how, decoding)

    return jax.jit(draw, out_shardings=layout)


def packed_logp(model: Model, temperature: float, first: int) -> Program:
    """(params, frozen, token_BT, attention_mask_BT, expert_BTM = None) → log π of tokens from
    column ``first`` on, [B, T], by ``forward`` of packed rows, some at a time."""

    def rescore(
        params: Params,
        frozen: Any,
        token_BT: Array,
        mask_BT: Array,
        expert_BTM: Array | None = None,
    ) -> Array:
        weights, lora = combine_params(params, frozen)

        def logp(rows: PackedRows) -> Array:
            token_RT, mask_RT, segment_RT, wanted_RT, expert_RTM = rows
            more = {"lora": lora, "segment_BT": segment_RT, "wanted_BT": wanted_RT}
            more["expert_BTM"] = expert_RTM
            return forward(model, weights, token_RT, mask_RT, temperature, **more).logp_BT

        more = {"first": first, "apart": keeps_apart(model), "expert_BTM": expert_BTM}
        return in_pieces(logp, token_BT, mask_BT, **more)

    return rescore


def packed_value(model: Model) -> Program:
    """(params, frozen, token_BT, attention_mask_BT) → V(tokens < t), [B, T]; likewise."""

    def estimate(params: Params, frozen: Any, token_BT: Array, mask_BT: Array) -> Array:
        weights, lora = combine_params(params, frozen)

        def values(rows: PackedRows) -> Array:
            return value(
                model, weights, rows.token_RT, rows.attention_mask_RT, lora, rows.segment_RT
            )

        return in_pieces(values, token_BT, mask_BT, apart=keeps_apart(model))

    return estimate


IN_TURN = {"xla_tpu_enable_latency_hiding_scheduler": False}
"""How a TPU's compiler is to order gathers that nothing is hidden behind: each before the copy that
lays its result out. All at once, they would take the room of the weights a second time."""


def decode_weights(model: Model, mesh: Mesh, params: Params, frozen: Params | None) -> Program:
    """(params, frozen) → Weights, laid out for decoding, of such as these: ``models.decode``."""

    def arrange(params: Params, frozen: Any) -> Weights:
        return lay_out(model, *combine_params(params, frozen))

    # How they lie depends on the devices, which the mesh in force says.
    with jax.set_mesh(mesh):
        layout = decode_layout(model, mesh, jax.eval_shape(arrange, params, frozen))
    options = IN_TURN if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(arrange, out_shardings=layout, compiler_options=options)


def merge(rollouts: tuple[Rollout, ...], row_B: Array) -> Rollout:
    """Rows out of several rollouts."""
    return jax.tree.map(lambda *parts: take_rows(jnp.concatenate(parts), row_B), *rollouts)


def updates(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    reference_model: Model,
    critic_model: Model,
    states: dict[str, TrainState],
) -> dict[str, Any]:
    """The optimizer steps: of the policy, of a separate critic, of a shared head's warm-up."""
    first, temperature = config.data.max_prompt_tokens, config.sample.temperature

    # A loss on pairs needs both answers at once, wherever they would be packed.
    packed = None if algorithm.reads == "pairs" else rows_at_once(config)

    def update(loss: Any, who: str, settings: Config) -> Program:
        network = critic_model if who == "critic" else model
        balance = balance_of(settings, algorithm, model) if who == "policy" else None
        return update_of(settings, loss, states[who], packed, network, balance)

    programs: dict[str, Any] = {"critic_update": None, "warmup": None}
    coefficient = None
    if "value" in algorithm.needs and config.critic.kind == "shared":
        settings: Any = config.algorithm  # one that learns values
        coefficient = settings.value_coef
        if config.critic.warmup:
            head_only = critic_loss(model, algorithm, head_only=True)
            # A fresh head's values are noise: the trunk, the policy's too, is not to learn of it.
            programs["warmup"] = update_of(config, head_only, states["policy"], packed, model)
    elif "value" in algorithm.needs:
        loss = critic_loss(critic_model, algorithm)
        programs["critic_update"] = update(loss, "critic", critic_config(config))
    if algorithm.reads == "pairs":
        loss = pairs_loss(model, algorithm, temperature, first, model.routes)
    elif "teacher" in algorithm.needs:
        loss = distillation_loss(model, reference_model, algorithm, temperature, first)
    else:
        loss = policy_loss(model, algorithm, temperature, first, coefficient, model.routes)
    return {**programs, "update": update(loss, "policy", config)}


def offline_programs(
    config: Config,
    algorithm: Algorithm,
    model: Model,
    reference_model: Model | None,
    states: dict[str, TrainState],
    mesh: Mesh,
) -> OfflinePrograms:
    """The programs of learning from rows: the update, and what held-out rows are measured with."""
    join = {
        "scores": reward_model_loss,
        "steps": reward_model_loss,
        "pairs": pairs_loss,
        "outputs": sft_loss,
    }
    loss = join[algorithm.reads](model, algorithm)
    trained = join[algorithm.reads](model, algorithm, routers=model.routes)
    update = update_of(
        config, trained, states["policy"], balance=balance_of(config, algorithm, model)
    )
    reference = None
    if reference_model is not None:
        logp = packed_logp(reference_model, 1.0, 0)

        def compare(params: Params, batch: PreferenceBatch) -> PreferenceBatch:
            ref_logp_RT = logp(params, None, *candidate_rows(batch))
            return replace(batch, ref_logp_BCT=ref_logp_RT.reshape(batch.token_BCT.shape))

        reference = jax.jit(compare, out_shardings=row_layout(mesh))
    scores = {"scores": candidate_scores, "steps": candidate_token_scores}.get(algorithm.reads)
    if scores is None:
        return OfflinePrograms(update, reference, loss=jax.jit(loss))
    # The loss reads scores, and so do accuracy and calibration: one forward pass serves all.
    judged = jax.jit(partial(scores, model))
    return OfflinePrograms(update, reference, scores=judged, loss_of_scores=jax.jit(algorithm.loss))


def update_of(
    config: Config,
    loss: Any,
    state: TrainState,
    packed: int | None = None,
    model: Model | None = None,
    balance: Balance | None = None,
) -> Program:
    """One optimizer step by the config's optimizer; the new state lies where ``state`` does.
    ``packed``, ``model`` and ``balance`` as in ``make_update``."""
    rate = rate_schedule(config.optim, updates_before(config, config.steps))
    layout, pieces = layout_of(state), config.optim.microbatches
    tx = optimizer(config)
    more = {"layout": layout, "rate": rate, "packed": packed, "model": model, "balance": balance}
    return make_update(tx, loss, pieces, **more)


def balance_of(config: Config, algorithm: Algorithm, model: Model) -> Balance | None:
    """What the config adds to the losses of a mixture of experts; None of other models, and where a
    teacher's distributions are learnt.

    Raises:
      InputError: it adds something there.
    """
    optim, taught = config.optim, "teacher" in algorithm.needs
    if model.routes and not taught:
        return Balance(optim.router_aux_loss_coef, optim.router_z_loss_coef)
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if coefficient := getattr(optim, name):
            why = "distillation has none" if taught else "the model is no mixture of experts"
            raise InputError(f"optim.{name}={coefficient:g}: {why}: leave it out")
    return None


def optimizer(config: Config) -> Any:
    """The policy's optimizer, its schedule over all the updates that the policy is to take; the
    critic's is that of ``critic_config``."""
    return make_optimizer(config.optim, updates_before(config, config.steps))


def updates_before(config: Config, step: int) -> int:
    """Updates that the policy's state is to have taken before iteration ``step`` (from 0).

    max(step − w, 0)·epochs·minibatches, or step where rows are learnt from. w is critic.warmup
    with a separate critic: the policy waits meanwhile, and so does its schedule. A shared head is
    warmed up by the policy's own optimizer, so w is 0: those updates are its first.

    ``updates_before(config, config.steps)`` is what a schedule decays over, and each iteration
    starts at ``updates_before(config, step)``, whatever was left out before: updates after an early
    stop (algorithm.target_kl), or those whose gradient was not finite. So the rate of the last
    iteration is the planned one.
    """
    if not is_on_policy(config):
        return step
    settings = on_policy(config)
    wait = config.critic.warmup if config.critic.kind == "separate" else 0
    return max(step - wait, 0) * settings.epochs * settings.minibatches


def critic_config(config: Config) -> Config:
    """The config with the optimizer of a separate critic: its rate, and no warm-up to wait for."""
    rate = config.critic.learning_rate
    optim = replace(config.optim, learning_rate=rate) if rate else config.optim
    return replace(config, optim=optim, critic=replace(config.critic, warmup=0))


def on_schedule(config: Config, states: States, step: int) -> States:
    """The states at the start of iteration ``step``, their schedules where the plan has them."""
    of = {"policy": config, "critic": critic_config(config)}
    return {
        name: at_position(state, updates_before(of[name], step)) if name in of else state
        for name, state in states.items()
    }


def layout_of(state: TrainState) -> Any:
    """Where each array of a state lies."""
    return jax.tree.map(lambda x: x.sharding, state)
