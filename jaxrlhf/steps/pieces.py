"""A minibatch in pieces, one at a time for memory, and what is added up over them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.packed import keeps_apart, pieces_of


def cut(
    batch: Any, microbatches: int, packed: int | None, model: Model | None
) -> tuple[Callable[[Any], Any], int | Array]:
    """(i → piece i of a batch, their number); as ``make_update`` says."""
    if packed is not None:
        return pieces_of(batch, packed, model is not None and keeps_apart(model))
    return _split(batch, microbatches) if microbatches > 1 else (lambda _: batch, 1)


def _split(batch: Any, pieces: int) -> tuple[Callable[[Any], Any], int]:
    """(i → piece i, their number): B/pieces rows each, i, i + pieces, …, so that rows stay on their
    devices."""

    def leaf(x: Array) -> Array:
        if x.shape[0] % pieces:
            raise ValueError(f"{x.shape[0]} rows % microbatches={pieces}: must be 0")
        # [B] is split over devices in stretches: with the pieces as the inner axis none moves.
        return jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0)

    split = jax.tree.map(leaf, batch)
    return lambda i: jax.tree.map(lambda x: x[i], split), pieces


def accumulate(of_piece: Callable[[Any], Any], pieces: int | Array) -> Any:
    """(value, metrics, gradients) summed over pieces, by their number, one at a time, from nothing,
    so that one piece's program is all there is."""
    if isinstance(pieces, int) and pieces == 1:
        return of_piece(0)

    def add(i: Any, total: Any) -> Any:
        value, metrics, grads = of_piece(i)
        both = {
            name: jax.tree.map(partial(combine, name), total[1][name], metrics[name])
            for name in metrics
        }
        return total[0] + value, both, jax.tree.map(jnp.add, total[2], grads)

    value, metrics, grads = jax.eval_shape(lambda: of_piece(0))
    start = {name: jax.tree.map(partial(nothing, name), x) for name, x in metrics.items()}
    zeros = jax.tree.map(jnp.zeros_like, (value, grads))
    return jax.lax.fori_loop(0, pieces, add, (zeros[0], start, zeros[1]))


def nothing(name: str, x: Any) -> Array:
    """A metric of no rows, of x's shape and dtype: what ``combine`` takes no notice of."""
    least, most = -jnp.inf, jnp.inf
    if not jnp.issubdtype(x.dtype, jnp.floating):
        least, most = jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max
    return jnp.full(x.shape, {"_max": least, "_min": most}.get(name[-4:], 0), x.dtype)


def combine(name: str, left: Array, right: Array) -> Array:
    """How a metric of two parts becomes that of the whole: by its name."""
    if name.endswith("_max"):
        return jnp.maximum(left, right)
    return jnp.minimum(left, right) if name.endswith("_min") else left + right
