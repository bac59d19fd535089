"""Weights as a CPU multiplies a few rows by them: their outputs first.

Of the two sides of a product XLA's library for CPUs copies the right into blocks before it
multiplies, and reads the left where it lies. Of a product of few rows the copy of the weight is
most of the work: so the weight stands on the left, the inputs of an output beside each other, and
the rows on the right.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import devices_in_mesh, platform

FEW = 32
"""Rows up to which that is quicker, with the result turned around (benchmarks/few_rows.py)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turned:
    """A kernel [in…, out…] as [out…, in…]."""

    x: Any
    """The array, or what is said of it."""
    contract: int = field(metadata={"static": True})
    """How many axes come in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's, [in…, out…]."""
        return turned_back(self.x.shape, self.contract)

    @property
    def dtype(self) -> Any:
        """The array's."""
        return self.x.dtype


def turned_back(each: tuple[Any, ...], contract: int) -> tuple[Any, ...]:
    """What is said of the axes [out…, in…] as [in…, out…]."""
    return each[-contract:] + each[:-contract]


def turned(each: tuple[Any, ...], contract: int) -> tuple[Any, ...]:
    """What is said of the axes [in…, out…] as [out…, in…]."""
    return each[contract:] + each[:contract]


def turns() -> bool:
    """Whether the devices of the mesh in force are to read weights so, of a few rows."""
    return platform() == "cpu"


def turn(contract: int, kernel: Array) -> Turned:
    """A kernel [in…, out…] of which ``contract`` axes come in."""
    return Turned(jnp.transpose(kernel, turned(tuple(range(kernel.ndim)), contract)), contract)


def times_turned(x: Array, w: Turned, dtype: Any = None) -> Array:
    """x·W: x [rows…, in…] → [rows…, out…], in x's dtype or another."""
    rows, dtype = x.shape[: -w.contract], dtype or x.dtype
    outs = w.x.shape[: -w.contract]
    if math.prod(rows) > FEW and devices_in_mesh() == 1:
        # As two matrices: of a weight with more axes XLA would make a copy, for each product.
        x, matrix = x.reshape(math.prod(rows), -1), w.x.reshape(math.prod(outs), -1)
        return jnp.einsum("ri,oi->ro", x, matrix, preferred_element_type=dtype).reshape(rows + outs)
    over = tuple(range(-w.contract, 0))
    y = jnp.tensordot(w.x, x, (over, over), preferred_element_type=dtype)
    # Else XLA would see a product the other way round, and make that of it.
    y = jax.lax.optimization_barrier(y)
    return jnp.transpose(y, turned_back(tuple(range(y.ndim)), len(rows)))
