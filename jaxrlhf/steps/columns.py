"""Numbers a token that all of its logits go into, without all logits at once.

[B, T, V] in float32 would be the largest array of a step: 8 rows × 256 × 49k take 400 MB. So the
logits are computed some columns at a time, and again for the gradient: of logits z = h·W/τ and
their gradient dz, ∂/∂h = dz·Wᵀ/τ and ∂/∂W = hᵀ·dz/τ.

On a mesh each device adds up the weight's gradient of its own rows and columns, whole over fsdp,
and the sums are added to each other once, after the last piece. ``logp`` and ``divergence`` are
what is computed so.
"""

from collections.abc import Callable
from dataclasses import dataclass
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

SPLIT = ("batch", None, "length", None)
"""Of [devices over rows, their rows, devices over columns, their columns]: a piece as it lies."""

WEIGHT = (("embed", "vocab"), ("vocab", "embed"))
"""Axes of the output projection: where its axis 0 is D, and where its axis 1 is."""


class Projection(NamedTuple):
    """What is static of hidden states' way to logits."""

    axis: int
    """Of the weight, which is D."""
    scale: float = 1.0
    cap: float = 0.0
    """A decoder's ``logit_scale`` and ``logit_softcap``; h·W is ``shaped`` so before it is divided
    by the temperature."""


@dataclass(frozen=True)
class Cut:
    """How [B, T, …] is cut into pieces; piece i has the columns i, i + pieces, …"""

    rows: int
    columns: int
    pieces: int
    shards: tuple[int, int]
    """Devices that rows and columns are split over."""
    place_BT: Array | None = None
    """Where each column goes, so that the first pieces have all wanted ones; None: it stays."""
    used: Array | None = None
    """Pieces of which anything is wanted, the first ones; None: all."""

    @property
    def height(self) -> int:
        """Rows a device."""
        return -(-self.rows // self.shards[0])

    @property
    def width(self) -> int:
        """Columns a device and piece."""
        return -(-self.columns // (self.shards[1] * self.pieces))

    def split(self, x: Array, *axes: str) -> Array:
        """[B, T, …] → [pieces, devices, rows, devices, columns, …]: of every piece each device has
        some columns."""
        if self.place_BT is not None:
            x = _moved(x, self.place_BT)
        wide = self.height * self.shards[0], self.width * self.shards[1] * self.pieces
        lacks = wide[0] - x.shape[0], wide[1] - x.shape[1]
        x = jnp.pad(x, [(0, more) for more in lacks] + [(0, 0)] * (x.ndim - 2))
        x = constrain(x, ("batch", "length", *axes))
        sizes = self.shards[0], self.height, self.shards[1], self.width, self.pieces
        x = x.reshape(*sizes, *x.shape[2:])
        return constrain(jnp.moveaxis(x, 4, 0), (None, *SPLIT, *axes))

    def joined(self, x: Array) -> Array:
        """A number a token, as pieces → [B, T]."""
        x = jnp.moveaxis(constrain(x, (None, *SPLIT)), 0, 4)
        x = constrain(x.reshape(self.shards[0] * self.height, -1), ("batch", "length"))
        if self.place_BT is None:
            return x[: self.rows, : self.columns]
        return jnp.take_along_axis(x[: self.rows], self.place_BT[:, : self.columns], axis=1)


def cut(shape: tuple[int, ...], vocab: int, wanted_BT: Array | None) -> Cut:
    """The pieces of [B, T] tokens.

    Args:
      wanted_BT: bool; logits are computed for about as many columns as the row with the most wanted
        ones needs. None: all are wanted.
    """
    rows, columns = shape
    shards = row_shards(), length_shards()
    if shards[1] > 1:  # what is wanted lies where it lies: no column moves to another device
        wanted_BT = None
    pieces = pieces_for(rows, columns, vocab, wanted_BT is not None)
    if wanted_BT is None:
        return Cut(rows, columns, pieces, shards)
    width = -(-columns // pieces)
    return Cut(rows, columns, pieces, shards, *_wanted_first(wanted_BT, width, pieces))


def pieces_for(rows: int, columns: int, vocab: int, some: bool) -> int:
    """Pieces that [rows, columns] of tokens are taken in; ``some``: not all of them are wanted."""
    # Each piece adds to the weight's gradient, which is large: few pieces, where there is room.
    numbers = budget(LOGITS_A_DEVICE, 1 / 64) * devices_in_mesh()
    most = numbers // (rows * vocab)
    pieces = -(-columns // max(1, min(columns, most)))
    return max(pieces, min(columns, SKIPPED)) if some else pieces


def _wanted_first(wanted_BT: Array, width: int, pieces: int) -> tuple[Array, Array]:
    """(where each column goes, so that the first pieces have all wanted ones; how many pieces do).

    There are as many columns as fill all pieces.
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


def gathered(weight: Array, axis: int, dtype: Any) -> Array:
    """A projection's weight in the compute dtype, whole over fsdp."""
    names: list[str | None] = list(WEIGHT[axis])
    names[axis] = None
    # Rounded where it lies, so that half as much is sent.
    return constrain(constrain(weight.astype(dtype), WEIGHT[axis]), names)


def logits_of(hidden: Array, weight: Array, to: Projection, temperature: Any) -> Array:
    """z of a piece, float32, [devices, rows, devices, columns, V]."""
    logits = shaped(to_vocab(hidden, weight, to.axis), to.scale, to.cap)
    return constrain(logits / temperature, (*SPLIT, "vocab"))


def each(used: Array | None, start: Any, items: Any, work: Callable[..., Any]) -> Any:
    """``start`` after work(i, piece i, what is there so far) of the first ``used`` pieces, or all.

    A loop of as many trips: a branch in one of all pieces would copy what it hands on.
    """
    pieces = jax.tree.leaves(items)[0].shape[0] if used is None else used

    def add(i: Any, now: Any) -> Any:
        return work(i, jax.tree.map(lambda x: x[i], items), now)

    return jax.lax.fori_loop(0, pieces, add, start)


def numbers(used: Array | None, count: int, items: Any, work: Callable[..., Any]) -> Any:
    """work(piece) → ``count`` numbers a token, of all pieces; 0 of those that are not used."""
    shape = jax.tree.leaves(items)[0].shape[:5]
    nothing = constrain(jnp.zeros(shape), (None, *SPLIT))

    def add(i: Any, item: Any, found: Any) -> Any:
        return tuple(x.at[i].set(new) for x, new in zip(found, work(item), strict=True))

    return each(used, (nothing,) * count, items, add)


class Pulled(NamedTuple):
    """Gradients of a projection's arguments."""

    hidden: Array
    weight: Array | None
    """float32, where it lies; None where nobody asks for it."""
    logits: Array
    """Σ dz·z, from which the temperature's follows; 0 without a cap, where h·∂/∂h is as much."""


def pulled_back(
    to: Projection,
    hidden: Array,
    weight: Array,
    temperature: Any,
    trained: bool,
    used: Array | None,
    items: Any,
    slope: Callable[..., Array],
) -> Pulled:
    """From the gradient of each piece's logits to those of hidden states and weight.

    Args:
      hidden: of all pieces; ``weight`` is ``gathered``.
      trained: whether the weight's gradient is asked for.
      used: as in ``each``.
      items: arrays that ``slope`` reads, the pieces along their first axis.
      slope: (z, item) → dz of a piece.
    """

    def work(i: Any, item: Any, now: Any) -> Any:
        hidden, own = item
        sums, dhidden, dscale = now
        z = logits_of(hidden, weight, to, temperature)
        dz = slope(z, own)
        if to.cap:
            dscale += (dz * z).sum()
            dz *= 1 - (z * (temperature / to.cap)) ** 2  # the slope of cap·tanh
        dz = (dz * (to.scale / temperature)).astype(hidden.dtype)
        dz = constrain(dz, (*SPLIT, "vocab"))
        with exact(hidden.dtype):
            back = jnp.tensordot(dz, weight, ((4,), (1 - to.axis,)))
            if sums is not None:
                product = "arcwd,arcwv->acdv" if to.axis == 0 else "arcwd,arcwv->acvd"
                sums += jnp.einsum(product, hidden, dz, preferred_element_type=jnp.float32)
        return sums, dhidden.at[i].set(constrain(back, (*SPLIT, "activation"))), dscale

    sums = None
    if trained:
        names: list[str | None] = list(WEIGHT[to.axis])
        names[to.axis] = None
        shards = hidden.shape[1], hidden.shape[3]
        sums = jnp.zeros((*shards, *weight.shape), jnp.float32)
        sums = constrain(sums, ("batch", "length", *names))
    start = sums, jnp.zeros_like(hidden), jnp.zeros(())
    sums, dhidden, dscale = each(used, start, (hidden, items), work)
    dweight = None if sums is None else constrain(sums.sum((0, 1)), WEIGHT[to.axis])
    return Pulled(dhidden, dweight, dscale)
