"""The modules of the decoder: weights with their logical axes, and what they compute.

Every module holds float32 weights with their axes as metadata and computes in the dtype of its
input. Einsum letters are the axis key of core/types.py. From the inside out: linear maps with
low-rank adapters, norms and rotations, attention and MLP, the block of both, what lies before and
after the blocks, and what a backward pass keeps of a block.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import DecoderConfig, LoraConfig, RopeScaling
from jaxrlhf.config.model import Remat
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import Rules, constrain

Angles = tuple[Array, Array]
"""cos and sin of the rotary embedding, [B, T, 1, H/2], float32."""


def exact(dtype: Any) -> AbstractContextManager[Any]:
    """Products that are traced inside have the precision of ``dtype`` on every device.

    Left to themselves GPUs multiply float32 arrays in TF32, with 10 bits of each number, and TPUs
    in bfloat16, with 7: log-probs of sampler and update would differ by as much. Of bfloat16 arrays
    nothing is changed: the product of two numbers is exact in float32, in which sums are taken.
    """
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if wide else nullcontext()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(contract: int, x: Array, w: Array) -> Array:
    """x·W, contracting the last ``contract`` axes of x with the first of W.

    Its gradient is the usual one, but xᵀ·dy has x on the left: the other way round, as JAX would
    have it, XLA transposes dy and whatever made it, and then the result; on CPUs that is a tenth of
    a gradient (benchmarks/RESULTS.md).
    """
    return jnp.tensordot(x, w, contract)


def _product_forward(contract: int, x: Array, w: Array) -> tuple[Array, Any]:
    return jnp.tensordot(x, w, contract), (x, w)


def _product_backward(contract: int, saved: Any, dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows, outs = tuple(range(x.ndim - contract)), tuple(range(contract, w.ndim))
    with exact(x.dtype):
        dx = jnp.tensordot(dy, w, (tuple(range(len(rows), dy.ndim)), outs))
        return dx, jnp.tensordot(x, dy, (rows, rows))


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank(contract: int, x: Array, a: Array, b: Array) -> Array:
    """(x·A)·B, contracting the last ``contract`` axes of x.

    Its gradient is the usual one, but each product has its small factor on the left: XLA would
    otherwise transpose the large one, and fuse into that what made it, at a third of a step on CPU.
    """
    return _low_rank_forward(contract, x, a, b)[0]


def _low_rank_forward(contract: int, x: Array, a: Array, b: Array) -> tuple[Array, Any]:
    low = jnp.tensordot(x, a, contract)
    return jnp.tensordot(low, b, 1), (x, a, b, low)


def _low_rank_backward(contract: int, saved: Any, dy: Array) -> tuple[Array, Array, Array]:
    """With low = x·A: d low = dy·Bᵀ, dA = xᵀ·d low, dx = d low·Aᵀ, dB = lowᵀ·dy."""
    x, a, b, low = saved
    rows, outs = tuple(range(low.ndim - 1)), tuple(range(1, b.ndim))
    with exact(x.dtype):
        dlow = jnp.tensordot(dy, b, (tuple(axis + low.ndim - 2 for axis in outs), outs))
        da = jnp.moveaxis(jnp.tensordot(dlow, x, (rows, rows)), 0, -1)
        dx = jnp.tensordot(dlow, a, ((low.ndim - 1,), (contract,)))
        return dx, da, jnp.tensordot(low, dy, (rows, rows))


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def adapters_of(tree: Any) -> Any:
    """The part of a layer's tree that is LoRA."""
    picked = {}
    for name, child in tree.items():
        if name.startswith("lora_"):
            picked[name] = child
        elif isinstance(child, dict) and (inner := adapters_of(child)):
            picked[name] = inner
    return picked


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int) -> Array:
    """N(0, 1/inputs), which keeps the size of what comes in."""
    return inputs**-0.5 * jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """x·W (+ bias) (+ (alpha/rank)·x·A·B), contracting the last axes of x with the first of W.

    The last is a low-rank adapter (arXiv:2106.09685), if ``lora`` names the map as a target.
    """

    def __init__(
        self,
        name: str,
        inputs: dict[str, int],
        outputs: dict[str, int],
        rngs: nnx.Rngs,
        lora: LoraConfig | None,
        bias: bool = False,
    ):
        ins, outs = tuple(inputs.values()), tuple(outputs.values())
        self.contract = len(ins)
        self.kernel = nnx.Param(normal(rngs, ins + outs, math.prod(ins)), axes=(*inputs, *outputs))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outs, jnp.float32), axes=tuple(outputs))
        self.lora_scale = 0.0
        if lora and name in lora.targets:
            self.lora_scale, rank = lora.alpha / lora.rank, lora.rank
            # B starts at zero, so that the adapter changes nothing at first.
            self.lora_a = nnx.Param(
                normal(rngs, (*ins, rank), math.prod(ins)), axes=(*inputs, "rank")
            )
            self.lora_b = nnx.Param(jnp.zeros((rank, *outs), jnp.float32), axes=("rank", *outputs))

    def __call__(self, x: Array) -> Array:
        y: Any = product(self.contract, x, self.kernel[...].astype(x.dtype))
        if self.lora_scale:
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            change: Any = low_rank(self.contract, x, a, b)
            y += self.lora_scale * change
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
    """x / √(mean x² + eps) · scale over the last axis, in float32 (arXiv:1910.07467).

    With ``norm_offset`` the scale is 1 + its parameter.
    """

    def __init__(self, axis: str, size: int, c: DecoderConfig):
        self.eps, self.offset = c.norm_eps, float(c.norm_offset)
        self.scale = nnx.Param(jnp.full(size, 1 - self.offset, jnp.float32), axes=(axis,))

    def __call__(self, x: Array) -> Array:
        # Squares of bfloat16 would lose the sum, so the norm is always taken in float32.
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scale = self.offset + self.scale[...].astype(jnp.float32)
        return (wide * inverse * scale).astype(x.dtype)


def positions(mask_BT: Array, segment_BT: Array | None = None) -> Array:
    """Real tokens before each token, in its row or in its segment of it; [B, T] int32, at least 0.

    A segment is a stretch of equal numbers.
    """
    count_BT = jnp.cumsum(mask_BT, axis=1) - 1
    if segment_BT is not None:
        starts = jnp.diff(segment_BT, axis=1, prepend=segment_BT[:, :1]) != 0
        # Counts only grow, so the running maximum is the count at the start of the token's segment.
        count_BT -= jax.lax.cummax(jnp.where(starts, count_BT, 0), axis=1)
    return jnp.maximum(count_BT, 0)


def rotary_angles(position_BT: Array, config: DecoderConfig) -> Angles:
    """Angle position · theta^(−2i/H) of pair i (arXiv:2104.09864)."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        frequency = stretch(frequency, config.rope_scaling)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def stretch(frequency: Array, scaling: RopeScaling) -> Array:
    """Llama 3.1: low frequencies divided by ``factor``, high ones kept, a ramp in between."""
    # Full turns that a pair makes over the context that the model was first trained on.
    turns = scaling.original_context * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (keep + (1 - keep) / scaling.factor)


def rotate(x: Array, angles: Angles) -> Array:
    """Rotate the pairs (i, i + H/2) of the last axis of x [B, T, heads, H], in float32."""
    cos, sin = angles
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions."""

    def __init__(
        self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None, fused: bool = False
    ):
        embed = {"embed": c.embed}
        query = {"heads": c.heads, "head_dim": c.head_dim}
        key = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        if fused:
            # Of each key head its queries, the key and the value: so it is split as heads are.
            every = {"kv_heads": c.kv_heads, "group": c.heads // c.kv_heads + 2}
            every |= {"head_dim": c.head_dim}
            self.qkv = Linear("qkv", embed, every, rngs, None, c.qkv_bias)
        else:
            self.q = Linear("q", embed, query, rngs, lora, c.qkv_bias)
            self.k = Linear("k", embed, key, rngs, lora, c.qkv_bias)
            self.v = Linear("v", embed, key, rngs, lora, c.qkv_bias)
        self.o = Linear("o", query, embed, rngs, lora)
        if c.qk_norm:
            self.q_norm = RMSNorm("head_dim", c.head_dim, c)
            self.k_norm = RMSNorm("head_dim", c.head_dim, c)

    def project(self, x: Array, angles: Angles, rules: Rules) -> tuple[Array, Array, Array]:
        """x [B, T, D] → query [B, T, N, H], key and value [B, T, K, H], rotated."""
        if hasattr(self, "qkv"):
            every = self.qkv(x)
            query, key, value = every[..., :-2, :], every[..., -2, :], every[..., -1, :]
            query = query.reshape(*x.shape[:-1], -1, key.shape[-1])
        else:
            query, key, value = self.q(x), self.k(x), self.v(x)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query = constrain(query, ("batch", "length", "heads", "head_dim"), rules)
        key, value = (
            constrain(y, ("batch", "length", "kv_heads", "head_dim"), rules) for y in (key, value)
        )
        return rotate(query, angles), rotate(key, angles), value


ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=True)}
"""``DecoderConfig.activation`` → the function; gelu by its tanh approximation."""


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) · up(x)) (arXiv:2002.05202)."""

    def __init__(
        self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None, fused: bool = False
    ):
        self.activation = c.activation
        embed, hidden = {"embed": c.embed}, {"mlp": c.mlp}
        if fused:
            self.gate_up = Linear("gate_up", embed, {"pair": 2, **hidden}, rngs, None)
        else:
            self.gate = Linear("gate", embed, hidden, rngs, lora)
            self.up = Linear("up", embed, hidden, rngs, lora)
        self.down = Linear("down", hidden, embed, rngs, lora)

    def __call__(self, x: Array, rules: Rules) -> Array:
        if hasattr(self, "gate_up"):
            both = self.gate_up(x)
            gate, up = both[..., 0, :], both[..., 1, :]
        else:
            gate, up = self.gate(x), self.up(x)
        wide = ACTIVATIONS[self.activation](gate) * up
        return self.down(constrain(wide, ("batch", "length", "mlp"), rules))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self,
        c: DecoderConfig,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
        fused: bool = False,
    ):
        self.attention_norm = RMSNorm("embed", c.embed, c)
        self.attention = Attention(c, rngs, lora, fused)
        self.mlp_norm = RMSNorm("embed", c.embed, c)
        self.mlp = GatedMLP(c, rngs, lora, fused)

    def __call__(
        self,
        x: Array,
        angles: Angles,
        rules: Rules,
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    ) -> tuple[Array, Any]:
        """x [B, T, D] → the next block's x, and what ``attend`` has to remember.

        Args:
          attend: query [B, T, N, H], key and value [B, T, K, H] → what the queries see
            [B, T, N, H], and keys and values to be kept, if any.
        """
        mixed, kept = attend(*self.attention.project(self.attention_norm(x), angles, rules))
        x += self.attention.o(mixed)
        x += self.mlp(self.mlp_norm(x), rules)
        return constrain(x, ("batch", "length", "activation"), rules), kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(vocab: int, dtype: str, table: Array, token: Array) -> Array:
    """The rows of a float32 table [V, D] for tokens [B, T], rounded to ``dtype``: [B, T, D].

    Its gradient adds up in float32. In bfloat16 the thousands of a frequent token would not: a sum
    stops growing where what is added is less than a 256th of it.
    """
    # Rounded where it lies, so that half as much is sent.
    narrow = constrain(table.astype(dtype), ("vocab", "embed"))
    return constrain(narrow, ("vocab", None))[token]


def _look_up_forward(vocab: int, dtype: str, table: Array, token: Array) -> tuple[Array, Array]:
    return look_up(vocab, dtype, table, token), token


def _look_up_backward(vocab: int, dtype: str, token: Array, dx: Array) -> tuple[Array, None]:
    zeros = constrain(jnp.zeros((vocab, dx.shape[-1]), jnp.float32), ("vocab", None))
    return zeros.at[token].add(dx.astype(jnp.float32)), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def to_vocab(x: Array, weight: Array, axis: int) -> Array:
    """Logits: x [..., D] · a weight whose ``axis`` is D → [..., V], summed and given in float32."""
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    weight, wide = weight.astype(x.dtype), jnp.float32
    with exact(x.dtype):
        return jax.lax.dot_general(x, weight, dims, preferred_element_type=wide)


class Embed(nnx.Module):
    """Token embedding, float32 [V, D]; with ``embed_scale`` times √D, on its way in alone."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.factor = c.embed**0.5 if c.embed_scale else 1.0
        self.table = nnx.Param(normal(rngs, (c.vocab, c.embed), c.embed), axes=("vocab", "embed"))

    def __call__(self, token: Array, dtype: str) -> Array:
        table = self.table[...]
        x: Any = look_up(table.shape[0], dtype, table, token)
        return x if self.factor == 1 else x * jnp.asarray(self.factor, dtype)


class Unembed(nnx.Module):
    """Output projection of models whose embedding is not tied to it, float32 [D, V]."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs, (c.embed, c.vocab), c.embed), axes=("embed", "vocab"))


class Head(nnx.Module):
    """hidden·w + b: a scalar for values and rewards, in float32; starts at zero."""

    def __init__(self, c: DecoderConfig):
        self.kernel = nnx.Param(jnp.zeros(c.embed, jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((), jnp.float32), axes=())

    def __call__(self, x: Array) -> Array:
        with exact("float32"):
            return x.astype(jnp.float32) @ self.kernel[...] + self.bias[...]


class Ends(nnx.Module):
    """What lies before and after the layers: embedding, last norm, output projection, head."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, head: bool):
        self.embed = Embed(c, rngs)
        self.norm = RMSNorm("embed", c.embed, c)
        self.tied = c.tied
        if not c.tied:
            self.unembed = Unembed(c, rngs)
        if head:
            self.head = Head(c)

    def logits(self, x: Array) -> Array:
        """Hidden states [..., D] → logits [..., V], float32."""
        return to_vocab(x, *self.projection())

    def projection(self) -> tuple[Array, int]:
        """The output projection, and which of its axes is D."""
        return (self.embed.table[...], 1) if self.tied else (self.unembed.kernel[...], 0)


# A scan's forward and backward loops share nothing as it is, so nothing must be kept from merging.
_again = functools.partial(jax.checkpoint, prevent_cse=False)

POLICIES: dict[Remat, Callable[[Any], Any]] = {
    "none": lambda layer: layer,
    "full": _again,
    "dots": functools.partial(
        _again, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}
"""``model.remat`` → a layer, the body of a scan over layers, that keeps no more than it says.

``none`` keeps every array that a gradient needs. ``full`` keeps the layer's input alone
(arXiv:1604.06174). ``dots`` keeps the products with weights too, so that the second forward pass is
norms, activations and attention weights, which are products of two arrays with rows.
"""
