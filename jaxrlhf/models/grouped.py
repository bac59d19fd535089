"""A product of groups of rows, each with a matrix of its own, as a mixture of experts needs it.

``jax.lax.ragged_dot`` says just that. On TPUs it is a kernel; elsewhere XLA multiplies every row
with every matrix, and writes the rows out once for each: of a whole batch that is as many times
the work and the memory as there are experts. So rows are there taken in tiles of one group each,
one after the other. Few rows on a GPU stay with XLA's form, which reads each matrix once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core.types import Array
from jaxrlhf.models.layers import exact
from jaxrlhf.models.quantise import is_quantised, made, no_slope

FEW = 2048
"""Rows up to which a GPU moves less by reading all matrices at once."""

TILES = (512, 256, 128, 64, 32, 16, 8)
"""Rows of a tile; the largest of which a group of mean size fills two: of each group's last tile,
rows are multiplied for nothing."""


class Tiles(NamedTuple):
    """Where rows lie in tiles of T rows, each of one group."""

    place: Array
    """int32 [M], of each row in the tiles, end to end; past the end for rows of no group."""
    group: Array
    """int32, of each tile."""
    used: Array
    """int32, tiles that hold a row: the first ones."""
    size: int
    """T."""


def grouped(
    platform: str, rows: Array, matrices: Any, sizes: Array, expected: int | None = None
) -> Array:
    """Rows [M, D] in the order of their groups, times the matrix of each: [E, D, F] → [M, F].

    Quantised matrices are made for the product, and again for its gradient, which they have none
    of: nothing of their size waits for it.

    Args:
      platform: static, of the devices: "tpu", "gpu" or "cpu".
      sizes: int32 [E], rows of each group; of rows after the last group the result is 0.
      expected: static, rows that groups have in all, on average; None: M.
    """
    if is_quantised(matrices):
        return _made_twice(platform, expected, rows, matrices, sizes)
    if platform == "tpu" or (platform == "gpu" and len(rows) <= FEW):
        precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
        return jax.lax.ragged_dot(rows, matrices, sizes, precision=precision)
    return _in_tiles(len(rows) if expected is None else expected, rows, matrices, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _made_twice(
    platform: str, expected: int | None, rows: Array, matrices: Any, sizes: Array
) -> Array:
    return _made_forward(platform, expected, rows, matrices, sizes)[0]


def _made_forward(
    platform: str, expected: int | None, rows: Array, matrices: Any, sizes: Array
) -> tuple[Array, Any]:
    found = grouped(platform, rows, made(matrices, rows.dtype), sizes, expected)
    return found, (rows, matrices, sizes)


def _made_backward(
    platform: str, expected: int | None, saved: Any, dy: Array
) -> tuple[Array, Any, Any]:
    rows, matrices, sizes = saved

    def product(rows: Array) -> Array:
        return grouped(platform, rows, made(matrices, rows.dtype), sizes, expected)

    (dx,) = jax.vjp(product, rows)[1](dy)
    return dx, no_slope(matrices), np.zeros(sizes.shape, jax.dtypes.float0)


_made_twice.defvjp(_made_forward, _made_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_tiles(expected: int, rows: Array, matrices: Array, sizes: Array) -> Array:
    return _forward(expected, rows, matrices, sizes)[0]


def _each(expected: int, tiles: Tiles, groups: int, work: Any, start: Any) -> Any:
    """``start`` after work(i, what is there so far) of every tile in use."""
    about = -(-expected // tiles.size) + groups // 2
    with jax.named_scope(f"about_{about}_trips"):  # for plans: see study/plan/hlo.py
        return jax.lax.fori_loop(0, tiles.used, work, start)


def _tiles(expected: int, count: int, sizes: Array) -> Tiles:
    groups = len(sizes)
    size = next((n for n in TILES if 2 * n * groups <= expected), TILES[-1])
    each = -(-sizes // size)
    ends, first = jnp.cumsum(sizes), jnp.cumsum(each) - each
    number = jnp.searchsorted(ends, jnp.arange(count), side="right")
    # Past the last group these are clipped, and not used.
    within = jnp.arange(count) - (ends - sizes)[number]
    most = -(-count // size) + groups
    place = jnp.where(number < groups, first[number] * size + within, most * size)
    group = jnp.searchsorted(jnp.cumsum(each), jnp.arange(most), side="right")
    return Tiles(place, jnp.minimum(group, groups - 1), each.sum(), size)


def _laid(x: Array, tiles: Tiles) -> Array:
    """[M, D] → [tiles, T, D], zeros where no row lies."""
    count = len(tiles.group) * tiles.size
    source = jnp.full(count, len(x), jnp.int32)
    source = source.at[tiles.place].set(jnp.arange(len(x)), mode="drop")
    laid = x.at[source].get(mode="fill", fill_value=0)
    return laid.reshape(-1, tiles.size, x.shape[1])


def _back(x: Array, tiles: Tiles) -> Array:
    """[tiles, T, F] → [M, F], zeros for rows of no group."""
    flat = x.reshape(-1, x.shape[2])
    return flat.at[tiles.place].get(mode="fill", fill_value=0)


def _forward(expected: int, rows: Array, matrices: Array, sizes: Array) -> tuple[Array, Any]:
    tiles = _tiles(expected, len(rows), sizes)
    laid = _laid(rows, tiles)

    def multiply(i: Array, found: Array) -> Array:
        with exact(rows.dtype):
            return found.at[i].set(laid[i] @ matrices[tiles.group[i]])

    empty = jnp.zeros((*laid.shape[:2], matrices.shape[2]), rows.dtype)
    found = _each(expected, tiles, len(sizes), multiply, empty)
    return _back(found, tiles), (rows, matrices, sizes)


def _backward(expected: int, saved: Any, dy: Array) -> tuple[Array, Array, Any]:
    """dx = dy·Wᵀ, tile by tile; dW of a group is the sum of xᵀ·dy over its tiles."""
    rows, matrices, sizes = saved
    tiles = _tiles(expected, len(rows), sizes)
    laid, slopes = _laid(rows, tiles), _laid(dy, tiles)

    def multiply(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, dw = found
        group = tiles.group[i]
        with exact(rows.dtype):
            dx = dx.at[i].set(slopes[i] @ matrices[group].T)
            added = jnp.matmul(laid[i].T, slopes[i], preferred_element_type=jnp.float32)
        return dx, dw.at[group].add(added)

    start = jnp.zeros_like(laid), jnp.zeros(matrices.shape, jnp.float32)
    dx, dw = _each(expected, tiles, len(sizes), multiply, start)
    nothing = np.zeros(sizes.shape, jax.dtypes.float0)
    return _back(dx, tiles), dw.astype(matrices.dtype), nothing


_in_tiles.defvjp(_forward, _backward)
