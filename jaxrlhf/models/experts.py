"""A mixture of experts: each token's MLP is a few of many, which a router chooses.

No token is dropped and none is padded to a capacity: tokens are sorted by expert, and a product
over groups of rows (``grouped``) multiplies each group with its own expert's weights.

On a mesh an ``expert`` axis splits the experts: a device has the tokens of all devices of that
axis, computes what its own experts add, and the sums go back to where the tokens are.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array
from jaxrlhf.mesh.sharding import Rules, platform, row_shards, spec
from jaxrlhf.models.grouped import grouped
from jaxrlhf.models.layers import ACTIVATIONS, Linear, exact, normal
from jaxrlhf.models.quantise import made


class Routed(NamedTuple):
    """Of each token, the experts that it takes."""

    expert: Array
    """int32 [..., k]."""
    weight: Array
    """float32 [..., k]."""


class Expert(nnx.Module):
    """One linear map of each expert, [E, in, out]."""

    def __init__(self, experts: int, ins: dict[str, int], outs: dict[str, int], rngs: nnx.Rngs):
        shape = (experts, *ins.values(), *outs.values())
        inputs = next(iter(ins.values()))
        self.kernel = nnx.Param(normal(rngs, shape, inputs), axes=("experts", *ins, *outs))


class Experts(nnx.Module):
    """Σ_i w_i · down_i(act(gate_i(x)) · up_i(x)) over the k experts that a token takes
    (arXiv:1701.06538)."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None):
        assert c.moe is not None
        if lora and (names := {"gate", "up", "down"} & set(lora.targets)):
            raise InputError(
                f"model.lora.targets: {', '.join(sorted(names))}: experts take no adapters: give "
                "[q, k, v, o]"
            )
        self.moe, self.activation = c.moe, c.activation
        embed, hidden = {"expert_embed": c.embed}, {"mlp": c.mlp}
        count = c.moe.experts
        self.router = Linear("router", {"embed": c.embed}, {"router": count}, rngs, None)
        self.gate = Expert(count, embed, hidden, rngs)
        self.up = Expert(count, embed, hidden, rngs)
        self.down = Expert(count, hidden, embed, rngs)

    def route(self, x: Array) -> Routed:
        """The k likeliest experts of softmax(x·W), with their probabilities, which are made to add
        up to 1 where ``moe.normalise`` says so."""
        chance = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        weight, expert = jax.lax.top_k(chance, self.moe.per_token)
        if self.moe.normalise:
            weight /= weight.sum(-1, keepdims=True)
        return Routed(expert, weight)

    def __call__(self, x: Array, rules: Rules) -> Array:
        """x [B, T, D] → [B, T, D]."""
        parts = self.gate, self.up, self.down
        kernels = [made(part.kernel.get_value(), x.dtype) for part in parts]
        given = (x, *self.route(x), *kernels)
        where = platform()
        if jax.sharding.get_abstract_mesh().empty:
            return self._some(*given, first=0, where=where)
        rows, inner, outer = (
            ("batch", "length", None),
            ("experts", None, "mlp"),
            ("experts", "mlp", None),
        )
        mapped = jax.shard_map(
            partial(self._on_device, where),
            in_specs=tuple(spec(axes, rules) for axes in (rows, rows, rows, inner, inner, outer)),
            out_specs=spec(rows, rules),
            check_vma=False,
        )
        lacks = -x.shape[0] % row_shards(rules)
        padded = (jnp.pad(y, ((0, lacks), (0, 0), (0, 0))) for y in given[:3])
        return mapped(*padded, *given[3:])[: x.shape[0]]

    def _on_device(
        self, where: str, x: Array, expert: Array, weight: Array, *kernels: Array
    ) -> Array:
        """A device's rows: what all experts add to them, those of other devices too."""
        every = (jax.lax.all_gather(y, "expert", axis=0, tiled=True) for y in (x, expert, weight))
        first = jax.lax.axis_index("expert") * kernels[0].shape[0]
        added = self._some(*every, *kernels, first=first, where=where)
        # Of the hidden axis a device has its share, as of any MLP.
        added = jax.lax.psum(added, "tensor")
        return jax.lax.psum_scatter(added, "expert", scatter_dimension=0, tiled=True)

    def _some(
        self,
        x: Array,
        expert: Array,
        weight: Array,
        gate: Array,
        up: Array,
        down: Array,
        first: Any,
        where: str,
    ) -> Array:
        """What the experts ``first`` … first + E − 1, whose weights are given, add to tokens."""
        count, chosen = gate.shape[0], expert.shape[-1]
        tokens = x.reshape(-1, x.shape[-1])
        number = expert.reshape(-1) - first
        number = jnp.where((number >= 0) & (number < count), number, count)
        order = jnp.argsort(number, stable=True)
        sizes = jnp.bincount(number, length=count + 1)[:count].astype(jnp.int32)

        def product(rows: Array, kernel: Array) -> Array:
            # Rows after the last group are those of other devices' experts; of them it makes zeros.
            expected = -(-len(rows) * count // self.moe.experts)
            return grouped(where, rows, kernel, sizes, expected)

        rows = tokens[order // chosen]
        wide = ACTIVATIONS[self.activation](product(rows, gate)) * product(rows, up)
        # Each token's own, side by side again: taken, not added up, so that no order matters.
        back = product(wide, down)[jnp.argsort(order)].reshape(len(tokens), chosen, -1)
        with exact(x.dtype):
            share = weight.reshape(len(tokens), chosen).astype(x.dtype)
            added = jnp.einsum("mk,mkd->md", share, back, preferred_element_type=jnp.float32)
        return added.astype(x.dtype).reshape(x.shape)
