"""The modules of the decoder: weights with their logical axes, and what they compute.

Every module holds float32 weights with their axes as metadata and computes in the dtype of its
input. Einsum letters are the axis key of core/types.py. From the inside out: linear maps with
low-rank adapters, norms, attention and MLP, and what lies before and after the blocks of both.
"""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import Rules, constrain, devices_in_mesh, platform
from jaxrlhf.models.attention import capped
from jaxrlhf.models.nibbles import Nibbles, times
from jaxrlhf.models.quantise import behind, in_dtype, is_quantised, made, no_slope
from jaxrlhf.models.rope import Angles, rotate
from jaxrlhf.models.turned import Turned, times_turned, turns


def exact(dtype: Any) -> AbstractContextManager[Any]:
    """Products that are traced inside have the precision of ``dtype`` on every device.

    Left to themselves GPUs multiply float32 arrays in TF32, with 10 bits of each number, and TPUs
    in bfloat16, with 7: log-probs of sampler and update would differ by as much. Of bfloat16 arrays
    nothing is changed: the product of two numbers is exact in float32, in which sums are taken.
    """
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if wide else nullcontext()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(contract: int, x: Array, w: Any) -> Array:
    """x·W, contracting the last ``contract`` axes of x with the first of W, which may be quantised.

    Its gradient is the usual one, but xᵀ·dy has x on the left: the other way round, as JAX would
    have it, XLA transposes dy and whatever made it, and then the result; on CPUs that is a tenth of
    a gradient (benchmarks/RESULTS.md). A quantised W is made anew for dx, and has no gradient; one
    whose outputs have a scale each is not made at all: x·W = (x·q)·scale, in which a GPU widens q
    on its way into the product, and no other form of W is ever in memory.
    """
    return _product_forward(contract, x, w)[0]


def _product_forward(contract: int, x: Array, w: Any) -> tuple[Array, Any]:
    if (scale := behind(contract, w)) is None:
        return jnp.tensordot(x, made(w, x.dtype), contract), (x, w)
    levels = w.qvalue.astype(x.dtype)
    # Whole numbers up to 127 are exact in bfloat16, so that it is the sum alone which is rounded.
    y = jnp.tensordot(x, levels, contract, preferred_element_type=jnp.float32)
    return (y * scale).astype(x.dtype), (x, w)


def _product_backward(contract: int, saved: Any, dy: Array) -> tuple[Array, Any]:
    x, w = saved
    rows, outs = tuple(range(x.ndim - contract)), tuple(range(contract, w.ndim))
    over = tuple(range(len(rows), dy.ndim)), outs
    with exact(x.dtype):
        if not is_quantised(w):
            if platform() == "cpu" and devices_in_mesh() == 1:
                return _of_matrices(contract, x, w, dy)
            dx = jnp.tensordot(dy, w.astype(x.dtype), over)
            return dx, jnp.tensordot(x, dy, (rows, rows))
        if (scale := behind(contract, w)) is None:
            return jnp.tensordot(dy, made(w, x.dtype), over), no_slope(w)
        scaled = (dy.astype(jnp.float32) * scale).astype(x.dtype)
        return jnp.tensordot(scaled, w.qvalue.astype(x.dtype), over), no_slope(w)


def _of_matrices(contract: int, x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
    """dy·Wᵀ and xᵀ·dy in the shapes of x and W, as products of two axes each. Of factors that have
    more, CPUs write a copy, turned around, before they multiply."""
    ins = math.prod(w.shape[:contract])
    x_RI, w_IO, dy_RO = (
        y.reshape(-1, n) for y, n in ((x, ins), (w, w.size // ins), (dy, w.size // ins))
    )
    dx = jnp.einsum("ro,io->ri", dy_RO, w_IO.astype(x.dtype)).reshape(x.shape)
    return dx, jnp.einsum("ri,ro->io", x_RI, dy_RO).reshape(w.shape)


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


def _apart(x: Array) -> Array:
    """x [B, T, …], and of one token a row as if nothing else read it.

    Products that read one x a GPU's compiler joins, W with A and q with k: it writes their weights
    beside each other first, which of a token at a time is most of what is moved.
    """
    return jax.lax.optimization_barrier(x) if x.shape[1] == 1 else x


def _mapped(contract: int, x: Array, w: Any) -> Array:
    """x·W of a kernel as it is, or laid out for decoding."""
    if isinstance(w, Nibbles):
        return times(x, w)
    return times_turned(x, w) if isinstance(w, Turned) else product(contract, x, w)


class Linear(nnx.Module):
    """x·W (+ bias) (+ lora.scale·x·A·B), contracting the last axes of x with the first of W.

    The last is a low-rank adapter (arXiv:2106.09685), if ``lora`` names the map as a target. Of
    DoRA all but the bias is multiplied by a gain an output (``dora.with_gains``).
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
            self.lora_scale, rank = lora.scale, lora.rank
            # B starts at zero, so that the adapter changes nothing at first.
            self.lora_a = nnx.Param(
                normal(rngs, (*ins, rank), math.prod(ins)), axes=(*inputs, "rank")
            )
            self.lora_b = nnx.Param(jnp.zeros((rank, *outs), jnp.float32), axes=("rank", *outputs))
            if lora.dora:
                self.lora_magnitude = nnx.Param(jnp.ones(outs, jnp.float32), axes=tuple(outputs))

    def __call__(self, x: Array) -> Array:
        x = _apart(x) if self.lora_scale else x
        w = in_dtype(self.kernel.get_value(), x.dtype)
        y: Any = _mapped(self.contract, x, w)
        if self.lora_scale:
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            change: Any = low_rank(self.contract, _apart(x), a, b)
            y += self.lora_scale * change
        if hasattr(self, "lora_magnitude"):
            y = (y * self.lora_magnitude[...]).astype(x.dtype)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class Norm(nnx.Module):
    """(x − μ) / √(mean (x − μ)² + eps) · scale (+ bias) over the last axes of x, in float32.

    ``norm: rms`` has μ = 0 (arXiv:1910.07467), ``layer`` the mean (arXiv:1607.06450). With
    ``norm_offset`` the scale is 1 + its parameter.
    """

    def __init__(self, axes: dict[str, int], c: DecoderConfig):
        self.eps, self.offset = c.norm_eps, float(c.norm_offset)
        self.over = tuple(range(-len(axes), 0))
        self.centred = c.norm == "layer"
        names, shape = tuple(axes), tuple(axes.values())
        self.scale = nnx.Param(jnp.full(shape, 1 - self.offset, jnp.float32), axes=names)
        if self.centred and c.norm_bias:
            self.bias = nnx.Param(jnp.zeros(shape, jnp.float32), axes=names)

    def __call__(self, x: Array) -> Array:
        # Squares of bfloat16 would lose the sum, so the norm is always taken in float32.
        wide = x.astype(jnp.float32)
        if self.centred:
            wide -= jnp.mean(wide, axis=self.over, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=self.over, keepdims=True) + self.eps)
        y = wide * inverse * (self.offset + self.scale[...].astype(jnp.float32))
        return (y + self.bias[...] if hasattr(self, "bias") else y).astype(x.dtype)


def rooted(x: Array, eps: float) -> Array:
    """x / √(mean x² + eps) over the last axis, in float32: ``Norm`` without a weight."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return (wide * inverse).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions."""

    def __init__(
        self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None, fused: bool = False
    ):
        embed = {"embed": c.embed}
        query = {"heads": c.heads, "head_dim": c.head_dim}
        key = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        self.keys_are_values, self.shares = c.keys_are_values, bool(c.shared_kv_layers)
        if fused and not self.shares:
            # Of each key head its queries, the key and the value: so it is split as heads are.
            group = c.heads // c.kv_heads + (1 if c.keys_are_values else 2)
            every = {"kv_heads": c.kv_heads, "group": group, "head_dim": c.head_dim}
            self.qkv = Linear("qkv", embed, every, rngs, None, c.qkv_bias)
        else:
            self.q = Linear("q", embed, query, rngs, lora, c.qkv_bias)
            if not self.shares:
                self.k = Linear("k", embed, key, rngs, lora, c.qkv_bias)
            if not (self.shares or c.keys_are_values):
                self.v = Linear("v", embed, key, rngs, lora, c.qkv_bias)
        self.o = Linear("o", query, embed, rngs, lora, c.o_bias)
        if c.qk_norm or c.qk_norm_all:
            each = {"head_dim": c.head_dim}
            self.q_norm = Norm(query if c.qk_norm_all else each, c)
            if not self.shares:
                self.k_norm = Norm(key if c.qk_norm_all else each, c)
        self.value_eps = c.norm_eps if c.value_norm else None
        if c.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros(c.heads, jnp.float32), axes=("heads",))

    def sink(self) -> Array | None:
        """The score of nothing that each head has, [N], if the decoder has them."""
        return self.sinks[...] if hasattr(self, "sinks") else None

    def project(
        self, x: Array, angles: Angles | None, rules: Rules
    ) -> tuple[Array, Array | None, Array | None]:
        """x [B, T, D] → query [B, T, N, H], key and value [B, T, K, H], rotated by ``angles``; of
        layers that share those of others the query alone."""
        if self.shares:
            query = self.q_norm(self.q(x)) if hasattr(self, "q_norm") else self.q(x)
            query = constrain(query, ("batch", "length", "heads", "head_dim"), rules)
            return query if angles is None else rotate(query, angles), None, None
        if hasattr(self, "qkv"):
            every, queries = self.qkv(x), -1 if self.keys_are_values else -2
            query, key, value = every[..., :queries, :], every[..., queries, :], every[..., -1, :]
            query = query.reshape(*x.shape[:-1], -1, key.shape[-1])
        else:
            query, key = self.q(x), self.k(x)
            value = key if self.keys_are_values else self.v(x)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        if self.value_eps is not None:
            value = rooted(value, self.value_eps)
        query = constrain(query, ("batch", "length", "heads", "head_dim"), rules)
        key, value = (
            constrain(y, ("batch", "length", "kv_heads", "head_dim"), rules) for y in (key, value)
        )
        if angles is None:
            return query, key, value
        return rotate(query, angles), rotate(key, angles), value


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
}
"""``DecoderConfig.activation`` → the function, but for clamped, which is of two arrays."""

CLAMP, SLOPE = 7.0, 1.702
"""gpt-oss's."""


def gated(activation: str, gate: Array, up: Array) -> Array:
    """act(gate) · up; see ``DecoderConfig.activation``."""
    if activation != "clamped":
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
    return gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x)) (arXiv:2002.05202), or down(act(up(x))) where it is not gated."""

    def __init__(
        self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None, fused: bool = False
    ):
        self.activation = c.activation
        embed, hidden = {"embed": c.embed}, {"mlp": c.mlp}
        if fused and c.gated:
            both = {"pair": 2, **hidden}
            self.gate_up = Linear("gate_up", embed, both, rngs, None, c.mlp_bias)
        else:
            if c.gated:
                self.gate = Linear("gate", embed, hidden, rngs, lora, c.mlp_bias)
            self.up = Linear("up", embed, hidden, rngs, lora, c.mlp_bias)
        self.down = Linear("down", hidden, embed, rngs, lora, c.mlp_bias)

    def __call__(self, x: Array, rules: Rules, _: Array | None = None) -> tuple[Array, None]:
        """x [B, T, D] → [B, T, D], and nothing in the place of how it was routed."""
        if hasattr(self, "gate_up"):
            both = self.gate_up(x)
            wide = gated(self.activation, both[..., 0, :], both[..., 1, :])
        elif hasattr(self, "gate"):
            wide = gated(self.activation, self.gate(x), self.up(x))
        else:
            wide = ACTIVATIONS[self.activation](self.up(x))
        return self.down(constrain(wide, ("batch", "length", "mlp"), rules)), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def look_up(size: int, axis: str, dtype: str, table: Array, index: Array) -> Array:
    """The rows of a float32 table [size, D], rounded to ``dtype``, for an index [B, T]: [B, T, D].

    Its gradient adds up in float32. In bfloat16 the thousands of a frequent token would not: a sum
    stops growing where what is added is less than a 256th of it.

    Args:
      axis: the logical axis that the table's rows are.
    """
    if table.dtype != dtype:  # rounded where it lies, so that half as much is sent
        table = constrain(table.astype(dtype), (axis, "embed"))
    # One that is laid out for decoding is whole already: cut, it would be sent again each token.
    return constrain(table, (axis, None))[index]


def _look_up_forward(
    size: int, axis: str, dtype: str, table: Array, index: Array
) -> tuple[Array, Array]:
    return look_up(size, axis, dtype, table, index), index


def _look_up_backward(
    size: int, axis: str, dtype: str, index: Array, dx: Array
) -> tuple[Array, None]:
    zeros = constrain(jnp.zeros((size, dx.shape[-1]), jnp.float32), (axis, None))
    return zeros.at[index].add(dx.astype(jnp.float32)), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def to_vocab(x: Array, weight: Any, axis: int) -> Array:
    """Logits: x [..., D] · a weight whose ``axis`` is D → [..., V], summed and given in float32."""
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    weight, wide = in_dtype(weight, x.dtype), jnp.float32
    with exact(x.dtype):
        if isinstance(weight, Turned):
            return times_turned(x, weight, wide)
        return jax.lax.dot_general(x, weight, dims, preferred_element_type=wide)


def shaped(logits: Array, scale: float, cap: float) -> Array:
    """Logits as a decoder gives them, of products with its projection: ``logit_scale``, then
    ``logit_softcap``."""
    return capped(logits if scale == 1 else scale * logits, cap)


class Embed(nnx.Module):
    """Token embedding, float32 [V, D], times ``embed_multiplier`` on its way in alone, and for
    ``positions: learned`` that of each place."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.factor = c.embed_multiplier
        self.table = nnx.Param(normal(rngs, (c.vocab, c.embed), c.embed), axes=("vocab", "embed"))
        if c.positions == "learned":
            place = normal(rngs, (c.context, c.embed), c.embed)
            self.place = nnx.Param(place, axes=("positions", "embed"))

    def __call__(self, token: Array, position: Array, dtype: str) -> Array:
        table = self.table[...]
        x: Any = look_up(table.shape[0], "vocab", dtype, table, token)
        x = x if self.factor == 1 else x * jnp.asarray(self.factor, dtype)
        if not hasattr(self, "place"):
            return x
        place = self.place[...]
        return x + look_up(place.shape[0], "positions", dtype, place, position)


class LayerEmbed(nnx.Module):
    """What each layer reads of a token beside what goes through, [B, T, L, P]: an embedding of its
    own, times √P, and what a linear map makes of the embedding that goes in.

    (n(x·W / √D) + table[token]·√P) / √2, where n is a norm, which lies beside it since it computes
    in float32.
    """

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.layers, self.size, self.embed = c.layers, c.layer_embed, c.embed
        wide = c.layers * c.layer_embed
        table = normal(rngs, (c.vocab, wide), c.layer_embed)
        self.table = nnx.Param(table, axes=("vocab", "embed"))
        kernel = normal(rngs, (c.embed, c.layers, c.layer_embed), c.embed)
        self.kernel = nnx.Param(kernel, axes=("embed", None, "layer_embed"))

    def __call__(self, x: Array, token: Array, norm: Norm) -> Array:
        table = self.table[...]
        own: Any = look_up(table.shape[0], "vocab", str(x.dtype), table, token)
        own = own.reshape(*token.shape, self.layers, self.size)
        own *= jnp.asarray(self.size**0.5, x.dtype)
        w = in_dtype(self.kernel.get_value(), x.dtype)
        with exact(x.dtype):
            made: Any = product(1, x, w)
        return (norm(made * self.embed**-0.5) + own) * 2**-0.5


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
        self.norm = Norm({"embed": c.embed}, c)
        self.tied, self.scale, self.cap = c.tied, c.logit_scale, c.logit_softcap
        if c.layer_embed:
            self.each_layer = LayerEmbed(c, rngs)
            self.each_norm = Norm({"layer_embed": c.layer_embed}, c)
        if not c.tied:
            self.unembed = Unembed(c, rngs)
        if head:
            self.head = Head(c)

    def beside(self, x: Array, token: Array) -> Array | None:
        """What each layer reads beside, [B, T, L, P], of embeddings [B, T, D]; None: nothing."""
        if not hasattr(self, "each_layer"):
            return None
        return self.each_layer(x, token, self.each_norm)

    def logits(self, x: Array) -> Array:
        """Hidden states [..., D] → logits [..., V], float32."""
        weight, axis = self.projection()
        if axis == 1 and turns():
            weight = Turned(weight, 1)
        return shaped(to_vocab(x, weight, axis), self.scale, self.cap)

    def projection(self) -> tuple[Any, int]:
        """The output projection, and which of its axes is D."""
        if self.tied:
            return self.embed.table[...], 1
        return self.unembed.kernel.get_value(), 0
