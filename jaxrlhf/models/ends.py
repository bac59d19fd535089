"""What lies before and after the layers: weights with their axes, and what they compute."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import DecoderConfig
from jaxrlhf.models.layers import RMSNorm
from jaxrlhf.sharding import constrain
from jaxrlhf.types import Array


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
