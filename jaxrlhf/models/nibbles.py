"""Weights of nf4 as decoding reads them, two a byte, and kernels that multiply a few rows by them.

XLA writes a weight of nf4 out wide before it multiplies by it: of a token at a time that is most of
what is moved. The kernels, of Pallas, read the codes a block at a time, and make the block's
weights on the chip: by Triton on NVIDIA GPUs, by Mosaic on TPUs.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from jaxrlhf.config.model import Nf4Product
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import DECODE, device_kind, row_shards, shards, spec

Maker = Literal["triton", "mosaic"]

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the codes 0 to 15 stand for, before their scale (arXiv:2305.14314, appendix E)."""

TILE, HALF = 64, 32
"""Inputs that share a scale, and the bytes that hold them."""

MOST_ROWS = 128
"""Of a device: they, and their sums, are held on the chip. More keep it busy with wide weights."""

PROGRAMS = 128
"""Blocks at once that keep a GPU's memory busy; of narrow maps, whose columns are fewer, the inputs
are split as well."""

WIDTHS = (64, 32, 16)
"""Outputs of a block on a GPU: the largest by which they divide."""

INTERPRET: Maker | None = None
"""The kernels that are interpreted, in tests, on devices that have none."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nibbles:
    """W [D, F] = level(code) · scale. Byte i of tile t holds the codes of the inputs 64·t + i, in
    its low half, and 64·t + 32 + i: each half of the bytes is a product of its own, and nothing has
    to be put between others."""

    code: Array
    """uint8 [D/2, F]."""
    scale: Array
    """float32 [D/64, F]."""
    outs: tuple[int, ...] = field(metadata={"static": True})
    """The outputs' axes, which F is made of."""
    axes: tuple[str | None, str | None] = field(metadata={"static": True})
    """Logical axes of D and F: of several the first, which alone may be split."""
    by: Maker = field(metadata={"static": True})


def maker(wanted: Nf4Product) -> Maker | None:
    """Whose kernel the devices of the mesh in force carry out; None: they have none, or it is not
    ``wanted`` (``model.nf4_product``)."""
    if wanted == "plain":
        return None
    if INTERPRET:
        return INTERPRET
    kind = device_kind()
    return "triton" if kind.startswith("NVIDIA") else "mosaic" if kind.startswith("TPU") else None


def packed(contract: int, x: Any, names: tuple[str | None, ...], by: Maker) -> Any:
    """A quantised kernel [in…, out…] with ``contract`` axes that come in, two codes a byte; as it
    is where it is not nf4 in tiles of 64, or a device's part would be no whole tiles and blocks.

    Args:
      x: qwix's array.
      names: its logical axes.
    """
    ins, outs = math.prod(x.shape[:contract]), x.shape[contract:]
    tiles, wide = math.prod(x.scale.shape[:contract]), math.prod(outs)
    axes = names[0], names[contract]
    in_parts, out_parts = (1 if name is None else shards(name, DECODE) for name in axes)
    whole = tiles % in_parts == 0 and wide % (out_parts * WIDTHS[-1]) == 0
    if x.qvalue.dtype != jnp.uint4 or ins != tiles * TILE or not whole:
        return x
    code = x.qvalue.astype(jnp.uint8).reshape(tiles, 2, HALF, wide)
    both = (code[:, 0] | (code[:, 1] << 4)).reshape(ins // 2, wide)
    return Nibbles(both, x.scale.astype(jnp.float32).reshape(tiles, wide), outs, axes, by)


def unpacked(w: Nibbles, dtype: Any) -> Array:
    """W [D, F] in a compute dtype."""
    tiles, wide = w.scale.shape
    both = w.code.reshape(tiles, HALF, wide)
    code = jnp.stack([both & 15, both >> 4], axis=1).astype(jnp.int32)
    found = jnp.array(LEVELS, jnp.float32)[code] * w.scale[:, None, None]
    return found.reshape(-1, wide).astype(dtype)


def times(x: Array, w: Nibbles) -> Array:
    """x·W of a token a row: x [B, 1, in…] → [B, 1, out…], in x's dtype, summed in float32.

    On a mesh each device multiplies by its part of W, and where the inputs are split what they come
    to is added up: no weight is sent.
    """
    x_BD = x.reshape(len(x), -1)
    if -(-len(x) // row_shards(DECODE)) > MOST_ROWS:
        y_BF = jnp.tensordot(x_BD, unpacked(w, x.dtype), 1)
    else:
        y_BF = _on_each_device(x_BD, w)
    return y_BF.reshape(len(x), 1, *w.outs)


def _on_each_device(x_BD: Array, w: Nibbles) -> Array:
    kernel = {"triton": _by_triton, "mosaic": _by_mosaic}[w.by]
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(x_BD, w.code, w.scale)
    inputs, outputs = w.axes
    (along,) = spec((inputs,), DECODE)

    def device(x_BD: Array, code: Array, scale: Array) -> Array:
        y_BF = kernel(x_BD, code, scale)
        return y_BF if along is None else jax.lax.psum(y_BF, along)

    mapped = jax.shard_map(
        device,
        in_specs=(spec(("batch", inputs), DECODE), *[spec(w.axes, DECODE)] * 2),
        out_specs=spec(("batch", outputs), DECODE),
        check_vma=False,
    )
    lacks = -len(x_BD) % row_shards(DECODE)
    return mapped(jnp.pad(x_BD, ((0, lacks), (0, 0))), w.code, w.scale)[: len(x_BD)]


def _halves(x_BD: Array, rows: int) -> tuple[Array, Array]:
    """The inputs of the low halves and of the high ones, [rows, D/2] each; zeros after the rows."""
    x = jnp.pad(x_BD, ((0, rows - len(x_BD)), (0, 0))).reshape(rows, -1, 2, HALF)
    return x[:, :, 0].reshape(rows, -1), x[:, :, 1].reshape(rows, -1)


def _precision(dtype: Any) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _by_triton(x_BD: Array, code: Array, scale: Array) -> Array:
    """A block of columns a program, a tile after the other; with few columns each program has a
    share of the tiles, and their sums are added up behind it, in one order."""
    rows = max(16, pl.next_power_of_2(len(x_BD)))
    tiles, outs = scale.shape
    width = next(size for size in WIDTHS if outs % size == 0)
    wanted = min(tiles, -(-PROGRAMS * width // outs))
    splits = max(n for n in range(1, wanted + 1) if tiles % n == 0)
    some, whole = tiles // splits, x_BD.dtype if splits == 1 else jnp.float32
    found = pl.pallas_call(
        partial(_triton_kernel, some),
        out_shape=jax.ShapeDtypeStruct((splits, rows, outs), whole),
        grid=(outs // width, splits),
        in_specs=[
            pl.BlockSpec((len(LEVELS),), lambda j, s: (0,)),
            *[pl.BlockSpec((rows, some * HALF), lambda j, s: (0, s))] * 2,
            pl.BlockSpec((some * HALF, width), lambda j, s: (s, j)),
            pl.BlockSpec((some, width), lambda j, s: (s, j)),
        ],
        out_specs=pl.BlockSpec((None, rows, width), lambda j, s: (s, 0, j)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=INTERPRET is not None,
        name="nf4_product",
    )(jnp.array(LEVELS, jnp.float32), *_halves(x_BD, rows), code, scale)
    return found.sum(0)[: len(x_BD)].astype(x_BD.dtype)


def _triton_kernel(
    tiles: int, level_ref: Any, low_ref: Any, high_ref: Any, code_ref: Any, scale_ref: Any, out: Any
) -> None:
    def add(t: Any, total: Array) -> Array:
        here = pl.ds(t * HALF, HALF)
        both = plgpu.load(code_ref.at[here, :]).astype(jnp.int32)
        scale = plgpu.load(scale_ref.at[pl.ds(t, 1), :])
        for x_ref, code in ((low_ref, both & 15), (high_ref, both >> 4)):
            x = plgpu.load(x_ref.at[:, here])
            # Looked up: 16 numbers lie in a cache line, and comparisons would be 15 a weight.
            w = (plgpu.load(level_ref.at[code]) * scale).astype(x.dtype)
            total += plgpu.dot(x, w, precision=_precision(x.dtype))
        return total

    total = jax.lax.fori_loop(0, tiles, add, jnp.zeros(out.shape, jnp.float32))
    out[...] = total.astype(out.dtype)


def _by_mosaic(x_BD: Array, code: Array, scale: Array) -> Array:
    """Blocks of columns, and within them of inputs, one after the other; the sum stays on the chip.

    A block of inputs is as many bytes as give eight scales, a register's rows, or all of them."""
    half, outs = code.shape
    deep = next((size for size in (512, 256) if half % size == 0), half)
    width = min(outs, 1024 if deep < half else 128)
    rows = -(-len(x_BD) // 16) * 16
    found = pl.pallas_call(
        _mosaic_kernel,
        out_shape=jax.ShapeDtypeStruct((rows, outs), jnp.float32),
        grid=(pl.cdiv(outs, width), half // deep),
        in_specs=[
            *[pl.BlockSpec((rows, deep), lambda j, s: (0, s))] * 2,
            pl.BlockSpec((deep, width), lambda j, s: (s, j)),
            pl.BlockSpec((deep // HALF, width), lambda j, s: (s, j)),
        ],
        out_specs=pl.BlockSpec((rows, width), lambda j, s: (0, j)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=INTERPRET is not None,
        name="nf4_product",
    )(*_halves(x_BD, rows), code, scale)
    return found[: len(x_BD)].astype(x_BD.dtype)


def _mosaic_kernel(low_ref: Any, high_ref: Any, code_ref: Any, scale_ref: Any, out: Any) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    both, scale = code_ref[...].astype(jnp.int32), scale_ref[...]
    tiles, width = scale.shape
    each = jnp.broadcast_to(scale[:, None], (tiles, HALF, width)).reshape(tiles * HALF, width)
    for x_ref, code in ((low_ref, both & 15), (high_ref, both >> 4)):
        x = x_ref[...]
        w = (_chosen(code) * each).astype(x.dtype)
        out[...] += jnp.dot(x, w, precision=_precision(x.dtype), preferred_element_type=jnp.float32)


def _chosen(code: Array) -> Array:
    """Levels by halves: each bit chooses between neighbours. A TPU looks nothing up."""
    found = [jnp.float32(level) for level in LEVELS]
    for bit in range(4):
        odd = (code >> bit) & 1 == 1
        found = [jnp.where(odd, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
    return jnp.asarray(found[0])
