"""Sampling more responses than are decoded at once: one that ends makes room for the next.

Where lengths differ much, rows that have ended would wait for the longest. Here a device decodes a
few slots, and the rows stand in a queue. All prompts are read beforehand, and each row's first
token is drawn from them; a slot takes the next row with a copy of its prompt's keys and values.
Each device has slots and a queue of its own, so that nothing moves between them.

Axes here: X devices that the rows are split over, R rows of each, S slots of each, C slots that are
filled at once.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.config import SampleConfig
from jaxrlhf.core.types import Array, StopTable
from jaxrlhf.mesh.sharding import DECODE, constrain, row_shards
from jaxrlhf.models.cache import KEPT, Layer, empty_cache, laid_out
from jaxrlhf.models.decode import Prompts, Weights, kind_of, step
from jaxrlhf.models.replay import unknown
from jaxrlhf.models.rope import angle_tables
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.draw import Drawn, choose, columns_of

FILLED = 8
"""At most one slot in so many is filled at once; more wait for the next time, without a step."""

# Each device's own: x [X, R, …] at i [X, S]. An index past the end writes nothing.
_take = jax.vmap(lambda x, i: x.at[i].get(mode="clip"))
_put = jax.vmap(lambda x, i, new: x.at[i].set(new, mode="drop"))
_put_at = jax.vmap(lambda x, i, j, new: x.at[i, j].set(new, mode="drop"))


class Queue(NamedTuple):
    """The rows, as they were before the first of them is decoded."""

    row_XR: Array
    """Those that their first token has not ended, in order; then the others."""
    length_X: Array
    """How many of them there are to decode."""
    key_XR: Array
    first: Drawn
    """Each row's first token, [X, R]."""
    prompts: Prompts
    """[X, Q/X, …]."""


class Slots(NamedTuple):
    """What the loop carries."""

    row_XS: Array
    """The row that a slot decodes; R where it is free."""
    t_XS: Array
    """How many tokens of that row are drawn, ≥ 1."""
    token_XS: Array
    """The last of them."""
    read_XS: Array | None
    """As ``Drawn.read_B``."""
    next_X: Array
    """Rows that have left the queue."""
    prompts: Prompts
    """Of each slot's row, [X·S, …]."""
    cache: tuple[Layer, ...]
    columns: dict[str, Array]
    """What is returned, [X, R, N]."""
    ended_XR: Array


def decode_in_slots(
    model: Model,
    weights: Weights,
    hidden_BD: Array,
    prompts: Prompts,
    key_B: Array,
    config: SampleConfig,
    value: bool,
    stops: StopTable | None,
) -> dict[str, Any]:
    """Draw, run the policy on what was drawn, …, ``config.slots`` rows at a time; [B, N] columns.

    Tokens and log-probs are those of all rows at once, but for the rounding of products of other
    sizes.
    """
    shards, new = row_shards(DECODE), config.max_new_tokens
    slots = config.slots // shards
    drawn = partial(_drawn, model, weights, config, value, stops)
    queue = _queue(drawn, hidden_BD, prompts, key_B, slots, new)
    rows = queue.row_XR.shape[1]
    tables = angle_tables(prompts.mask_QP.shape[1] + new, model.decoder)

    def extend(now: Slots) -> Slots:
        """Run the policy on the tokens just drawn, then draw the next."""
        given = _joined(now.token_XS), _joined(now.t_XS - 1), tables
        hidden_BD, cache, expert_BM = step(model, weights, now.prompts, now.cache, *given)
        found = drawn(hidden_BD, _take(queue.key_XR, now.row_XS), now.t_XS, now.read_XS)
        over_XS = found.ended_B | (now.t_XS + 1 == new)
        return now._replace(
            row_XS=jnp.where(over_XS, rows, now.row_XS),
            # A free slot stays at its first token: it is run too, and nothing of it is kept.
            t_XS=jnp.where(over_XS | (now.row_XS == rows), 1, now.t_XS + 1),
            token_XS=found.token_B,
            read_XS=found.read_B,
            cache=cache,
            columns=_written(now, found, expert_BM),
            ended_XR=_put(now.ended_XR, now.row_XS, found.ended_B),
        )

    def waiting(now: Slots) -> Array:
        return now.next_X < queue.length_X

    def busy(now: Slots) -> Array:
        """Whether rows are at work, and no slot is free that a row waits for."""
        free_XS = now.row_XS == rows
        return ~free_XS.all() & ~(free_XS.any(1) & waiting(now)).any()

    def left(now: Slots) -> Array:
        return (now.row_XS < rows).any() | waiting(now).any()

    # Loop in loop, not a branch in one: a branch would copy the caches.
    end = jax.lax.while_loop(
        left,
        lambda now: jax.lax.while_loop(busy, extend, _fill(queue, now)),
        _start(model, queue, prompts, slots, config),
    )
    columns = {name: _joined(x) for name, x in end.columns.items()}
    return {**columns, "done_B": _joined(end.ended_XR)}


def _written(now: Slots, found: Drawn, expert_BM: Array | None) -> dict[str, Array]:
    """The columns with what is known of the tokens just drawn, and which experts the ones before
    them took."""
    columns = dict(now.columns)
    for name, x in columns_of(found).items():
        columns[name] = _put_at(columns[name], now.row_XS, now.t_XS, x)
    if "expert_BNM" in columns:
        assert expert_BM is not None
        expert_XSM = _split(expert_BM, len(now.row_XS))
        before = columns["expert_BNM"], now.row_XS, now.t_XS - 1
        columns["expert_BNM"] = _put_at(*before, expert_XSM)
    return columns


def _drawn(
    model: Model,
    weights: Weights,
    config: SampleConfig,
    value: bool,
    stops: StopTable | None,
    hidden_BD: Array,
    key_XS: Array,
    t_XS: Array,
    read_XS: Array | None,
) -> Drawn:
    """``choose`` for slots, [X, S] each."""
    read_B = None if read_XS is None else _joined(read_XS)
    given = hidden_BD, _joined(key_XS), _joined(t_XS), read_B
    found = choose(model, weights, *given, config, value, stops)
    return jax.tree.map(lambda x: _split(x, t_XS.shape[0]), found)


def _queue(
    drawn: Any, hidden_BD: Array, prompts: Prompts, key_B: Array, slots: int, new: int
) -> Queue:
    """Draw every row's first token, as many rows at once as there are slots."""
    shards = row_shards(DECODE)
    key_XR, hidden_XRD = _split(key_B, shards), _split(hidden_BD, shards)
    rows = key_XR.shape[1]
    pieces = -(-rows // slots)
    place = jnp.minimum(jnp.arange(pieces * slots), rows - 1).reshape(pieces, slots)

    def piece(place_S: Array) -> Drawn:
        at_XS = jnp.broadcast_to(place_S, (shards, slots))
        nothing_XS = jnp.zeros((shards, slots), jnp.int32)
        hidden_BD = _joined(_take(hidden_XRD, at_XS))
        return drawn(hidden_BD, _take(key_XR, at_XS), nothing_XS, nothing_XS)

    # Logits of all rows at once would be [B, V].
    first = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(shards, -1)[:, :rows], jax.lax.map(piece, place)
    )
    live_XR = ~first.ended_B & (new > 1)
    row_XR = jnp.argsort(~live_XR, axis=1, stable=True).astype(jnp.int32)
    of_rows = Prompts(_split_caches(prompts.layers, shards), _split(prompts.mask_QP, shards))
    return Queue(row_XR, live_XR.sum(1), key_XR, first, of_rows)


def _start(model: Model, queue: Queue, prompts: Prompts, slots: int, config: SampleConfig) -> Slots:
    """All slots free, and every row's first token written."""
    shards, rows = queue.row_XR.shape
    new = config.max_new_tokens
    nothing_XS = constrain(jnp.zeros((shards, slots), jnp.int32), ("batch", None), DECODE)

    def room(x: Array) -> Array:
        return jnp.zeros((shards * slots, *x.shape[1:]), x.dtype)

    layers = laid_out(jax.tree.map(room, prompts.layers))
    columns = {}
    for name, first_XR in columns_of(queue.first).items():
        blank = jnp.full((shards, rows, new), config.pad if name == "token_BN" else 0)
        columns[name] = blank.astype(first_XR.dtype).at[:, :, 0].set(first_XR)
        columns[name] = constrain(columns[name], ("batch", None, None), DECODE)
    if config.router_replay:
        expert = unknown(model.decoder, (shards, rows, new))
        columns["expert_BNM"] = constrain(expert, ("batch", None, None, None), DECODE)
    return Slots(
        row_XS=nothing_XS + rows,
        t_XS=nothing_XS + 1,
        token_XS=nothing_XS,
        read_XS=None if queue.first.read_B is None else nothing_XS,
        next_X=jnp.zeros(shards, jnp.int32),
        prompts=Prompts(layers, room(prompts.mask_QP)),
        cache=empty_cache(model.decoder, kind_of(model, config), shards * slots, new - 1),
        columns=columns,
        ended_XR=queue.first.ended_B,
    )


def _fill(queue: Queue, now: Slots) -> Slots:
    """Give free slots to the next rows of the queue."""
    (shards, slots), rows = now.row_XS.shape, queue.row_XR.shape[1]
    some = -(-slots // FILLED)
    free_XS = now.row_XS == rows
    slot_XC = jax.lax.top_k(free_XS.astype(jnp.int32), some)[1]  # the free ones first
    place_XC = now.next_X[:, None] + jnp.arange(some)
    taken_XC = _take(free_XS, slot_XC) & (place_XC < queue.length_X[:, None])
    slot_XC = jnp.where(taken_XC, slot_XC, slots)
    row_XC = _take(queue.row_XR, place_XC)
    samples = rows // queue.prompts.mask_QP.shape[1]

    def copied(here_XS: Array, prompt_XQ: Array) -> Array:
        return _joined(_put(here_XS, slot_XC, _take(prompt_XQ, row_XC // samples)))

    here, there = now.prompts, queue.prompts
    layers = jax.tree.map(copied, _split_caches(here.layers, shards), there.layers)
    mask = copied(_split(here.mask_QP, shards), there.mask_QP)
    first = queue.first
    return now._replace(
        row_XS=_put(now.row_XS, slot_XC, row_XC),
        t_XS=_put(now.t_XS, slot_XC, jnp.ones_like(row_XC)),
        token_XS=_put(now.token_XS, slot_XC, _take(first.token_B, row_XC)),
        read_XS=None
        if first.read_B is None
        else _put(now.read_XS, slot_XC, _take(first.read_B, row_XC)),
        next_X=now.next_X + taken_XC.sum(1),
        prompts=Prompts(layers, mask),
    )


def _split(x: Array, shards: int, axes: tuple[str, ...] = ()) -> Array:
    """[X·S, …] → [X, S, …]; ``axes`` are those after the rows, if they are split too."""
    x = x.reshape(shards, -1, *x.shape[1:])
    return constrain(x, ("batch", None, *(axes or (None,) * (x.ndim - 2))), DECODE)


def _split_caches(layers: tuple[Layer, ...], shards: int) -> tuple[Layer, ...]:
    return jax.tree.map(lambda x: _split(x, shards, KEPT[1 : x.ndim]), layers)


def _joined(x: Array) -> Array:
    """[X, S, …] → [X·S, …]."""
    return x.reshape(-1, *x.shape[2:])


def decode_steps(length_B: Array, slots: int, shards: int = 1) -> Array:
    """Steps of the decode loop for responses of these lengths, int32; a row's first token is drawn
    from its prompt, and takes none.

    Args:
      length_B: tokens of each response.
      slots: static, ``SampleConfig.slots``; 0, or not fewer than the rows, is all rows at once.
      shards: static, devices that the rows are split over, each with a queue of its own. All of
        them go on until the last has ended.
    """
    step_XR = jnp.maximum(jnp.asarray(length_B, jnp.int32).reshape(shards, -1) - 1, 0)
    if not 0 < slots < step_XR.size:
        return step_XR.max()

    def put(end_S: Array, step: Array) -> tuple[Array, None]:
        """The next row goes where a slot is free first."""
        return end_S.at[jnp.argmin(end_S)].add(step), None

    free_S = jnp.zeros(slots // shards, jnp.int32)
    return jax.vmap(lambda step_R: jax.lax.scan(put, free_S, step_R)[0].max())(step_XR).max()


def idle_share(length_B: Array, slots: int, shards: int = 1) -> Array:
    """Share of the decoding that was done without a row, 1 − Σ(length − 1) / (slots · steps), of
    all devices; 0 if there was none. As ``decode_steps``, or with ``slots`` of all rows."""
    length_B = jnp.asarray(length_B)
    room = slots if 0 < slots < length_B.size else length_B.size
    done = room * decode_steps(length_B, slots, shards)
    return jnp.where(done > 0, 1 - (length_B - 1).sum() / jnp.maximum(done, 1), 0.0)
