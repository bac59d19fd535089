"""Learning where the right answer is known: a space of responses small enough to enumerate.

There π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x) is a table, KL(π_θ‖π*) is a sum, and a whole
training run is one ``lax.scan`` over the algorithms as they are: their own ``targets`` and
``loss``. ``python -m jaxrlhf.study.oracle`` prints how close each one comes.

Axes besides those of types.py: ``Y`` responses, ``S`` states (the prefixes of a response).
"""

import argparse
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxrlhf.algorithms import ALGORITHMS, Algorithm, optimal_policy
from jaxrlhf.config import (
    A2CConfig,
    CISPOConfig,
    DAPOConfig,
    DPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    OnPolicyConfig,
    PPOConfig,
    ReinforceConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
)
from jaxrlhf.core.types import Array, Batch, Outputs, Params, PreferenceBatch, Rollout


@struct.dataclass
class Space:
    """Every response of at most ``length`` tokens out of ``vocab``; token 0 ends one.

    Rows have T = 1 + length columns, as a Rollout's: column 0 holds the prompt's index.
    """

    token_YT: Array
    mask_YT: Array
    """float32, 1 on the response's tokens, its end included."""
    ended_Y: Array
    """bool, False for a response that was cut off at ``length`` tokens."""
    vocab: int = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)

    @property
    def states(self) -> int:
        """Prefixes that a token can be chosen in."""
        return sum(self.vocab**size for size in range(self.length))


class Problem(NamedTuple):
    """Prompts with a reference policy and a reward for every response."""

    space: Space
    ref: Params
    reward_QY: Array
    beta: Array

    def optimum(self) -> tuple[Array, Array]:
        """log π*(y|x) [Q, Y] and log Z(x) [Q], nats."""
        return optimal_policy(log_policy(self.ref, self.space), self.reward_QY, self.beta)


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
    """Parameters at the end, and what is known of π_θ before each iteration and after the last."""

    params: Params
    kl_I: Array
    """KL(π_θ‖π*), nats."""
    ref_kl_I: Array
    """KL(π_θ‖π_ref), nats."""
    reward_I: Array
    """E[r], mean over prompts."""


def make_space(vocab: int = 4, length: int = 3) -> Space:
    """The 40 responses (3 words and an end, up to three tokens), or another such space."""
    words = range(1, vocab)
    bodies = (itertools.product(words, repeat=size) for size in range(length))
    rows = [(*body, 0) for some in bodies for body in some]
    rows += list(itertools.product(words, repeat=length))
    token_YT = np.zeros((len(rows), 1 + length), np.int32)
    mask_YT = np.zeros((len(rows), 1 + length), np.float32)
    for y, row in enumerate(rows):
        token_YT[y, 1 : 1 + len(row)] = row
        mask_YT[y, 1 : 1 + len(row)] = 1
    ended_Y = np.array([row[-1] == 0 for row in rows])
    return Space(jnp.array(token_YT), jnp.array(mask_YT), jnp.array(ended_Y), vocab, length)


def make_problem(
    key: Array, beta: float | Array = 0.5, prompts: int = 4, space: Space | None = None
) -> Problem:
    """Random reference logits N(0, ½²) and rewards N(0, 1)."""
    space = make_space() if space is None else space
    logits_key, reward_key = jax.random.split(key)
    logits_QSV = 0.5 * jax.random.normal(logits_key, (prompts, space.states, space.vocab))
    reward_QY = jax.random.normal(reward_key, (prompts, space.token_YT.shape[0]))
    ref = {"logits": logits_QSV, "value": jnp.zeros(logits_QSV.shape[:2])}
    return Problem(space, ref, reward_QY, jnp.asarray(beta, jnp.float32))


def forward(params: Params, space: Space, token_BT: Array, mask_BT: Array) -> Outputs:
    """What a transformer's forward pass is elsewhere: log-prob, entropy, value of response tokens.

    Args:
      params: ``logits`` [Q, S, V], and ``value`` [Q, S], of the state before a token.
      token_BT: int32, column 0 the prompt's index.
      mask_BT: 1 on response tokens.
    """
    state_BT = states(space, token_BT)
    logp_BTV = jax.nn.log_softmax(params["logits"])[token_BT[:, :1], state_BT]
    logp_BT = jnp.take_along_axis(logp_BTV, token_BT[..., None], axis=2)[..., 0]
    return Outputs(
        logp_BT=jnp.where(mask_BT != 0, logp_BT, 0),
        entropy_BT=jnp.where(mask_BT != 0, -(jnp.exp(logp_BTV) * logp_BTV).sum(2), 0),
        value_BT=jnp.where(mask_BT != 0, params["value"][token_BT[:, :1], state_BT], 0),
    )


def states(space: Space, token_BT: Array) -> Array:
    """The index of the prefix that each column's token is chosen in; column 0 and padding: any."""
    # prefixes of one size stand together, after all shorter ones: the first of size n is number
    # Σ_{m<n} V^m, and within them a prefix is a number to the base V
    index, first, columns = jnp.zeros_like(token_BT[:, 0]), 0, [jnp.zeros_like(token_BT[:, 0])]
    for size in range(space.length):
        columns.append(first + index)
        index = index * space.vocab + token_BT[:, 1 + size]
        first += space.vocab**size
    return jnp.stack(columns, axis=1)


def rows(space: Space, prompts: int) -> tuple[Array, Array]:
    """token_BT and mask_BT of every response to every prompt, prompt-major: B = Q·Y."""
    token_QYT = jnp.broadcast_to(space.token_YT, (prompts, *space.token_YT.shape))
    token_QYT = token_QYT.at[:, :, 0].set(jnp.arange(prompts)[:, None])
    mask_QYT = jnp.broadcast_to(space.mask_YT, token_QYT.shape)
    return token_QYT.reshape(-1, space.length + 1), mask_QYT.reshape(-1, space.length + 1)


def log_policy(params: Params, space: Space) -> Array:
    """log π(y|x) of every response, [Q, Y], nats."""
    prompts = params["logits"].shape[0]
    return forward(params, space, *rows(space, prompts)).logp_BT.sum(1).reshape(prompts, -1)


def kl_to(params: Params, space: Space, logp_QY: Array) -> Array:
    """KL(π_θ‖π) to a policy given as a table, mean over prompts, nats."""
    own_QY = log_policy(params, space)
    return (jnp.exp(own_QY) * (own_QY - logp_QY)).sum(1).mean()


def measured(params: Params, problem: Problem, goal_QY: Array) -> tuple[Array, Array, Array]:
    """KL to a goal and to the reference, nats, and E[r], of a policy: exact sums."""
    ref_QY = log_policy(problem.ref, problem.space)
    chance_QY = jnp.exp(log_policy(params, problem.space))
    kl, ref_kl = (kl_to(params, problem.space, table) for table in (goal_QY, ref_QY))
    return kl, ref_kl, (chance_QY * problem.reward_QY).sum(1).mean()


def learn(
    algorithm: Algorithm, problem: Problem, key: Array, settings: Settings = Settings()
) -> Result:
    """Train from the reference, on policy; jit it with ``algorithm`` and ``settings`` static.

    A pure function of ``problem`` and ``key``: ``jax.vmap`` over either trains many seeds, or many
    β, at once.
    """
    tx = adam(settings, settings.iterations * settings.epochs)
    optimum_QY, _ = problem.optimum()

    def step(carry: Any, key: Array) -> tuple[Any, tuple[Array, ...]]:
        params, opt_state, past = carry
        # the oldest of the last ``lag`` policies samples; without a lag, the current one
        rollout, reward_B, chance_B = draw(past[0] if past else params, problem, key, settings)
        batch = targets(algorithm, problem, params, rollout, reward_B)
        if isinstance(batch, Batch):
            batch = replace(batch, weight_BT=batch.weight_BT * chance_B[:, None])
        before = measured(params, problem, optimum_QY)
        past = (*past[1:], params) if past else past
        for _ in range(settings.epochs):
            params, opt_state = update(tx, params, opt_state, algorithm, problem, batch)
        return (params, opt_state, past), before

    start = problem.ref
    carry = (start, tx.init(start), (start,) * settings.lag)
    keys = jax.random.split(key, settings.iterations)
    (params, *_), known = jax.lax.scan(step, carry, keys)
    return Result(params, *map(jnp.append, known, measured(params, problem, optimum_QY)))


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
    tx = adam(settings, settings.iterations)
    goal_QY = problem.optimum()[0] if target_QY is None else target_QY
    batch = all_pairs(problem)

    def step(carry: Any, _: None) -> tuple[Any, tuple[Array, ...]]:
        params, opt_state = carry
        before = measured(params, problem, goal_QY)
        return update(tx, params, opt_state, algorithm, problem, batch), before

    carry = (problem.ref, tx.init(problem.ref))
    (params, _), known = jax.lax.scan(step, carry, None, settings.iterations)
    return Result(params, *map(jnp.append, known, measured(params, problem, goal_QY)))


def adam(settings: Settings, steps: int) -> optax.GradientTransformation:
    """Adam whose rate falls to 0 as a cosine: a constant one would circle around the optimum."""
    return optax.adam(optax.cosine_decay_schedule(settings.learning_rate, steps))


def update(
    tx: optax.GradientTransformation, params: Params, opt_state: Any, *given: Any
) -> tuple[Params, Any]:
    """One step down ``total_loss``: parameters and the optimizer's state after it."""
    grads = jax.grad(total_loss)(params, *given)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


def draw(
    params: Params, problem: Problem, key: Array, settings: Settings
) -> tuple[Rollout, Array, Array]:
    """A rollout, its rewards [B], and what each row counts for: 1, or Y·π(y|x) if it is exact."""
    space, (prompts, count) = problem.space, problem.reward_QY.shape
    logp_QY = log_policy(params, space)
    if settings.exact:
        n, y_QG = count, jnp.broadcast_to(jnp.arange(count), (prompts, count))
        # the mean over Y rows weighted by Y·π is Σ_y π(y|x)·(…), the expectation itself
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
    given = (problem.space, rollout.token_BT, rollout.mask_BT)
    now = forward(params, *given)
    extra = {}
    if "value" in algorithm.needs:
        extra["value_BT"] = now.value_BT
    if "greedy" in algorithm.needs:
        extra["baseline_B"] = jnp.repeat(greedy(params, problem), rollout.n)
    if "scores" in algorithm.needs:
        extra |= {"score_BS": reward_B[:, None], "weight_S": jnp.ones(1)}
    batch, _ = algorithm.targets(
        replace(rollout, logp_BT=now.logp_BT, value_BT=now.value_BT),
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
    # with the highest log-prob as a state's value, the greedy response is the one whose tokens
    # all reach it
    highest_QS = jax.nn.log_softmax(params["logits"]).max(2)
    outputs = forward({**params, "value": highest_QS}, space, token_BT, mask_BT)
    assert outputs.value_BT is not None
    follows_BT = (outputs.logp_BT >= outputs.value_BT) | (mask_BT == 0)
    follows_QY = follows_BT.all(1).reshape(prompts, -1)
    return jnp.take_along_axis(problem.reward_QY, follows_QY.argmax(1)[:, None], axis=1)[:, 0]


def total_loss(params: Params, algorithm: Algorithm, problem: Problem, batch: Any) -> Array:
    """The policy's loss plus the critic's, of a table."""
    if isinstance(batch, PreferenceBatch):
        assert batch.mask_BCT is not None
        shape = batch.token_BCT.shape
        token_BT, mask_BT = (x.reshape(-1, shape[2]) for x in (batch.token_BCT, batch.mask_BCT))
        logp_BT = forward(params, problem.space, token_BT, mask_BT).logp_BT
        return algorithm.loss(logp_BT.reshape(shape), batch)[0]
    outputs = forward(params, problem.space, batch.token_BT, batch.mask_BT)
    loss, _ = algorithm.loss(outputs, batch)
    if algorithm.value_loss is not None:
        loss += algorithm.value_loss(outputs, batch)[0]
    return loss


def all_pairs(problem: Problem) -> PreferenceBatch:
    """Every ordered pair of different responses to each prompt, weighted by its probability."""
    prompts, count = problem.reward_QY.shape
    token_BT, mask_BT = rows(problem.space, prompts)
    left, right = jnp.where(~jnp.eye(count, dtype=bool), size=count * (count - 1))
    # that both are drawn and the left one is preferred: π_ref(y)·π_ref(y′)·σ(r − r′)
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


REGULARISED: tuple[OnPolicyConfig, ...] = (
    PPOConfig(),
    A2CConfig(),
    ReinforceConfig(),
    ReMaxConfig(),
    RLOOConfig(),
    ReinforcePPConfig(),
    GRPOConfig(kl_in="reward"),
    DrGRPOConfig(kl_in="reward"),
    DAPOConfig(kl_in="reward"),
    GSPOConfig(kl_in="reward"),
    CISPOConfig(kl_in="reward"),
)
"""Algorithms whose objective is E[r] − β·KL: their optimum is π*. With the KL in the reward every
return is the same at π*, so all advantages are 0 there, whatever they are scaled by."""

EXACT = Settings(iterations=1500, exact=True, learning_rate=0.1)
SAMPLED = Settings(iterations=2000)


def main() -> None:
    """How close each algorithm comes to the policy that is known to be best: python -m
    jaxrlhf.study.oracle.

    A line each: KL(π_θ‖π*) at the start, at the end with exact gradients and with sampled ones,
    nats, and the way there as a small plot on a logarithmic scale.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxrlhf.study.oracle", description=main.__doc__
    )
    parser.add_argument("--seed", type=int, default=0, help="of the problem and of the draws")
    parser.add_argument("--beta", type=float, default=0.5, help="β, reward units a nat")
    given = parser.parse_args()
    if given.beta <= 0:
        parser.error(f"--beta {given.beta}: must be above 0")
    problem = make_problem(jax.random.key(given.seed), given.beta)
    print(f"{'algorithm':<14}{'start':>9}{'exact':>11}{'sampled':>11}  way there, sampled")
    for config in REGULARISED:
        exact, sampled = (curve(config, problem, given.seed, how) for how in (EXACT, SAMPLED))
        line = f"{config.name:<14}{sampled[0]:>9.3f}{exact[-1]:>11.1e}{sampled[-1]:>11.1e}"
        print(f"{line}  {plot(sampled)}")
    preferences = ALGORITHMS["dpo"](DPOConfig(beta=given.beta))
    kl_I = np.asarray(jax.jit(learn_pairs, static_argnums=(0, 2))(preferences, problem, EXACT).kl_I)
    print(f"{'dpo':<14}{kl_I[0]:>9.3f}{kl_I[-1]:>11.1e}{'':>11}  {plot(kl_I)}")


def curve(config: OnPolicyConfig, problem: Problem, seed: int, settings: Settings) -> np.ndarray:
    """KL(π_θ‖π*) after each iteration, nats."""
    algorithm = ALGORITHMS[config.name](config)
    train = jax.jit(learn, static_argnums=(0, 3))
    return np.asarray(train(algorithm, problem, jax.random.key(seed), settings).kl_I)


def plot(kl_I: np.ndarray, width: int = 32) -> str:
    """A line of blocks: 1 nat and above full height, 1e-6 and below none."""
    bars = " ▁▂▃▄▅▆▇█"
    at = np.linspace(0, len(kl_I) - 1, width).astype(int)
    height = np.clip((np.log10(np.maximum(kl_I[at], 1e-6)) + 6) / 6, 0, 1)
    return "".join(bars[round(float(h) * (len(bars) - 1))] for h in height)


if __name__ == "__main__":
    main()
