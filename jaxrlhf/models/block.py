"""A layer of the decoder: attention and MLP, and how they are added to what goes through."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import Rules, constrain
from jaxrlhf.models.experts import Experts, Routed
from jaxrlhf.models.layers import ACTIVATIONS, MLP, Attention, Linear, Norm
from jaxrlhf.models.rope import Angles


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream.

    ``serial``, with the norms that ``norms`` says: x += n(attention(n(x))); x += n(mlp(n(x))).
    Otherwise both read the same: x += attention(n(x)) + mlp(n(x)). With ``layer_embed`` it then
    reads its own embedding e, x += n(out(act(gate(x)) · e)); with ``layer_scale`` x is at last
    multiplied by a number.
    """

    def __init__(
        self,
        c: DecoderConfig,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
        fused: bool = False,
    ):
        self.serial, self.multiplier = c.block == "serial", c.residual_multiplier
        embed = {"embed": c.embed}
        self.attention = Attention(c, rngs, lora, fused)
        if c.moe and c.moe.beside:
            self.mlp = MLP(replace(c, mlp=c.moe.beside), rngs, lora, fused)
            self.experts = Experts(c, rngs, lora)
            self.experts_norm = Norm(embed, c)
            self.experts_out_norm, self.beside_norm = Norm(embed, c), Norm(embed, c)
        else:
            self.mlp = Experts(c, rngs, lora) if c.moe else MLP(c, rngs, lora, fused)
        if c.norms != "after":
            self.attention_norm = Norm(embed, c)
            if c.block != "one_norm":
                self.mlp_norm = Norm(embed, c)
        if c.norms != "before":
            self.attention_out_norm = Norm(embed, c)
            self.mlp_out_norm = Norm(embed, c)
        if c.layer_embed:
            # No adapters: they are small.
            own, self.activation = {"layer_embed": c.layer_embed}, c.activation
            self.own_gate = Linear("own_gate", embed, own, rngs, None)
            self.own_out = Linear("own_out", own, embed, rngs, None)
            self.own_norm = Norm(embed, c)
        if c.layer_scale:
            self.layer_scale = nnx.Param(jnp.ones((), jnp.float32), axes=())

    def __call__(
        self,
        x: Array,
        angles: Angles | None,
        rules: Rules,
        attend: Callable[[Array, Any, Any, Array | None], tuple[Array, Any]],
        replayed: Array | None = None,
        own: Array | None = None,
    ) -> tuple[Array, Any, Routed | None]:
        """x [B, T, D] → the next block's x, what ``attend`` has to remember, and how a mixture of
        experts has routed x.

        Args:
          attend: query [B, T, N, H], key and value [B, T, K, H], and the heads' sinks [N] or None
            → what the queries see [B, T, N, H], and keys and values to be kept, if any. Key and
            value are None of layers that share those of others.
          replayed: of a mixture, the experts [B, T, k] that tokens are to take; see ``replay``.
          own: of ``layer_embed``, what this layer reads of the tokens beside x, [B, T, P].
        """

        def normed(name: str, x: Array) -> Array:
            return getattr(self, name)(x) if hasattr(self, name) else x

        def plus(x: Array, change: Array) -> Array:
            return x + (change if self.multiplier == 1 else self.multiplier * change)

        read = normed("attention_norm", x)
        mixed, kept = attend(*self.attention.project(read, angles, rules), self.attention.sink())
        change = normed("attention_out_norm", self.attention.o(mixed))
        if self.serial:
            x = plus(x, change)
            added, routed = self.mlp(normed("mlp_norm", x), rules, replayed)
            if hasattr(self, "experts"):
                some, routed = self.experts(self.experts_norm(x), rules, replayed, routing=x)
                added = self.beside_norm(added) + self.experts_out_norm(some)
            x = plus(x, normed("mlp_out_norm", added))
        else:
            other = normed("mlp_norm", x) if hasattr(self, "mlp_norm") else read
            added, routed = self.mlp(other, rules, replayed)
            x = plus(x, change + added)
        if hasattr(self, "own_gate"):
            gate = ACTIVATIONS[self.activation](self.own_gate(x))
            x += self.own_norm(self.own_out(gate * own))
        if hasattr(self, "layer_scale"):
            # As in transformers, where it is a buffer: a number that the weights go with.
            x *= jax.lax.stop_gradient(self.layer_scale[...]).astype(x.dtype)
        return constrain(x, ("batch", "length", "activation"), rules), kept, routed
