"""Training a table with the algorithms as they are: their own ``targets`` and ``loss``."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.algorithms import Algorithm
from jaxrlhf.oracle.tabular import Problem, forward, kl_to, log_policy, rows
from jaxrlhf.types import Array, Batch, Params, PreferenceBatch, Rollout


@dataclass(frozen=True)
class Settings:
    """How long, and how fast. Static: one compilation each."""

    iterations: int = 2000
    samples: int = 64
    """Responses a prompt and iteration."""
    exact: bool = False
    """Every response once, weighted by its probability: the gradient without noise."""
    epochs: int = 1
    """Updates a rollout."""
    lag: int = 0
    """Iterations that the sampling policy is behind."""
    learning_rate: float = 0.03
    """At the start; falls to 0 as a cosine."""


class Result(NamedTuple):
    """Parameters at the end, and KL(π_θ‖π*) before each iteration and after the last, nats."""

    params: Params
    kl_I: Array


def learn(
    algorithm: Algorithm, problem: Problem, key: Array, settings: Settings = Settings()
) -> Result:
    """Train from the reference, on policy; jit it with ``algorithm`` and ``settings`` static.

    A pure function of ``problem`` and ``key``: ``jax.vmap`` over either trains many seeds, or many
    β, at once.
    """
    steps = settings.iterations * settings.epochs
    tx = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, steps))
    optimum_QY, _ = problem.optimum()

    def step(carry: Any, key: Array) -> tuple[Any, Array]:
        params, opt_state, past = carry
        old = past[0] if past else params
        rollout, reward_B, chance_B = draw(old, problem, key, settings)
        batch = targets(algorithm, problem, params, rollout, reward_B)
        if isinstance(batch, Batch):
            batch = replace(batch, weight_BT=batch.weight_BT * chance_B[:, None])
        before = kl_to(params, problem.space, optimum_QY)
        past = (*past[1:], params) if past else past
        for _ in range(settings.epochs):
            grads = jax.grad(total_loss)(params, algorithm, problem, batch)
            updates, opt_state = tx.update(grads, opt_state)
            params = optax.apply_updates(params, updates)
        return (params, opt_state, past), before

    start = problem.ref
    carry = (start, tx.init(start), (start,) * settings.lag)
    (params, *_), kl_I = jax.lax.scan(step, carry, jax.random.split(key, settings.iterations))
    return Result(params, jnp.append(kl_I, kl_to(params, problem.space, optimum_QY)))


def draw(
    params: Params, problem: Problem, key: Array, settings: Settings
) -> tuple[Rollout, Array, Array]:
    """A rollout, its rewards [B], and what each row counts for: 1, or Y·π(y|x) if it is exact."""
    space, (prompts, count) = problem.space, problem.reward_QY.shape
    logp_QY = log_policy(params, space)
    if settings.exact:
        n, y_QG = count, jnp.broadcast_to(jnp.arange(count), (prompts, count))
        chance_B = count * jnp.exp(logp_QY).reshape(-1)
    else:
        n = settings.samples
        y_QG = jax.random.categorical(key, logp_QY[:, None], shape=(prompts, n))
        chance_B = jnp.ones(prompts * n)
    y_B, q_B = y_QG.reshape(-1), jnp.repeat(jnp.arange(prompts), n)
    token_BT = space.token_YT[y_B].at[:, 0].set(q_B)
    mask_BT = space.mask_YT[y_B]
    outputs = forward(params, space, token_BT, mask_BT)
    rollout = Rollout(
        token_BT=token_BT,
        attention_mask_BT=mask_BT.at[:, 0].set(1).astype(jnp.int32),
        mask_BT=mask_BT,
        logp_BT=outputs.logp_BT,
        sample_logp_BT=outputs.logp_BT,
        ended_B=space.ended_Y[y_B],
        value_BT=outputs.value_BT,
        n=n,
    )
    return rollout, problem.reward_QY[q_B, y_B], chance_B


def targets(
    algorithm: Algorithm, problem: Problem, params: Params, rollout: Rollout, reward_B: Array
) -> Any:
    """The algorithm's own targets, as the loop calls them; old log-probs are rescored."""
    assert algorithm.targets is not None
    space = problem.space
    given = (space, rollout.token_BT, rollout.mask_BT)
    now = forward(params, *given)
    rollout = replace(rollout, logp_BT=now.logp_BT, value_BT=now.value_BT)
    extra = {}
    if "value" in algorithm.needs:
        extra["value_BT"] = now.value_BT
    if "greedy" in algorithm.needs:
        likeliest_Q = greedy(params, problem)
        extra["baseline_B"] = jnp.repeat(likeliest_Q, rollout.n)
    batch, _ = algorithm.targets(
        rollout,
        forward(problem.ref, *given).logp_BT,
        reward_B,
        jnp.ones_like(reward_B, bool),
        {"kl_coef": problem.beta},
        **extra,
    )
    return batch


def greedy(params: Params, problem: Problem) -> Array:
    """The reward of each prompt's greedy response, [Q]."""
    space, prompts = problem.space, problem.reward_QY.shape[0]
    token_BT, mask_BT = rows(space, prompts)
    highest_QS = jax.nn.log_softmax(params["logits"]).max(2)
    outputs = forward({**params, "value": highest_QS}, space, token_BT, mask_BT)
    assert outputs.value_BT is not None
    follows_BT = (outputs.logp_BT >= outputs.value_BT) | (mask_BT == 0)
    follows_QY = follows_BT.all(1).reshape(prompts, -1)
    return jnp.take_along_axis(problem.reward_QY, follows_QY.argmax(1)[:, None], axis=1)[:, 0]


def total_loss(params: Params, algorithm: Algorithm, problem: Problem, batch: Any) -> Array:
    """The policy's loss plus the critic's, of a table."""
    if isinstance(batch, PreferenceBatch):
        logp_BCT = candidate_logp(params, problem, batch)
        return algorithm.loss(logp_BCT, batch)[0]
    outputs = forward(params, problem.space, batch.token_BT, batch.mask_BT)
    loss, _ = algorithm.loss(outputs, batch)
    if algorithm.value_loss is not None:
        loss += algorithm.value_loss(outputs, batch)[0]
    return loss


def candidate_logp(params: Params, problem: Problem, batch: PreferenceBatch) -> Array:
    """log π of each token of each candidate, [B, C, T]."""
    assert batch.mask_BCT is not None
    shape = batch.token_BCT.shape
    token, mask = batch.token_BCT.reshape(-1, shape[2]), batch.mask_BCT.reshape(-1, shape[2])
    return forward(params, problem.space, token, mask).logp_BT.reshape(shape)


def learn_pairs(
    algorithm: Algorithm,
    problem: Problem,
    settings: Settings = Settings(),
    target_QY: Array | None = None,
) -> Result:
    """Train on all pairs of responses at once: exact Bradley-Terry preferences, no noise.

    A pair is drawn from the reference twice and preferred with probability σ(r − r′); each ordered
    pair is a row, and its probability its weight.

    Args:
      target_QY: the policy that the KL is measured to; π* if None.
    """
    tx = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.iterations))
    goal_QY = problem.optimum()[0] if target_QY is None else target_QY
    batch = all_pairs(problem)

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        params, opt_state = carry
        grads = jax.grad(total_loss)(params, algorithm, problem, batch)
        updates, opt_state = tx.update(grads, opt_state)
        before = kl_to(params, problem.space, goal_QY)
        return (optax.apply_updates(params, updates), opt_state), before

    carry = (problem.ref, tx.init(problem.ref))
    (params, _), kl_I = jax.lax.scan(step, carry, None, settings.iterations)
    return Result(params, jnp.append(kl_I, kl_to(params, problem.space, goal_QY)))


def all_pairs(problem: Problem) -> PreferenceBatch:
    """Every ordered pair of different responses to each prompt, weighted by its probability."""
    prompts, count = problem.reward_QY.shape
    token_BT, mask_BT = rows(problem.space, prompts)
    left, right = jnp.where(~jnp.eye(count, dtype=bool), size=count * (count - 1))
    chance_QY = jnp.exp(log_policy(problem.ref, problem.space))
    gap_QZ = problem.reward_QY[:, left] - problem.reward_QY[:, right]
    weight_QZ = chance_QY[:, left] * chance_QY[:, right] * jax.nn.sigmoid(gap_QZ)
    row_BC = jnp.stack([left, right], 1)[None] + jnp.arange(prompts)[:, None, None] * count
    row_BC = row_BC.reshape(-1, 2)
    weight_B = weight_QZ.reshape(-1)
    ref_logp_BT = forward(problem.ref, problem.space, token_BT, mask_BT).logp_BT
    return PreferenceBatch(
        token_BCT=token_BT[row_BC],
        attention_mask_BCT=mask_BT[row_BC].astype(jnp.int32),
        margin_B=jnp.zeros_like(weight_B),
        weight_B=weight_B / weight_B.sum(),
        mask_BCT=mask_BT[row_BC],
        ref_logp_BCT=ref_logp_BT[row_BC],
    )
