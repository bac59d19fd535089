"""How a saved state is known again: name, kind and digest of every array, in a sealed note."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.errors import InputError
from jaxrlhf.types import Array


@jax.jit
def digest(x: Array) -> Array:
    """A checksum of one array: Σ_i bits_i · (2i + 1) mod 2³², uint32 scalar.

    ``bits_i`` is element i (row-major) read as an unsigned integer. Every weight is odd, so one
    flipped bit, wherever it is, changes the sum; integer sums do not depend on their order, so
    the digest does not depend on how the array is sharded.

    Args:
      x: any shape; a boolean, integer or floating-point dtype of 1, 2, 4 or 8 bytes.
    """
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index, stride = index + along * jnp.uint32(stride % 2**32), stride * bits.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their dotted path, such as ``policy.params.embed``.

    Raises:
      ValueError: two leaves share a path.
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
    if len(named) < len(pairs):
        raise ValueError("two leaves of the state share a dotted path")
    return named


def kind(x: Any) -> str:
    """Dtype and shape of an array or ShapeDtypeStruct, such as ``float32[8, 4]``."""
    return f"{x.dtype}{list(x.shape)}"


def describe(leaves: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Kind and digest of each named array, JSON-able."""
    sums = jax.device_get(_digests(list(leaves.values())))
    return {
        name: {"kind": kind(x), "digest": int(total)}
        for (name, x), total in zip(leaves.items(), sums, strict=True)
    }


def check_leaves(
    path: str | Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], part: bool
) -> None:
    """Raise InputError for the first leaf that is not saved as it is wanted.

    Args:
      path: where it is saved.
      saved: what ``describe`` said of each leaf.
      wanted: arrays or ShapeDtypeStructs, by the same names.
      part: leave what is saved beyond them unread.
    """
    extra = () if part else [name for name in saved if name not in wanted]
    for name in (*wanted, *extra):
        there = saved[name]["kind"] if name in saved else "absent"
        here = kind(wanted[name]) if name in wanted else "absent"
        if there != here:
            raise InputError(
                f"{path}: {name} is {there} there, {here} in this run; go back to the model and "
                "optimizer of the run's config.yaml, or choose another output"
            )


def seal(note: Mapping[str, Any]) -> dict[str, Any]:
    """``note`` as JSON holds it, with its SHA-256.

    Raises:
      TypeError: it is not JSON-able.
    """
    plain = json.loads(json.dumps(note))
    return {"note": plain, "sha256": _sha256(plain)}


def unseal(sealed: Mapping[str, Any]) -> dict[str, Any]:
    """The note of a ``seal``.

    Raises:
      ValueError: it has changed since.
    """
    if sealed["sha256"] != _sha256(sealed["note"]):
        raise ValueError("the note is not as it was saved")
    return sealed["note"]


def _sha256(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


_digests = jax.jit(lambda leaves: [digest(x) for x in leaves])
"""All leaves in one program: with some tens in flight, processes on CPUs would wait for ever."""
