"""Low-rank adapters W + (alpha/rank)·A·B on the weights of a layer (arXiv:2106.09685).

The decoder block: weights with their axes, and what they compute. Flax NNX, nothing else.

Every module holds float32 weights with their logical axes as metadata and computes in the dtype of
its input. Einsum letters are the axis key of types.py.


What lies before and after the layers: weights with their axes, and what they compute.

What the backward pass keeps of each layer's forward pass, and what it computes again."""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import DecoderConfig, LoraConfig, RopeScaling
from jaxrlhf.config.model import Remat
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import DECODE, RULES, Rules, constrain
from jaxrlhf.models.attention import attend_before, attend_cached


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank(contract: int, x: Array, a: Array, b: Array) -> Array:
    """(x·A)·B, contracting the last ``contract`` axes of x.

    Its gradient is the usual one, but each product has its small factor on the left: XLA would
    otherwise transpose the large one, and fuse into that what made it, at a third of a step on CPU.
    """
    return jnp.tensordot(jnp.tensordot(x, a, contract), b, 1)


def _low_rank_forward(contract: int, x: Array, a: Array, b: Array) -> tuple[Array, Any]:
    low = jnp.tensordot(x, a, contract)
    return jnp.tensordot(low, b, 1), (x, a, b, low)


def _low_rank_backward(contract: int, saved: Any, dy: Array) -> tuple[Array, Array, Array]:
    x, a, b, low = saved
    rows = tuple(range(low.ndim - 1))
    outs = tuple(range(1, b.ndim))
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


class Linear(nnx.Module):
    """x·W (+ bias) (+ (alpha/rank)·x·A·B), contracting the last axes of x with the first of W."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        rngs: nnx.Rngs,
        bias: bool = False,
        lora: LoraConfig | None = None,
    ):
        ins, outs = tuple(inputs.values()), tuple(outputs.values())
        scale = math.prod(ins) ** -0.5
        self.contract = len(ins)
        self.lora_scale = lora.alpha / lora.rank if lora else 0.0

        def normal(shape: tuple[int, ...]) -> Array:
            return scale * jax.random.normal(rngs.params(), shape, jnp.float32)

        self.kernel = nnx.Param(normal(ins + outs), axes=(*inputs, *outputs))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outs, jnp.float32), axes=tuple(outputs))
        if lora:
            rank = lora.rank
            self.lora_a = nnx.Param(normal((*ins, rank)), axes=(*inputs, "rank"))
            self.lora_b = nnx.Param(jnp.zeros((rank, *outs), jnp.float32), axes=("rank", *outputs))

    def __call__(self, x: Array) -> Array:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), self.contract)
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
        count_BT -= jax.lax.cummax(jnp.where(starts, count_BT, 0), axis=1)
    return jnp.maximum(count_BT, 0)


def rotary_angles(position_BT: Array, config: DecoderConfig) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, H/2] of the rotary embedding (arXiv:2104.09864), float32."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        frequency = stretch(frequency, config.rope_scaling)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def stretch(frequency: Array, scaling: RopeScaling) -> Array:
    """Llama 3.1: low frequencies divided by ``factor``, high ones kept, a ramp in between."""
    turns = scaling.original_context * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (keep + (1 - keep) / scaling.factor)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotate the pairs (i, i + H/2) of the last axis of x [B, T, heads, H], in float32."""
    cos, sin = angles
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None):
        def adapter(name: str) -> LoraConfig | None:
            return lora if lora and name in lora.targets else None

        embed = {"embed": c.embed}
        query = {"heads": c.heads, "head_dim": c.head_dim}
        key = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        self.q = Linear(embed, query, rngs, c.qkv_bias, adapter("q"))
        self.k = Linear(embed, key, rngs, c.qkv_bias, adapter("k"))
        self.v = Linear(embed, key, rngs, c.qkv_bias, adapter("v"))
        self.o = Linear(query, embed, rngs, False, adapter("o"))
        if c.qk_norm:
            self.q_norm = RMSNorm("head_dim", c.head_dim, c)
            self.k_norm = RMSNorm("head_dim", c.head_dim, c)

    def project(
        self, x: Array, angles: tuple[Array, Array], rules: Rules
    ) -> tuple[Array, Array, Array]:
        """x [B, T, D] → query [B, T, N, H], key and value [B, T, K, H], rotated."""
        query, key, value = self.q(x), self.k(x), self.v(x)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query = constrain(query, ("batch", "length", "heads", "head_dim"), rules)
        key = constrain(key, ("batch", "length", "kv_heads", "head_dim"), rules)
        value = constrain(value, ("batch", "length", "kv_heads", "head_dim"), rules)
        return rotate(query, angles), rotate(key, angles), value


ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=True)}
"""``DecoderConfig.activation`` → the function; gelu by its tanh approximation."""


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) · up(x)) (arXiv:2002.05202)."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None):
        def adapter(name: str) -> LoraConfig | None:
            return lora if lora and name in lora.targets else None

        self.activation = c.activation
        embed, hidden = {"embed": c.embed}, {"mlp": c.mlp}
        self.gate = Linear(embed, hidden, rngs, lora=adapter("gate"))
        self.up = Linear(embed, hidden, rngs, lora=adapter("up"))
        self.down = Linear(hidden, embed, rngs, lora=adapter("down"))

    def __call__(self, x: Array, rules: Rules) -> Array:
        wide = ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        return self.down(constrain(wide, ("batch", "length", "mlp"), rules))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        self.attention_norm = RMSNorm("embed", c.embed, c)
        self.attention = Attention(c, rngs, lora)
        self.mlp_norm = RMSNorm("embed", c.embed, c)
        self.mlp = GatedMLP(c, rngs, lora)

    def whole(
        self, x: Array, angles: tuple[Array, Array], mask_BT: Array, segment_BT: Array | None
    ) -> Array:
        """The block over whole rows, x [B, T, D]."""
        query, key, value = self.attention.project(self.attention_norm(x), angles, RULES)
        mixed = attend_before(query, key, value, mask_BT, segment_BT)
        return self._feed_forward(x + self.attention.o(mixed), RULES)

    def cached(
        self,
        x: Array,
        angles: tuple[Array, Array],
        write: Callable[[Array, Array], Array],
        cache: tuple[Array, Array],
        slot_BT: Array,
        mask_BS: Array,
    ) -> tuple[Array, tuple[Array, Array]]:
        """The block over the next tokens of rows, and this layer's keys and values with theirs.

        Args:
          write: (cached, new) → cached, each row's entries in their slots.
          slot_BT: these slots.
          mask_BS: the cache's slots that hold real tokens, the new ones included.
        """
        query, key, value = self.attention.project(self.attention_norm(x), angles, DECODE)
        keys, values = write(cache[0], key), write(cache[1], value)
        mixed = attend_cached(query, keys, values, slot_BT, mask_BS)
        return self._feed_forward(x + self.attention.o(mixed), DECODE), (keys, values)

    def _feed_forward(self, x: Array, rules: Rules) -> Array:
        """The second half of the block: x + mlp(norm(x))."""
        x += self.mlp(self.mlp_norm(x), rules)
        return constrain(x, ("batch", "length", "activation"), rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(vocab: int, dtype: str, table: Array, token: Array) -> Array:
    """The rows of a float32 table [V, D] for tokens [B, T], rounded to ``dtype``: [B, T, D].

    Its gradient adds up in float32. In bfloat16 the thousands of a frequent token would not: a sum
    stops growing where what is added is less than a 256th of it.
    """
    return constrain(table.astype(dtype), ("vocab", None))[token]


def _look_up_forward(vocab: int, dtype: str, table: Array, token: Array) -> tuple[Array, Array]:
    return look_up(vocab, dtype, table, token), token


def _look_up_backward(vocab: int, dtype: str, token: Array, dx: Array) -> tuple[Array, None]:
    zeros = constrain(jnp.zeros((vocab, dx.shape[-1]), jnp.float32), ("vocab", None))
    return zeros.at[token].add(dx.astype(jnp.float32)), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Embed(nnx.Module):
    """Token embedding, float32 [V, D]; with ``embed_scale`` times √D, on its way in alone."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.factor = c.embed**0.5 if c.embed_scale else 1.0
        table = c.embed**-0.5 * jax.random.normal(rngs.params(), (c.vocab, c.embed), jnp.float32)
        self.table = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, token: Array, dtype: str) -> Array:
        table = self.table[...]
        x: Any = look_up(table.shape[0], dtype, table, token)
        return x if self.factor == 1 else x * jnp.asarray(self.factor, dtype)

    def logits(self, x: Array) -> Array:
        """x [..., D] · tableᵀ → [..., V], float32."""
        dims = (((x.ndim - 1,), (1,)), ((), ()))
        table = self.table[...].astype(x.dtype)
        return jax.lax.dot_general(x, table, dims, preferred_element_type=jnp.float32)


class Unembed(nnx.Module):
    """Output projection of models whose embedding is not tied to it, float32 [D, V]."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        kernel = c.embed**-0.5 * jax.random.normal(rngs.params(), (c.embed, c.vocab), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=("embed", "vocab"))

    def logits(self, x: Array) -> Array:
        """x [..., D] · W → [..., V], float32."""
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        kernel = self.kernel[...].astype(x.dtype)
        return jax.lax.dot_general(x, kernel, dims, preferred_element_type=jnp.float32)


class Head(nnx.Module):
    """hidden·w + b: a scalar for values and rewards, in float32; starts at zero."""

    def __init__(self, c: DecoderConfig):
        self.kernel = nnx.Param(jnp.zeros(c.embed, jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((), jnp.float32), axes=())

    def __call__(self, x: Array) -> Array:
        return x.astype(jnp.float32) @ self.kernel[...] + self.bias[...]


class Ends(nnx.Module):
    """What lies before and after the layers: embedding, last norm, output projection, head."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, head: bool):
        self.embed = Embed(c, rngs)
        self.norm = RMSNorm("embed", c.embed, c)
        if not c.tied:
            self.unembed = Unembed(c, rngs)
        if head:
            self.head = Head(c)

    def logits(self, x: Array) -> Array:
        """Hidden states [..., D] → logits [..., V], float32."""
        return (self.unembed if hasattr(self, "unembed") else self.embed).logits(x)


_again = partial(jax.checkpoint, prevent_cse=False)  # a scan's two loops share nothing as it is

POLICIES: dict[Remat, Callable[[Any], Any]] = {
    "none": lambda layer: layer,
    "full": _again,
    "dots": partial(_again, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
"""``model.remat`` → a layer, the body of a scan over layers, that keeps no more than it says.

``none`` keeps every array that a gradient needs. ``full`` keeps the layer's input alone
(arXiv:1604.06174). ``dots`` keeps the products with weights too, so that the second forward pass is
norms, activations and attention weights, which are products of two arrays with rows.
"""
