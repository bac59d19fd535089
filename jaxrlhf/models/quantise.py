"""Frozen weights in eight or four bits, for who only computes with them: under adapters, as a
reference, as a reward model.

A layer's products read W ≈ q · scale. int8 has a scale for each output; nf4 (arXiv:2305.14314) one
for each 64 inputs of an output, and 16 levels that hold equal shares of a normal distribution. The
arrays are qwix's, an extra. A product of int8 multiplies with q, and the scale behind it; of nf4 it
makes its weight, and its gradient makes it again (``layers.product``, and ``grouped`` of experts),
so that there is never more than one of them; in the sampler's loop a kernel reads the four bits
where the devices have one (``nibbles``).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf.core.errors import InputError, to_install
from jaxrlhf.core.types import Array, Params
from jaxrlhf.models.nibbles import Nibbles

KINDS = ("int8", "nf4")

TILE = 64
"""Inputs that share a scale in nf4."""

BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / TILE}
"""Of a weight, with its share of a scale; an output's own is next to nothing."""

KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
"""Linear maps that are quantised; norms, biases, routers and embeddings are small, or summed in
float32, and stay."""


def is_quantised(x: Any) -> bool:
    """Whether a leaf is one of qwix's arrays, which has a weight's shape, or ``Nibbles``."""
    return isinstance(x, Nibbles) or hasattr(x, "qvalue")


def any_quantised(params: Params) -> bool:
    """Whether a tree has such leaves."""
    return any(map(is_quantised, jax.tree.leaves(params, is_leaf=is_quantised)))


MAGNITUDE = "lora_magnitude"
"""The leaf of DoRA's magnitudes (``dora``)."""


def in_dtype(params: Params, dtype: Any) -> Params:
    """The tree in a compute dtype, but for what is quantised, and for DoRA's magnitudes: what is
    learnt of them is less than a 256th of them, which bfloat16 has not."""

    def cast(path: Any, x: Any) -> Any:
        wide = path and getattr(path[-1], "key", "") == MAGNITUDE
        return x if wide or is_quantised(x) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_quantised)


def made(x: Any, dtype: Any) -> Array:
    """A weight in a compute dtype, from its levels and scales if it is quantised."""
    if not is_quantised(x):
        return x.astype(dtype)
    import qwix  # noqa: PLC0415 (an extra)

    return qwix.dequantize(x).astype(dtype)


def behind(contract: int, x: Any) -> Array | None:
    """The scale of each output [out…] of a kernel [in…, out…] with ``contract`` axes that come in;
    None where it depends on inputs too, or there is none, or levels are no whole numbers (nf4)."""
    if not is_quantised(x) or x.qvalue.dtype == jnp.uint4 or max(x.scale.shape[:contract]) > 1:
        return None
    return x.scale.reshape(x.scale.shape[contract:])


def no_slope(x: Any) -> Any:
    """The cotangent of a quantised weight, which nothing trains."""

    def leaf(x: Array) -> Any:
        trained = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.zeros_like(x) if trained else np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(leaf, x)


def quantised(params: Params, kind: str) -> Params:
    """The same, the layers' linear maps in ``kind``; arrays, or their shapes with layouts.

    Raises:
      InputError: qwix is not installed, or inputs of a map do not divide into tiles.
    """
    return {**params, "layers": _quantised(params["layers"], kind)}


def quantised_leaf(path: str, weight: Any, kind: str) -> Any:
    """A leaf of the parameters by its path, quantised if it is a kernel; as ``quantised``."""
    name = path.split("/")[-2]
    mapped = path.startswith("layers/") and path.endswith("/kernel") and name in KERNELS
    return _quantise(name, weight, kind) if mapped else weight


def _quantised(tree: Params, kind: str) -> Params:
    """A tree of layers, its maps quantised; norms as they are."""

    def child(name: str, x: Any) -> Any:
        if name not in KERNELS:
            return _quantised(x, kind) if isinstance(x, dict) else x
        if is_quantised(x["kernel"]):
            return x
        return {**x, "kernel": _quantise(name, x["kernel"], kind)}

    return {name: child(name, x) for name, x in tree.items()}


def _quantise(name: str, weight: Any, kind: str) -> Any:
    """A kernel of all layers; its last input axis is that which is tiled."""
    try:
        import qwix  # noqa: PLC0415 (an extra)
    except ImportError:
        raise InputError(
            f"model.frozen_dtype={kind}: needs the package qwix: {to_install('quantise')}"
        ) from None
    inputs = _inputs(name, len(weight.shape))
    last = inputs[-1]
    if kind == "nf4" and weight.shape[last] % (tile := min(TILE, weight.shape[last])):
        raise InputError(
            f"model.frozen_dtype=nf4: {name} has {weight.shape[last]} inputs, no multiple of "
            f"{tile}: take int8"
        )
    tiles = {last: min(TILE, weight.shape[last])} if kind == "nf4" else {}
    apart = [axis for axis in range(len(weight.shape)) if axis not in inputs]
    if kind == "nf4":
        apart += inputs[:-1]

    def layer(x: Array) -> Any:
        x = x[None].astype("float32")
        found = qwix.quantize(x, kind, channelwise_axes=apart, tiled_axes=tiles)
        return jax.tree.map(lambda part: part[0], found)

    def make(x: Array) -> Any:
        # A layer at a time: in float32 all of them may be too much.
        return jax.lax.map(layer, x)

    shapes = jax.eval_shape(make, jax.ShapeDtypeStruct(weight.shape, weight.dtype))
    layout = laid(weight.sharding, shapes)
    if not isinstance(weight, jax.ShapeDtypeStruct):
        return jax.jit(make, out_shardings=layout)(weight)
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout
    )


def _inputs(name: str, rank: int) -> list[int]:
    """Axes of a stacked kernel [L, (E,) in…, out…] that are summed over: heads and head_dim of o,
    one axis of all others. A mixture's experts lie behind the layers."""
    if name == "o":
        return [1, 2]
    mixture = name in ("gate", "up", "down") and rank == 4
    return [1 + mixture]


def laid(where: Any, x: Any) -> Any:
    """Where an array lies; what is quantised as its weight would, level by level and scale by
    scale, but for axes that its scales are too short for."""
    if not is_quantised(x):
        return where
    return jax.tree.map(lambda part: _layout(where, part.shape), x)


def _layout(where: Any, shape: tuple[int, ...]) -> Any:
    if not isinstance(where, NamedSharding):
        return where
    parts = tuple(where.spec) + (None,) * (len(shape) - len(where.spec))

    def pieces(part: Any) -> int:
        names = part if isinstance(part, tuple) else (part,)
        count = 1
        for name in names:
            count *= 1 if name is None else where.mesh.shape[name]
        return count

    kept = (p if n % pieces(p) == 0 else None for p, n in zip(parts, shape, strict=True))
    return NamedSharding(where.mesh, PartitionSpec(*kept))
