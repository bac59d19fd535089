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
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, RouterSums
from jaxrlhf.mesh.sharding import Rules, platform, row_shards, spec
from jaxrlhf.models.grouped import grouped
from jaxrlhf.models.layers import Linear, exact, gated, normal, rooted
from jaxrlhf.models.quantise import in_dtype, is_quantised, laid, made
from jaxrlhf.models.remat import COSTLY


class Routed(NamedTuple):
    """Of each token, the experts that it takes."""

    expert: Array
    """int32 [..., k]."""
    weight: Array
    """float32 [..., k]."""
    logits: Array
    """float32 [..., E], the router's."""


def added_up(routed: Routed, mask_BT: Array) -> RouterSums:
    """What a layer's router says of real tokens [B, T], where the mask is not 0."""
    real_BT = (mask_BT != 0).astype(jnp.float32)
    count, each = routed.logits.shape[-1], routed.expert.shape[-1]
    total_BT = jax.nn.logsumexp(routed.logits, axis=-1)
    log_chance = routed.logits - total_BT[..., None]
    chance = jnp.exp(log_chance)
    taken = jnp.repeat(real_BT.reshape(-1), each)
    return RouterSums(
        chosen_LE=jnp.zeros(count).at[routed.expert.reshape(-1)].add(taken),
        chance_LE=(chance * real_BT[..., None]).sum((0, 1)),
        square_L=(total_BT**2 * real_BT).sum(),
        entropy_L=-((chance * log_chance).sum(-1) * real_BT).sum(),
        tokens=real_BT.sum(),
    )


class Expert(nnx.Module):
    """One linear map of each expert, [E, in, out], with a bias or without."""

    def __init__(
        self, experts: int, ins: dict[str, int], outs: dict[str, int], rngs: nnx.Rngs, bias: bool
    ):
        shape = (experts, *ins.values(), *outs.values())
        inputs = next(iter(ins.values()))
        self.kernel = nnx.Param(normal(rngs, shape, inputs), axes=("experts", *ins, *outs))
        if bias:
            zeros = jnp.zeros((experts, *outs.values()), jnp.float32)
            self.bias = nnx.Param(zeros, axes=("experts", *outs))

    def read(self, dtype: Any) -> tuple[Any, Array | None]:
        """Kernel, as it is if it is quantised, and bias if there is one, in a compute dtype."""
        bias = self.bias[...].astype(dtype) if hasattr(self, "bias") else None
        return in_dtype(self.kernel.get_value(), dtype), bias


Maps = tuple[tuple[Any, Array | None], ...]
"""Kernel and bias of each of gate, up and down."""


class Experts(nnx.Module):
    """Σ_i w_i · down_i(act(gate_i(x)) · up_i(x)) over the k experts that a token takes
    (arXiv:1701.06538)."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, lora: LoraConfig | None):
        assert c.moe is not None
        # Beside experts they are of the MLP.
        own = set() if c.moe.beside else {"gate", "up", "down"}
        if lora and (names := own & set(lora.targets)):
            raise InputError(
                f"model.lora.targets: {', '.join(sorted(names))}: experts take no adapters: give "
                "[q, k, v, o]"
            )
        self.moe, self.activation = c.moe, c.activation
        embed, hidden = {"expert_embed": c.embed}, {"mlp": c.mlp}
        count, bias = c.moe.experts, c.mlp_bias
        self.router = Linear("router", {"embed": c.embed}, {"router": count}, rngs, None, bias)
        if c.moe.beside:
            self.eps = c.norm_eps
            self.router_scale = nnx.Param(jnp.ones(c.embed, jnp.float32), axes=("embed",))
            self.expert_scale = nnx.Param(jnp.ones(count, jnp.float32), axes=("router",))
        self.gate = Expert(count, embed, hidden, rngs, bias)
        self.up = Expert(count, embed, hidden, rngs, bias)
        self.down = Expert(count, hidden, embed, rngs, bias)

    def route(self, x: Array, replayed: Array | None = None) -> Routed:
        """The k likeliest experts of softmax(x·W), or those that are to be taken again, with their
        probabilities, which are made to add up to 1 where ``moe.normalise`` says so.

        With ``moe.beside`` it is softmax((x / rms x · scale / √D)·W), and each probability is then
        multiplied by its expert's number.
        """
        if hasattr(self, "router_scale"):
            size = x.shape[-1] ** -0.5
            x = rooted(x, self.eps) * self.router_scale[...].astype(x.dtype) * size
        logits = self.router(x).astype(jnp.float32)
        chance = jax.nn.softmax(logits, axis=-1)
        weight, expert = jax.lax.top_k(chance, self.moe.per_token)
        if replayed is not None:
            expert = jnp.where(replayed < self.moe.experts, replayed.astype(jnp.int32), expert)
            weight = jnp.take_along_axis(chance, expert, axis=-1)
        if self.moe.normalise:
            weight /= weight.sum(-1, keepdims=True)
        if hasattr(self, "expert_scale"):
            weight *= self.expert_scale[...].astype(jnp.float32)[expert]
        return Routed(expert, weight, logits)

    def __call__(
        self,
        x: Array,
        rules: Rules,
        replayed: Array | None = None,
        routing: Array | None = None,
    ) -> tuple[Array, Routed]:
        """x [B, T, D] → [B, T, D], and how it was routed.

        ``replayed`` are the experts [B, T, k] that tokens are to take; see ``replay``; ``routing``
        is what the router reads, if that is not x.
        """
        parts = self.gate, self.up, self.down
        maps = tuple(part.read(x.dtype) for part in parts)
        routed = self.route(x if routing is None else routing, replayed)
        expert, weight, where = routed.expert, routed.weight, platform()
        if jax.sharding.get_abstract_mesh().empty:
            return self._some(x, expert, weight, maps, first=0, where=where), routed
        rows = spec(("batch", "length", None), rules)
        inner, outer = (
            (spec(("experts", *kernel), rules), None if bias is None else spec(end, rules))
            for kernel, end, bias in (
                ((None, "mlp"), ("experts", "mlp"), maps[0][1]),
                (("mlp", None), ("experts", None), maps[2][1]),
            )
        )
        split = inner, inner, outer
        placed = [_placed(*item, x.dtype) for item in zip(maps, split, strict=True)]
        maps, split = (tuple(part) for part in zip(*placed, strict=True))
        mapped = jax.shard_map(
            partial(self._on_device, where),
            in_specs=(rows, rows, rows, split),
            out_specs=rows,
            check_vma=False,
        )
        lacks = -x.shape[0] % row_shards(rules)
        given = (jnp.pad(y, ((0, lacks), (0, 0), (0, 0))) for y in (x, expert, weight))
        every, expert, weight = given
        return mapped(every, expert, weight, maps)[: x.shape[0]], routed

    def _on_device(self, where: str, x: Array, expert: Array, weight: Array, maps: Maps) -> Array:
        """A device's rows: what all experts add to them, those of other devices too."""
        given = (jax.lax.all_gather(y, "expert", axis=0, tiled=True) for y in (x, expert, weight))
        x, expert, weight = given
        gate, up, (down, bias) = maps
        first = jax.lax.axis_index("expert") * down.shape[0]
        if bias is not None:  # of sums over the devices it is a part once
            bias = jnp.where(jax.lax.axis_index("tensor") == 0, bias, 0)
        maps = gate, up, (down, bias)
        added = self._some(x, expert, weight, maps, first=first, where=where)
        # Of the hidden axis a device has its share, as of any MLP.
        added = jax.lax.psum(added, "tensor")
        return jax.lax.psum_scatter(added, "expert", scatter_dimension=0, tiled=True)

    def _some(
        self,
        x: Array,
        expert: Array,
        weight: Array,
        maps: Maps,
        first: Any,
        where: str,
    ) -> Array:
        """What the experts ``first`` … first + E − 1, whose weights are given, add to tokens."""
        gate, up, down = maps
        count, chosen = gate[0].shape[0], expert.shape[-1]
        tokens = x.reshape(-1, x.shape[-1])
        number = expert.reshape(-1) - first
        number = jnp.where((number >= 0) & (number < count), number, count)
        order = jnp.argsort(number, stable=True)
        sizes = jnp.bincount(number, length=count + 1)[:count].astype(jnp.int32)

        def product(rows: Array, kernel: Any, bias: Array | None) -> Array:
            # Rows after the last group are those of other devices' experts; of them it makes zeros.
            expected = -(-len(rows) * count // self.moe.experts)
            y = checkpoint_name(grouped(where, rows, kernel, sizes, expected), COSTLY)
            if bias is None:
                return y
            # In float32, in which its gradient is then a sum over the rows of an expert.
            each = bias.astype(jnp.float32).at[number[order]]
            added = each.get(mode="fill", fill_value=0, indices_are_sorted=True)
            return (y + added).astype(rows.dtype)

        rows = tokens[order // chosen]
        wide = gated(self.activation, product(rows, *gate), product(rows, *up))
        # Each token's own, side by side again: taken, not added up, so that no order matters.
        back = product(wide, *down)[jnp.argsort(order)].reshape(len(tokens), chosen, -1)
        with exact(x.dtype):
            share = weight.reshape(len(tokens), chosen).astype(x.dtype)
            added = jnp.einsum("mk,mkd->md", share, back, preferred_element_type=jnp.float32)
        return added.astype(x.dtype).reshape(x.shape)


def _placed(maps: tuple[Any, Any], split: tuple[Any, Any], dtype: Any) -> tuple[Any, Any]:
    """Kernel and bias, and how a device gets its pieces of them; what is quantised is made first
    if a tile of it would be cut."""
    (kernel, bias), (where, end) = maps, split
    if not is_quantised(kernel):
        return maps, split
    mesh = jax.sharding.get_abstract_mesh()
    parts = jax.tree.map(lambda x: x.spec, laid(NamedSharding(mesh, where), kernel))
    scales = zip(where, parts.scale, kernel.scale.shape, strict=True)
    if any(wanted != found and size > 1 for wanted, found, size in scales):
        return (made(kernel, dtype), bias), split
    return (kernel, bias), (parts, end)
