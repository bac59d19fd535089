"""Log-probs of tokens and entropies of what they were drawn from, without all logits at once.

[B, T, V] in float32 would be the largest array of a step: 8 rows × 256 × 49k take 400 MB. So the
logits are computed some columns at a time, and again for the gradient, which is written here by
hand: of logits z = h·W/τ, log-prob z_token − log Σ exp z and entropy H, with p = softmax(z),

    ∂logp/∂z = onehot(token) − p        ∂H/∂z = −p·(log p + H)

On a mesh each device adds up the weight's gradient of its own rows and columns, whole over fsdp,
and the sums are added to each other once, after the last piece.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import budget, constrain, devices_in_mesh, length_shards, row_shards
from jaxrlhf.models.layers import exact, shaped, to_vocab

LOGITS_A_DEVICE = 2**25
"""Logits that may exist at once on a device (128 MiB in float32); see ``budget``."""

SKIPPED = 8
"""Pieces at least, where those that nobody wants are skipped."""


class How(NamedTuple):
    """What is static of a call."""

    axis: int
    """Of the projection, which is D."""
    entropy: bool
    scale: float
    cap: float


SPLIT = ("batch", None, "length", None)
"""Of [devices over rows, their rows, devices over columns, their columns]: a piece as it lies."""

WEIGHT = (("embed", "vocab"), ("vocab", "embed"))
"""Axes of the output projection: where its axis 0 is D, and where its axis 1 is."""


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
      wanted_BT: bool; anything may stand where it is False, and logits are computed for about as
        many columns as the row with the most wanted ones needs. None: all are wanted.
      scale, cap: static, a decoder's ``logit_scale`` and ``logit_softcap``; h·W is ``shaped`` so
        before it is divided by the temperature.
    """
    rows, columns = token_BT.shape
    shards = row_shards(), length_shards()
    if shards[1] > 1:  # what is wanted lies where it lies: no column moves to another device
        wanted_BT = None
    pieces = pieces_for(rows, columns, weight.shape[1 - axis], wanted_BT is not None)
    height = -(-rows // shards[0])
    width = -(-columns // (shards[1] * pieces))

    def split(x: Array, *axes: str) -> Array:
        """[B, T, …] → [pieces, devices, rows, devices, columns, …]: of every piece each device has
        some columns."""
        lacks = height * shards[0] - rows, width * shards[1] * pieces - columns
        x = jnp.pad(x, [(0, more) for more in lacks] + [(0, 0)] * (x.ndim - 2))
        x = constrain(x, ("batch", "length", *axes))
        x = x.reshape(shards[0], height, shards[1], width, pieces, *x.shape[2:])
        return constrain(jnp.moveaxis(x, 4, 0), (None, *SPLIT, *axes))

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(constrain(x, (None, *SPLIT)), 0, 4).reshape(shards[0] * height, -1)
        return constrain(x, ("batch", "length"))[:rows, :columns]

    place_BT = used = None
    if wanted_BT is not None:
        place_BT, used = _wanted_first(wanted_BT, width, pieces)
        token_BT, hidden_BTD = (_moved(x, place_BT) for x in (token_BT, hidden_BTD))
        columns = width * pieces
    how = How(axis, entropy, scale, cap)
    hidden, tau = split(hidden_BTD, "activation"), jnp.asarray(temperature, jnp.float32)
    found: Any = _in_pieces(how, hidden, weight, split(token_BT), tau, used)
    logp, spread = map(joined, found)
    if wanted_BT is not None and place_BT is not None:
        place_BT = place_BT[:, : wanted_BT.shape[1]]
        logp, spread = (jnp.take_along_axis(x, place_BT, axis=1) for x in (logp, spread))
    return logp, spread


def pieces_for(rows: int, columns: int, vocab: int, some: bool) -> int:
    """Pieces that [rows, columns] of tokens are taken in; ``some``: not all of them are wanted."""
    # Each piece adds to the weight's gradient, which is large: few pieces, where there is room.
    numbers = budget(LOGITS_A_DEVICE, 1 / 64) * devices_in_mesh()
    most = numbers // (rows * vocab)
    pieces = -(-columns // max(1, min(columns, most)))
    return max(pieces, min(columns, SKIPPED)) if some else pieces


def _wanted_first(wanted_BT: Array, width: int, pieces: int) -> tuple[Array, Array]:
    """(where each column goes, so that the first pieces have all wanted ones; how many pieces do).

    Piece i has the columns i, i + pieces, …; there are as many as fill all pieces.
    """
    extra = width * pieces - wanted_BT.shape[1]
    wanted_BT = jnp.pad(wanted_BT.astype(jnp.int32), ((0, 0), (0, extra)))
    before_BT, most_B1 = jnp.cumsum(wanted_BT, axis=1) - wanted_BT, wanted_BT.sum(1, keepdims=True)
    others_BT = most_B1 + jnp.arange(wanted_BT.shape[1]) - before_BT
    rank_BT = jnp.where(wanted_BT != 0, before_BT, others_BT)
    return rank_BT % width * pieces + rank_BT // width, -(-most_B1.max() // width)


def _moved(x: Array, place_BT: Array) -> Array:
    """Columns of [B, T, …] at their places, zeros at those of the columns that x has not."""
    extra = place_BT.shape[1] - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)))
    source_BT = jnp.argsort(place_BT, axis=1)
    return jnp.take_along_axis(x, source_BT.reshape(*place_BT.shape, *(1,) * (x.ndim - 2)), axis=1)


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
    whole = _gathered(weight, how.axis, hidden)
    return _forward(how, hidden, whole, token, temperature, used)[:2]


def _gathered(weight: Array, axis: int, hidden: Array) -> Array:
    names: list[str | None] = list(WEIGHT[axis])
    names[axis] = None
    # Rounded where it lies, so that half as much is sent.
    return constrain(constrain(weight.astype(hidden.dtype), WEIGHT[axis]), names)


def _logits(hidden: Array, weight: Array, how: How, temperature: Array) -> Array:
    logits = shaped(to_vocab(hidden, weight, how.axis), how.scale, how.cap)
    return constrain(logits / temperature, (*SPLIT, "vocab"))


def _each(used: Array | None, start: Any, items: Any, work: Any) -> Any:
    """``start`` after work(i, piece i, what is there so far) of the first ``used`` pieces, or all.

    A loop of as many trips: a branch in one of all pieces would copy what it hands on.
    """
    pieces = jax.tree.leaves(items)[0].shape[0] if used is None else used

    def add(i: Any, now: Any) -> Any:
        return work(i, jax.tree.map(lambda x: x[i], items), now)

    return jax.lax.fori_loop(0, pieces, add, start)


def _forward(
    how: How,
    hidden: Array,
    weight: Array,
    token: Array,
    temperature: Array,
    used: Array | None,
) -> tuple[Array, Array, Array]:
    """Log-probs, entropies, and log Σ exp z."""

    def work(i: Any, item: tuple[Array, Array], found: Any) -> Any:
        hidden, token = item
        logits = _logits(hidden, weight, how, temperature)
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        spread = jnp.zeros_like(total)
        if how.entropy:
            log_p = logits - total[..., None]
            spread = -(jnp.exp(log_p) * log_p).sum(-1)
        return tuple(
            x.at[i].set(new) for x, new in zip(found, (chosen - total, spread, total), strict=True)
        )

    nothing = constrain(jnp.zeros(token.shape), (None, *SPLIT))
    return _each(used, (nothing,) * 3, (hidden, token), work)


def _keep(how: How, hidden: Any, weight: Any, token: Any, temperature: Any, used: Any) -> Any:
    whole = _gathered(weight.value, how.axis, hidden.value)
    used = None if used is None else used.value
    given = hidden.value, whole, token.value, temperature.value, used
    logp, spread, total = _forward(how, *given)
    trained = jnp.zeros(()) if weight.perturbed else None
    return (logp, spread), Saved(
        hidden.value, token.value, whole, temperature.value, total, spread, trained, used
    )


def _backward(how: How, saved: Saved, given: Any) -> Any:
    """Of one piece after the other; the weight's gradient a device, added up over devices last."""
    axis, weight, temperature = how.axis, saved.weight, saved.temperature
    slopes = tuple(
        jnp.zeros_like(saved.total) if isinstance(x, jax.custom_derivatives.SymbolicZero) else x
        for x in given
    )

    def work(i: Any, item: tuple[Array, ...], now: Any) -> Any:
        hidden, token, total, spread, dlogp, dspread = item
        sums, dhidden, dscale = now
        z = _logits(hidden, weight, how, temperature)
        log_p = z - total[..., None]
        chosen = jnp.arange(log_p.shape[-1]) == token[..., None]
        p = jnp.exp(log_p)
        dz = dlogp[..., None] * (chosen - p)
        if how.entropy:
            dz -= dspread[..., None] * p * (log_p + spread[..., None])
        if how.cap:
            dscale += (dz * z).sum()
            dz *= 1 - (z * (temperature / how.cap)) ** 2  # the slope of cap·tanh
        dz = (dz * (how.scale / temperature)).astype(hidden.dtype)
        dz = constrain(dz, (*SPLIT, "vocab"))
        with exact(hidden.dtype):
            slope = jnp.tensordot(dz, weight, ((4,), (1 - axis,)))
            if sums is not None:
                product = "arcwd,arcwv->acdv" if axis == 0 else "arcwd,arcwv->acvd"
                sums += jnp.einsum(product, hidden, dz, preferred_element_type=jnp.float32)
        return sums, dhidden.at[i].set(constrain(slope, (*SPLIT, "activation"))), dscale

    sums = None
    names: list[str | None] = list(WEIGHT[axis])
    if saved.trained is not None:
        names[axis] = None
        shards = saved.token.shape[1], saved.token.shape[3]
        sums = jnp.zeros((*shards, *weight.shape), jnp.float32)
        sums = constrain(sums, ("batch", "length", *names))
    items = saved.hidden, saved.token, saved.total, saved.spread, *slopes
    start = sums, jnp.zeros_like(saved.hidden), jnp.zeros(())
    sums, dhidden, dscale = _each(saved.used, start, items, work)
    dweight = None if sums is None else constrain(sums.sum((0, 1)), WEIGHT[axis])
    if not how.cap:
        # z = h·W/τ, so that Σ dz·z, over the vocabulary, is h·dh over the embedding.
        wide = saved.hidden.astype(jnp.float32), dhidden.astype(jnp.float32)
        dscale = (wide[0] * wide[1]).sum()
    return dhidden, dweight, None, -dscale / temperature, None


_in_pieces.defvjp(_keep, _backward, symbolic_zeros=True)
