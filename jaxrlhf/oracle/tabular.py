"""All responses over a few tokens, and policies over them that are tables.

Axes besides those of types.py: ``Y`` responses, ``S`` states (the prefixes of a response).
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrlhf.algorithms import optimal_policy
from jaxrlhf.types import Array, Outputs, Params


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


def make_space(vocab: int = 4, length: int = 3) -> Space:
    """The 40 responses (3 words and an end, up to three tokens), or another such space."""
    rows = [
        (*body, 0)
        for size in range(length)
        for body in itertools.product(range(1, vocab), repeat=size)
    ]
    rows += list(itertools.product(range(1, vocab), repeat=length))
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
    """What ``rl.forward`` is for a transformer: log-prob, entropy and value of each response token.

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
