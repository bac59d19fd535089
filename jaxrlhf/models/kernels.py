"""Attention by kernels of the hardware's makers, in which scores are never in memory.

cuDNN's on NVIDIA GPUs and splash attention on TPUs (both after arXiv:2205.14135): a tile of scores
at a time, on the chip, forwards and backwards; tiles after the diagonal are skipped. They compute
in bfloat16 and sum in float32. Elsewhere, and where they do not fit, ``attend_before``'s pieces.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxrlhf.config import DecoderConfig
from jaxrlhf.config.model import AttentionKernel
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import device_kind, length_shards, row_shards, spec
from jaxrlhf.models.attention import PLAIN, Look, attend_before, look_of
from jaxrlhf.models.remat import COSTLY
from jaxrlhf.models.rope import kinds
from jaxrlhf.models.stacks import stacks

QUERIES = ("batch", None, "heads", None)
KEYS = ("batch", None, "kv_heads", None)

TILES = (512, 256, 128)
"""Queries and keys of a tile on a TPU; the largest that rows divide by."""

CUDNN, INTERPRET = "cudnn", False
"""How the kernels are carried out; tests have others, for the CPU."""


def choose(
    wanted: AttentionKernel, decoder: DecoderConfig, dtype: str, packed: bool
) -> AttentionKernel:
    """The kernel for the devices of the mesh in force: one of cudnn, splash, pieces.

    Args:
      wanted: ``model.attention``.
      decoder: of one stack.
      packed: rows are of several segments.

    Raises:
      InputError: ``wanted`` names a kernel that does not run there.
    """
    fitting: AttentionKernel = "cudnn" if device_kind().startswith("NVIDIA") else "splash"
    lacks = {
        "devices": f"the devices are {device_kind()}: NVIDIA GPUs have cudnn, TPUs splash",
        "dtype": f"it computes in bfloat16, and model.dtype is {dtype}",
        "context": "the mesh splits rows by context",
        "head_dim": f"heads are of {decoder.head_dim}: it takes multiples of 64, cudnn of 8 to 128",
        "packed": "cudnn takes no packed rows (data.packing)",
        "softcap": "cudnn has no cap of scores (attention_softcap)",
        "sinks": "cudnn, as JAX calls it, has no sinks (attention_sinks)",
    }
    cudnn = fitting == "cudnn"
    fits = {
        "devices": device_kind().startswith(("NVIDIA", "TPU")) and wanted in ("auto", fitting),
        "dtype": dtype == "bfloat16",
        "context": length_shards() == 1,
        "head_dim": _fits(decoder.head_dim),
        "packed": not (packed and cudnn),
        "softcap": not (decoder.attention_softcap and cudnn),
        "sinks": not (decoder.attention_sinks and cudnn),
    }
    if wanted == "pieces" or (wanted == "auto" and not all(fits.values())):
        return "pieces"
    for name, fit in fits.items():
        if not fit:
            raise InputError(f"model.attention={wanted}: {lacks[name]}: set auto or pieces")
    return fitting


def choose_each(
    wanted: AttentionKernel, decoder: DecoderConfig, dtype: str, packed: bool
) -> dict[str, AttentionKernel]:
    """``choose`` for each of a decoder's stacks, by its name.

    Where a kernel takes the size of some layers' heads alone (Gemma 4 has 512 numbers in those of
    layers without a window, 256 in the others), the other layers have pieces, whatever is wanted.
    """
    each = stacks(decoder)
    fits = {stack.name: _fits(stack.decoder.head_dim) for stack in each}
    some = any(fits.values()) and wanted != "pieces"
    return {
        stack.name: choose(
            wanted if fits[stack.name] or not some else "auto", stack.decoder, dtype, packed
        )
        for stack in each
    }


def _fits(head_dim: int) -> bool:
    """Whether the devices' kernel takes heads of this size."""
    if device_kind().startswith("NVIDIA"):
        return head_dim % 8 == 0 and head_dim <= 128
    return head_dim % 64 == 0


def real_first(mask_BT: Array) -> tuple[Array, Array]:
    """Where each column of rows comes from if the real tokens stand first, and where it goes back.

    Both [B, T]. Real tokens keep their order, and so their positions, which count them.
    """
    order_BT = jnp.argsort(mask_BT == 0, axis=1, stable=True)
    return order_BT, jnp.argsort(order_BT, axis=1)


def reorder(x: Array, order_BT: Array) -> Array:
    """Columns of x [B, T, …] in another order."""

    def row(x: Array, order: Array) -> Array:
        # A permutation: its gradient is one too, and nothing has to be added up.
        return x.at[order].get(unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(row)(x, order_BT)


def attend_rows(
    kernel: AttentionKernel,
    decoder: DecoderConfig,
    which: int | Array,
    query: Array,
    key: Array,
    value: Array,
    mask_BT: Array,
    segment_BT: Array | None,
    sink_N: Array | None = None,
) -> Array:
    """``attend_before`` by ``kernel``, of a layer of the decoder's kind number ``which``."""
    windows, look = [kind.window for kind in kinds(decoder).all], look_of(decoder)
    distinct = sorted(set(windows))
    if kernel == "pieces":
        window = jnp.array(windows)[which] if len(distinct) > 1 else distinct[0]
        return attend_before(query, key, value, mask_BT, segment_BT, window, look, sink_N)

    def through(window: int) -> Any:
        if kernel == "cudnn":
            return partial(attend_cudnn, window=window, look=look)
        how = {"segment_BT": segment_BT, "window": window, "look": look, "sink_N": sink_N}
        return partial(attend_splash, **how)

    if len(distinct) == 1:
        return through(distinct[0])(query, key, value, mask_BT)
    # A kernel is made for its window: the layer's own is chosen where the layers are one loop.
    number = jnp.array([distinct.index(window) for window in windows])[which]
    return jax.lax.switch(number, [*map(through, distinct)], query, key, value, mask_BT)


def attend_cudnn(
    query: Array, key: Array, value: Array, mask_BT: Array, window: int = 0, look: Look = PLAIN
) -> Array:
    """``attend_before`` by cuDNN, of rows whose real tokens stand first."""
    tokens = query.shape[1]
    # Its gradient takes even lengths alone.
    given = (_wide(x, 2) for x in (query, key, value, (mask_BT != 0)[:, :, None, None]))

    def device(query: Array, key: Array, value: Array, real: Array) -> Array:
        # What the kernel leaves where no token is real is not for the gradient to see.
        query, key, value = (_where(real, x) for x in (query, key, value))
        lengths = jnp.maximum(real.sum((1, 2, 3), dtype=jnp.int32), 1)
        seen = jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=look.scale,
            local_window_size=(window - 1, 0) if window else None,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=CUDNN,  # type: ignore[arg-type]
        )
        return _where(real, seen)

    return _on_each_device(device, *given)[:, :tokens]


@jax.custom_vjp
def _where(real: Array, x: Array) -> Array:
    """x where ``real`` [B, T, 1, 1], elsewhere 0; for its gradient ``real`` is kept as narrow.

    JAX sees one operation. Of the parts of ``where`` it would compute those that are alike in all
    layers, a mask and zeros as wide as x, in front of the loop over them, which reads both.
    """
    # A 0 that does not hang on an argument would be such a part yet.
    return jnp.where(real, x, jnp.where(real, 0, 0).astype(x.dtype))


def _where_forward(real: Array, x: Array) -> tuple[Array, Array]:
    return _where(real, x), real


def _where_backward(real: Array, dy: Array) -> tuple[None, Array]:
    return None, _where(real, dy)


_where.defvjp(_where_forward, _where_backward)


def attend_splash(
    query: Array,
    key: Array,
    value: Array,
    mask_BT: Array,
    segment_BT: Array | None = None,
    window: int = 0,
    look: Look = PLAIN,
    sink_N: Array | None = None,
) -> Array:
    """``attend_before`` by splash attention. Padding is a segment of its own, number 0."""
    tokens = query.shape[1]
    segment_BT = jnp.where(mask_BT != 0, 1 if segment_BT is None else segment_BT + 1, 0)

    def device(
        query: Array, key: Array, value: Array, segment: Array, sink: Array | None = None
    ) -> Array:
        kernel = _splash_kernel(query.shape[1], query.shape[2], window, look.softcap)

        def row(query: Array, key: Array, value: Array, segment: Array) -> Array:
            query, key, value = (jnp.swapaxes(x, 0, 1) for x in (query, key, value))
            ids = splash.SegmentIds(segment, segment)
            return jnp.swapaxes(kernel(query, key, value, ids, sink), 0, 1)

        scaled = (query * (look.scale or query.shape[-1] ** -0.5)).astype(query.dtype)
        return jax.vmap(row)(scaled, key, value, segment[:, :, 0, 0])

    given = (_wide(x, TILES[-1]) for x in (query, key, value, segment_BT[:, :, None, None]))
    # In the dtype of the rest, as the kernel's gradient of it is.
    sinks = () if sink_N is None else (sink_N.astype(query.dtype),)
    return _on_each_device(device, *given, *sinks)[:, :tokens]


def _splash_kernel(tokens: int, heads: int, window: int, softcap: float) -> Any:
    tile = next(size for size in TILES if tokens % size == 0)
    square = (tokens, tokens)
    mask = masks.LocalMask(square, (window - 1, 0), 0) if window else masks.CausalMask(square)
    forwards = {"block_q": tile, "block_kv": tile}
    of_keys = {"block_q_dkv": tile, "block_kv_dkv": tile}
    of_queries = {"block_q_dq": tile, "block_kv_dq": tile}
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**forwards, **of_keys, **of_queries),  # type: ignore[arg-type]
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=COSTLY,
        interpret=INTERPRET,
    )


def _wide(x: Array, multiple: int) -> Array:
    """x [B, T, …] with zeros after it, up to a multiple of so many columns."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def _on_each_device(
    attend: Any, query: Array, key: Array, value: Array, rows: Array, *heads: Array
) -> Array:
    """``attend`` of each device's rows and heads: of a kernel XLA knows no parts.

    Args:
      rows: [B, T, 1, 1], what is known of the rows' tokens.
      heads: [N] each, numbers of the query heads.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return attend(query, key, value, rows, *heads)
    lacks = -query.shape[0] % row_shards()

    def even(x: Array) -> Array:
        return jnp.pad(x, [(0, lacks)] + [(0, 0)] * 3)

    mapped = jax.shard_map(
        attend,
        in_specs=(
            *(spec(axes) for axes in (QUERIES, KEYS, KEYS, ("batch", None, None, None))),
            *(spec(("heads",)) for _ in heads),
        ),
        out_specs=spec(QUERIES),
        check_vma=False,
    )
    return mapped(*map(even, (query, key, value, rows)), *heads)[: query.shape[0]]
