"""Rows laid one after the other in rows of the same width, so that no padding is computed.

``pack`` finds the rows' places, on the device and from their mask alone, whatever runs there. The
packed rows are taken some at a time, and only as many as hold a token: one compiled program costs
what the real tokens do, however many there are. What comes out of it is laid back to [B, T], so
that nobody outside sees a packed row; losses over whole rows too read rows as they were.

Where attention takes no packed rows (``keeps_apart``: cuDNN's), each row stays alone in one, and
the padding behind it is computed by all but attention.

Axes: I pieces of R packed rows, each as wide (T) as the B rows that are packed.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from jaxrlhf.core.types import Array, Batch, Outputs, TokenBatch
from jaxrlhf.mesh.sharding import (
    budget,
    constrain,
    length_shards,
    platform,
    row_shards,
    split_last,
    split_rows,
)
from jaxrlhf.models.kernels import choose_each
from jaxrlhf.models.replay import nobody
from jaxrlhf.models.transformer import Model

TOKENS_AT_ONCE = {"cpu": 512}
"""Tokens that keep a device busy, by its platform: pieces are no larger, since the last one may be
nearly empty."""

TOKENS_AT_ONCE_ELSEWHERE = 8192

NUMBERS_A_TOKEN = 2**15
"""Float32 numbers that a token takes while one is scored: what a layer of 8B parameters holds of it
at once; see ``budget``."""


class PackedRows(NamedTuple):
    """One piece, as a network reads it; the arguments of ``forward``, [R, T]."""

    token_RT: Array
    attention_mask_RT: Array
    segment_RT: Array | None
    """int32, the row that a token is of, from 1; 0 on padding. None: each is one row."""
    wanted_RT: Array
    """bool, the tokens whose log-probs are asked for."""
    expert_RTM: Array | None = None
    """The experts that tokens are to take, where they are replayed."""


@struct.dataclass
class Packing:
    """Where the tokens of B rows lie in I pieces of R packed rows."""

    source_IRT: Array
    """int32, which token of the flat [B·T] stands here; B·T on padding."""
    target_BT: Array
    """int32, where in the flat [I·R·T] each token went; I·R·T for padding."""
    used: Array
    """int32, pieces that hold a token: the first ones."""
    apart: bool = struct.field(pytree_node=False, default=False)
    """Whether each packed row holds one row."""


@struct.dataclass
class Piece:
    """One piece of a batch: the packed rows, and the rows that lie in them."""

    rows: PackedRows
    target_BT: Array
    """int32, where in the flat [R·T] each token of the batch is; R·T for those of other pieces."""
    batch: Batch | TokenBatch
    """All rows, those of other pieces with mask and weight 0."""

    def back(self, x_RT: Array) -> Array:
        """A number a token of the packed rows → of the batch's rows, [B, T], 0 on all others."""
        # Split as tokens are, and so is its gradient. Of one that is whole on every device, and of
        # which all columns but the first go on, XLA adds up what pads the split ones.
        return _take(constrain(x_RT, ("batch", "length")), self.target_BT)


def keeps_apart(model: Model) -> bool:
    """Whether a model's rows are not packed on the devices at hand, only moved to the left, the
    longest first: where its attention would lose the kernel that keeps scores out of memory."""
    chosen = choose_each(model.attention, model.decoder, model.dtype, packed=False)
    return "cudnn" in chosen.values()


def pack(attention_mask_BT: Array, most: int | None = None, apart: bool = False) -> Packing:
    """Places for rows of any length up to T, first-fit-decreasing, in pieces of R packed rows.

    At most 11/9 of the fewest packed rows possible, and 2/3 more (Dósa 2007), and never more than
    B, so that B / R pieces, rounded up, always do.

    Args:
      attention_mask_BT: [B, T], 1 on real tokens; padding on either side, and gaps, are left out.
      most: static; packed rows at once, at most.
      apart: static; give each row a packed row of its own.
    """
    chex.assert_rank(attention_mask_BT, 2)
    count, width = attention_mask_BT.shape
    pieces, rows = pieces_for(count, width, most, apart)
    # Small, and each device needs it whole to find its own rows' places.
    real_BT = constrain(attention_mask_BT, (None, None)) != 0
    row_B, start_B = first_fit(real_BT.sum(1, dtype=jnp.int32), width, apart)
    rank_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
    size = pieces * rows * width
    place_BT = (row_B * width + start_B)[:, None] + rank_BT
    target_BT = constrain(jnp.where(real_BT, place_BT, size), (None, None))
    number_BT = jnp.arange(count * width, dtype=jnp.int32).reshape(count, width)
    source = jnp.full(size, count * width, jnp.int32).at[target_BT].set(number_BT, mode="drop")
    source_IRT = constrain(source, (None,)).reshape(pieces, rows, width)
    return Packing(
        source_IRT=constrain(source_IRT, (None, "batch", "length")),
        target_BT=constrain(target_BT, ("batch", "length")),
        used=(row_B.max() + rows) // rows,
        apart=apart,
    )


def pieces_for(
    count: int, width: int, most: int | None = None, apart: bool = False
) -> tuple[int, int]:
    """(I, R) for rows of any length: I pieces, were all of them full, of R packed rows.

    R is as few as keep the devices busy, the same number on each of those that rows are split over;
    not more than ``most``, nor than ``count`` rows need. Rows ``apart`` fill all pieces, however
    short they are: where ``most`` is not given there are as few as fit in a device's memory, of
    equally many rows, since weights that are split are gathered anew for each.
    """
    shards = row_shards()
    busy = TOKENS_AT_ONCE.get(platform(), TOKENS_AT_ONCE_ELSEWHERE)
    if apart and most is None:
        busy = budget(busy * NUMBERS_A_TOKEN, 1 / 16) // NUMBERS_A_TOKEN
    each, own = -(-busy * length_shards() // width), -(-count // shards)
    if apart and most is None:
        each = -(-own // -(-own // each))
    each = min(each, own)
    rows = shards * max(1, each if most is None else min(each, most // shards))
    return -(-count // rows), rows


def first_fit(length_B: Array, width: int, apart: bool = False) -> tuple[Array, Array]:
    """(row, first column) of each item, int32 [B], in rows of ``width``: first-fit-decreasing.

    Each item, from the longest to the shortest, goes into the first row with room for it. Of two
    items of one length, the earlier goes first. With ``apart`` no two share a row.
    """

    def put(room_B: Array, length: Array) -> tuple[Array, tuple[Array, Array]]:
        row = jnp.argmax(room_B >= (width if apart else length)).astype(jnp.int32)
        # A row without a token takes no room, and has none to be found in.
        taken = jnp.where(length > 0, width, 0) if apart else length
        return room_B.at[row].add(-taken), (row, width - room_B[row])

    order_B = jnp.argsort(-length_B, stable=True)
    empty = jnp.full(length_B.shape, width, jnp.int32)
    _, found = jax.lax.scan(put, empty, length_B[order_B])
    row_B, start_B = (jnp.zeros_like(x_B).at[order_B].set(x_B) for x_B in found)
    return row_B, start_B


def in_pieces(
    network: Callable[[PackedRows], Array],
    token_BT: Array,
    attention_mask_BT: Array,
    most: int | None = None,
    first: int = 0,
    apart: bool = False,
    expert_BTM: Array | None = None,
) -> Array:
    """What a network says of each token, float32 [B, T], a piece of the rows at a time.

    Args:
      network: gives a number a token.
      most, apart: see ``pack``.
      first: static; the result is 0 in columns before it, and on padding.
      expert_BTM: the experts that tokens are to take, where they are replayed.
    """
    packing = pack(attention_mask_BT, most, apart)
    wanted_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1]) >= first, token_BT.shape)
    rows = _rows(packing, token_BT, wanted_BT, expert_BTM)

    def add(i: Array, found_IRT: Array) -> Array:
        return found_IRT.at[i].set(constrain(network(rows(i)), ("batch", "length")))

    found_IRT = constrain(jnp.zeros(packing.source_IRT.shape), (None, "batch", "length"))
    if len(found_IRT) == 1:
        found_IRT = add(jnp.int32(0), found_IRT)
    else:
        found_IRT = jax.lax.fori_loop(0, packing.used, add, found_IRT)
    return _take(found_IRT, packing.target_BT).at[:, :first].set(0)


def pieces_of(
    batch: Batch | TokenBatch, most: int, apart: bool = False
) -> tuple[Callable[[Any], Piece], int | Array]:
    """(i → piece i of a batch, number of pieces that hold a token, or 1 if there is but one); see
    ``pack``."""
    packing = pack(batch.attention_mask_BT, most, apart)
    # what has no mask of its own learns where it weighs something
    names = ("mask_BT", "weight_BT") if isinstance(batch, Batch) else ("weight_BT",)
    wanted_BT = getattr(batch, names[0]) != 0
    rows = _rows(packing, batch.token_BT, wanted_BT, _replayed(batch))
    size = math.prod(packing.source_IRT.shape[1:])

    def piece(i: Any) -> Piece:
        target_BT = packing.target_BT - i * size
        here_BT = (target_BT >= 0) & (target_BT < size)
        here_B1 = here_BT.any(1, keepdims=True)
        own = {name: getattr(batch, name) * here_B1 for name in names}
        own = batch.replace(**own)  # type: ignore[attr-defined]
        return Piece(rows(i), jnp.where(here_BT, target_BT, size), own)

    return piece, packing.used if len(packing.source_IRT) > 1 else 1


def read(batch: Any, network: Callable[..., Outputs], **rows: Any) -> tuple[Outputs, Any]:
    """(what a network says of a batch's rows, the batch), whether its rows are packed or not.

    Args:
      network: (token, attention mask, …) → Outputs; with ``segment_BT`` and ``wanted_BT`` of
        packed rows, else with ``rows``; and with ``expert_BTM`` where experts are replayed.
    """
    if not isinstance(batch, Piece):
        more = _named(_replayed(batch))
        return network(batch.token_BT, batch.attention_mask_BT, **rows, **more), batch
    token_RT, mask_RT, segment_RT, wanted_RT, expert_RTM = batch.rows
    more = {"segment_BT": segment_RT, "wanted_BT": wanted_RT, **_named(expert_RTM)}
    found = network(token_RT, mask_RT, **more)
    # Sums over tokens have no places to go back to.
    sums, found = found.routers, replace(found, routers=None)
    return replace(jax.tree.map(batch.back, found), routers=sums), batch.batch


def _replayed(batch: Any) -> Array | None:
    return batch.expert_BTM if isinstance(batch, Batch) else None


def _named(expert_BTM: Array | None) -> dict[str, Array]:
    return {} if expert_BTM is None else {"expert_BTM": expert_BTM}


def _rows(
    packing: Packing, token_BT: Array, wanted_BT: Array, expert_BTM: Array | None
) -> Callable[[Any], PackedRows]:
    """i → the packed rows of piece i."""
    width, source_IRT = token_BT.shape[1], packing.source_IRT
    token_IRT, wanted_IRT = (
        constrain(_take(x_BT, source_IRT), (None, "batch", "length"))
        for x_BT in (token_BT, wanted_BT)
    )
    spread = None if expert_BTM is None else split_last(expert_BTM)

    def piece(i: Any) -> PackedRows:
        real_RT = source_IRT[i] < token_BT.size
        segment_RT = jnp.where(real_RT, source_IRT[i] // width + 1, 0)
        found = token_IRT[i], real_RT, segment_RT, wanted_IRT[i]
        rows = PackedRows(*(constrain(x_RT, ("batch", "length")) for x_RT in found))
        if spread is not None and expert_BTM is not None:
            flat, fill = spread.reshape(-1, spread.shape[-1]), nobody(spread)
            taken = jnp.take(flat, source_IRT[i], axis=0, mode="fill", fill_value=fill)
            whole = split_rows(taken, expert_BTM.shape[-1], ("batch", "length", None))
            rows = rows._replace(expert_RTM=whole)
        return rows._replace(segment_RT=None) if packing.apart else rows

    return piece


def _take(x: Array, place: Array) -> Array:
    """x, flat, at these places; 0 beyond its end. A number a token: whole on every device."""
    x = constrain(x, (None,) * x.ndim)
    return jnp.take(x.reshape(-1), place, mode="fill", fill_value=0)
