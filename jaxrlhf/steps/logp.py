"""Log-probs of tokens and entropies of what they were drawn from, some columns at a time.

The gradient is written here by hand: of logits z, log-prob z_token − log Σ exp z and entropy H,
with p = softmax(z),

    ∂logp/∂z = onehot(token) − p        ∂H/∂z = −p·(log p + H)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array
from jaxrlhf.steps.columns import Projection, cut, gathered, logits_of, numbers, pulled_back


class How(NamedTuple):
    """What is static of a call."""

    to: Projection
    entropy: bool


class Saved(NamedTuple):
    """What the gradient reads again; all but the weight in pieces."""

    hidden: Array
    token: Array
    weight: Array
    """In the compute dtype, gathered over fsdp."""
    temperature: Array
    total: Array
    """log Σ exp z."""
    spread: Array
    trained: Array | None
    """None if nobody asks for the weight's gradient."""
    used: Array | None
    """Pieces of which anything is wanted; None: all."""


def token_logp(
    hidden_BTD: Array,
    weight: Array,
    axis: int,
    token_BT: Array,
    temperature: float | Array,
    entropy: bool,
    wanted_BT: Array | None = None,
    scale: float = 1.0,
    cap: float = 0.0,
) -> tuple[Array, Array]:
    """log softmax(z)[token] of z = h·W/temperature, and the entropy of it, float32 [B, T], nats.

    Args:
      hidden_BTD: in the compute dtype, in which the products are taken; sums are float32.
      weight: float32, [D, V] or [V, D]; ``axis`` says which of its axes is D.
      token_BT: int32.
      entropy: static; if False, zeros stand in its place.
      wanted_BT: bool; anything may stand where it is False (``columns.cut``).
      scale, cap: static; see ``columns.Projection``.
    """
    to = Projection(axis, scale, cap)
    parts = cut(token_BT.shape, weight.shape[1 - axis], wanted_BT)
    hidden, token = parts.split(hidden_BTD, "activation"), parts.split(token_BT)
    tau = jnp.asarray(temperature, jnp.float32)
    found: Any = _in_pieces(How(to, entropy), hidden, weight, token, tau, parts.used)
    logp, spread = map(parts.joined, found)
    return logp, spread


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_pieces(
    how: How,
    hidden: Array,
    weight: Array,
    token: Array,
    temperature: Array,
    used: Array | None,
) -> Any:
    """``token_logp`` of pieces, which lie along the first axis; ``used`` of them, the first, or all
    if it is None, and 0 of the others."""
    whole = gathered(weight, how.to.axis, hidden.dtype)
    return _forward(how, hidden, whole, token, temperature, used)[:2]


def _forward(
    how: How,
    hidden: Array,
    weight: Array,
    token: Array,
    temperature: Array,
    used: Array | None,
) -> tuple[Array, Array, Array]:
    """Log-probs, entropies, and log Σ exp z."""

    def work(item: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden, token = item
        logits = logits_of(hidden, weight, how.to, temperature)
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        spread = jnp.zeros_like(total)
        if how.entropy:
            log_p = logits - total[..., None]
            spread = -(jnp.exp(log_p) * log_p).sum(-1)
        return chosen - total, spread, total

    return numbers(used, 3, (hidden, token), work)


def _keep(how: How, hidden: Any, weight: Any, token: Any, temperature: Any, used: Any) -> Any:
    whole = gathered(weight.value, how.to.axis, hidden.value.dtype)
    used = None if used is None else used.value
    given = hidden.value, whole, token.value, temperature.value, used
    logp, spread, total = _forward(how, *given)
    trained = jnp.zeros(()) if weight.perturbed else None
    return (logp, spread), Saved(
        hidden.value, token.value, whole, temperature.value, total, spread, trained, used
    )


def _backward(how: How, saved: Saved, given: Any) -> Any:
    """Of one piece after the other; the weight's gradient a device, added up over devices last."""
    temperature = saved.temperature
    slopes = tuple(
        jnp.zeros_like(saved.total) if isinstance(x, jax.custom_derivatives.SymbolicZero) else x
        for x in given
    )

    def slope(z: Array, item: tuple[Array, ...]) -> Array:
        token, total, spread, dlogp, dspread = item
        log_p = z - total[..., None]
        chosen = jnp.arange(log_p.shape[-1]) == token[..., None]
        p = jnp.exp(log_p)
        dz = dlogp[..., None] * (chosen - p)
        if how.entropy:
            dz -= dspread[..., None] * p * (log_p + spread[..., None])
        return dz

    items = saved.token, saved.total, saved.spread, *slopes
    network = how.to, saved.hidden, saved.weight, temperature, saved.trained is not None
    found = pulled_back(*network, saved.used, items, slope)
    dscale = found.logits
    if not how.to.cap:
        # z = h·W/τ, so that Σ dz·z, over the vocabulary, is h·dh over the embedding.
        wide = saved.hidden.astype(jnp.float32), found.hidden.astype(jnp.float32)
        dscale = (wide[0] * wide[1]).sum()
    return found.hidden, found.weight, None, -dscale / temperature, None


_in_pieces.defvjp(_keep, _backward, symbolic_zeros=True)
