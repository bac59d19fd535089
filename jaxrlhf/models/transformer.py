"""One decoder for every family: a static description, and pure functions of its parameters.

``Model`` holds no arrays. Parameters are a nested dict of arrays, float32, or bfloat16 where
nothing trains them, whose ``layers`` are stacked along a leading axis and run under ``lax.scan``:

    {"embed": {"table"}, "layers": {...}, "norm": {"scale"}, "unembed"?: {"kernel"}, "head"?: {...}}

Of layers whose weights differ in shape ``layers`` is a dict of such stacks (``stacks``).

Adapters (LoRA) are a tree of their own beside it; with and without them is the same ``Model``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.config import DecoderConfig, LoraConfig
from jaxrlhf.config.model import AttentionKernel, Nf4Product, Remat
from jaxrlhf.core.types import Array, Params
from jaxrlhf.mesh.sharding import DECODE, RULES, constrain, platform, shards
from jaxrlhf.models.block import Block
from jaxrlhf.models.cache import KEPT
from jaxrlhf.models.declared import Declared, blocks, ends, fuse, fused
from jaxrlhf.models.dora import norms, with_gains, with_magnitudes
from jaxrlhf.models.experts import Routed, added_up
from jaxrlhf.models.kernels import attend_rows, choose_each, real_first, reorder
from jaxrlhf.models.layers import (
    Ends,
    adapters_of,
    exact,
)
from jaxrlhf.models.quantise import MAGNITUDE, any_quantised, in_dtype
from jaxrlhf.models.remat import COSTLY, POLICIES
from jaxrlhf.models.replay import by_layer, compact
from jaxrlhf.models.rope import angles_by_kind, kinds, positions
from jaxrlhf.models.stacks import Stack, apart, by_stack, stacks, together
from jaxrlhf.models.walk import Body, in_order, of_stack, walk

WIDE = ("norm", "head", "each_norm")
"""What of the parameters beside the layers computes in float32, and stays so."""


class Rows(NamedTuple):
    """Tokens as the layers look at them."""

    mask_BT: Array
    segment_BT: Array | None
    position_BT: Array
    in_place: Callable[[Array], Array]
    """Puts columns back where they were."""


class Kept(NamedTuple):
    """What a pass over whole rows leaves to those who go on with them."""

    key: Any
    """[L, B, K, T, H], laid out for decoding, like ``value``; of several stacks a dict of them."""
    value: Any
    expert: Array | None
    """[L, B, T, k], those that a mixture's tokens took; see ``replay``."""


def merge(left: Params, right: Params) -> Params:
    """Two nested dicts as one; a leaf that stands in both is taken from ``right``."""
    both = {k: merge(left[k], right[k]) for k in left if k in right and isinstance(left[k], dict)}
    return {**left, **right, **both}


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer: static and hashable, no arrays."""

    decoder: DecoderConfig
    dtype: str = "float32"
    """What the layers compute in; float32 or bfloat16."""
    lora: LoraConfig | None = None
    remat: Remat = "elementwise"
    attention: AttentionKernel = "auto"
    nf4_product: Nf4Product = "auto"

    @property
    def routes(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.decoder.moe is not None

    def init(self, key: Array, head: bool = False) -> Params:
        """Random float32 parameters; ``head`` adds the scalar head (zeros)."""
        outer, inner = jax.random.split(key)
        params = nnx.to_pure_dict(nnx.state(Ends(self.decoder, nnx.Rngs(outer), head)))
        keys = jax.random.split(inner, self.decoder.layers)

        def layers(stack: Stack) -> Params:
            def layer(key: Array) -> Params:
                return nnx.to_pure_dict(nnx.state(Block(stack.decoder, nnx.Rngs(key))))

            return jax.vmap(layer)(of_stack(stack, keys))

        return {**params, "layers": by_stack(self.decoder, layers)}

    def init_head(self, key: Array | None = None) -> Params:
        """A fresh scalar head: zeros for a critic; with a key, kernel ~ N(0, 1/(D+1)) for a reward
        model, whose trunk then learns from the first step (arXiv:2009.01325)."""
        size = self.decoder.embed
        kernel = jnp.zeros(size)
        if key is not None:
            kernel = (size + 1) ** -0.5 * jax.random.normal(key, (size,))
        return {"kernel": kernel, "bias": jnp.zeros(())}

    def init_lora(self, key: Array, params: Params | None = None) -> Params:
        """Fresh adapters, float32: A normal, B zero, so that they change nothing at first.

        Args:
          params: the weights that they are for, whose norms DoRA's magnitudes are; else not read.

        Raises:
          ValueError: DoRA, and no ``params``.
        """

        keys = jax.random.split(key, self.decoder.layers)

        def layers(stack: Stack) -> Params:
            def layer(key: Array) -> Params:
                module = Block(stack.decoder, nnx.Rngs(key), self.lora)
                return adapters_of(nnx.to_pure_dict(nnx.state(module)))

            # Mapped, not vmapped, which XLA would compile for 9 s in place of 1.
            return jax.lax.map(layer, of_stack(stack, keys))

        lora = by_stack(self.decoder, layers)
        if self.lora is None or not self.lora.dora:
            return lora
        if params is None:
            raise ValueError("init_lora: DoRA's magnitudes are the norms of weights: give params")
        return with_magnitudes(lora, params["layers"])

    def shapes(self, head: bool = False) -> Params:
        """The parameters as ShapeDtypeStructs."""
        return {**ends(self.decoder, head).shapes, "layers": self._layers(None).shapes}

    def lora_shapes(self) -> Params:
        """The adapters as ShapeDtypeStructs."""
        return adapters_of(self._layers(self.lora).shapes)

    def axes(self, head: bool = False) -> Any:
        """The parameters' logical axes: the same tree with tuples of names."""
        return {**ends(self.decoder, head).axes, "layers": self._layers(None).axes}

    def lora_axes(self) -> Any:
        """The adapters' logical axes."""
        return adapters_of(self._layers(self.lora).axes)

    def _layers(self, lora: LoraConfig | None) -> Declared:
        """All layers as they are declared, with or without adapters; each part of it in the form of
        ``params["layers"]``."""
        parts = zip(*(blocks(stack.decoder, lora) for stack in stacks(self.decoder)), strict=True)
        names = [stack.name for stack in stacks(self.decoder)]
        return Declared(*(together(dict(zip(names, part, strict=True))) for part in parts))

    def cast(self, params: Params) -> Params:
        """The parameters in the compute dtype, but for what is quantised; done once a step, master
        copies stay float32."""
        return in_dtype(params, self.dtype)

    def with_gains(self, layer: Params) -> Params:
        """A layer as its modules read it: of DoRA gains in place of magnitudes."""
        return with_gains(self.lora.scale, layer) if self.lora and self.lora.dora else layer

    def apply(
        self,
        params: Params,
        token_BT: Array,
        attention_mask_BT: Array,
        lora: Params | None = None,
        segment_BT: Array | None = None,
        keep: bool = False,
        routers: bool = False,
        expert_BTM: Array | None = None,
    ) -> tuple[Array, Any]:
        """Hidden states after the last norm, [B, T, D] in the compute dtype.

        Positions count real tokens, so padding on either side changes nothing. ``segment_BT`` may
        say which of several rows in one each token belongs to: they do not see each other, and
        positions start at 0 in each.

        Args:
          keep: also return what later tokens look at, ``Kept``.
          routers: of a mixture, also return what its routers say of real tokens, a ``RouterSums``.
          expert_BTM: of a mixture, the experts that tokens are to take; see ``replay``.

        Raises:
          ValueError: if ``params`` or ``lora`` is not the tree that this model declares; the
            first difference is named. Or if what only a mixture has is asked of another model.
        """
        for name, asked in {"routers=True": routers, "expert_BTM": expert_BTM is not None}.items():
            if asked and not self.routes:
                raise ValueError(f"{name}: the model is no mixture of experts")
        layers = params["layers"] if lora is None else merge(params["layers"], lora)
        adapted = self.lora if lora is not None else None
        check_tree(layers, self._layers(adapted).shapes, "layers")
        outer, c = self.outer(params), self.decoder
        chosen = choose_each(self.attention, c, self.dtype, segment_BT is not None)
        fuses = lora is None and not keep and _fuses(layers)
        columns = token_BT, attention_mask_BT, expert_BTM
        (token_BT, mask_BT, expert_BTM), in_place = _in_order("cudnn" in chosen.values(), columns)
        rows = Rows(mask_BT, segment_BT, positions(mask_BT, segment_BT), in_place)
        x = outer.embed(token_BT, rows.position_BT, self.dtype)
        own_L = _own(outer, x, token_BT)
        x = constrain(x, ("batch", "length", "activation"))
        bodies = {
            stack.name: self._body(stack, chosen[stack.name], rows, adapted, keep, routers, fuses)
            for stack in stacks(c)
        }
        # Cast at once for a gradient, which reads them again; what decodes has a copy already, and
        # is not to make another.
        layers = apart(c, layers if keep else self.cast(layers))
        expert_L = None if expert_BTM is None else by_layer(c, expert_BTM)
        which = {s.name: jnp.array(kinds(s.decoder).of_layer) for s in stacks(c)}
        items = {
            s.name: (layers[s.name], which[s.name], *of_stack(s, (expert_L, own_L)))
            for s in stacks(c)
        }
        with exact(self.dtype):
            (x, _), found = walk(c, bodies, (x, _unseen(c, x)), items)
        return in_place(outer.norm(x)), _left(c, found, keep)

    def _body(
        self,
        stack: Stack,
        kernel: AttentionKernel,
        rows: Rows,
        lora: LoraConfig | None,
        keep: bool,
        routers: bool,
        fuses: bool,
    ) -> Body:
        """A layer of a stack: ((x, keys and values that others look at), (weights, number of its
        kind, experts to take, its own embeddings)) → (the same of the next layer, what is left)."""
        c, angles = stack.decoder, angles_by_kind(rows.position_BT, stack.decoder)
        module = self._module(stack, lora, fuses)

        def layer(carry: tuple[Array, Seen], item: Any) -> tuple[tuple[Array, Seen], Any]:
            (x, others), (weights, which, replayed, own) = carry, item
            attend = functools.partial(_attend, kernel, c, which, rows, others.get(stack.reads))
            x, seen, routed = module(weights)(x, angles(which), RULES, attend, replayed, own)
            if stack.name in others:
                others = {**others, stack.name: seen}
            if keep:
                return (x, others), _kept(c, rows.in_place, seen, routed)
            return (x, others), added_up(routed, rows.mask_BT) if routers else None

        return POLICIES[self.remat](layer)

    def _module(
        self, stack: Stack, lora: LoraConfig | None, fuses: bool
    ) -> Callable[[Params], Any]:
        """A layer's weights → its module; see ``_fuses``."""
        if not fuses:
            graph = blocks(stack.decoder, lora).graph
            return lambda layer: nnx.merge(graph, self.with_gains(self.cast(layer)))
        together = fused(stack.decoder)

        def merged(layer: Params) -> Any:
            # Split as before: what is sent to the other devices is then one array.
            joined = jax.tree.map(constrain, fuse(self.cast(layer)), together.axes)
            return nnx.merge(together.graph, joined)

        return merged

    def logits(self, params: Params, hidden: Array) -> Array:
        """Logits [..., V] of hidden states [..., D], float32."""
        return self.outer(params).logits(hidden)

    def projection(self, params: Params) -> tuple[Array, int]:
        """The output projection, [D, V] or [V, D], and which of its axes is D."""
        return self.outer(params).projection()

    def scalar(self, params: Params, hidden: Array) -> Array:
        """The scalar head on hidden states [..., D] → [...], float32.

        Raises:
          ValueError: if the parameters hold no head.
        """
        if "head" not in params:
            raise ValueError("params hold no 'head': init(key, head=True), or load a reward model")
        return self.outer(params).head(hidden)

    def outer(self, params: Params) -> Any:
        """The module of what lies before and after the layers."""
        outer = {name: child for name, child in params.items() if name != "layers"}
        declared = ends(self.decoder, "head" in params)
        check_tree(outer, declared.shapes, "params")
        return nnx.merge(declared.graph, outer)


def _own(outer: Any, x: Array, token_BT: Array) -> Array | None:
    """What each layer reads beside its input, [L, B, T, P]; None: nothing."""
    own = outer.beside(x, token_BT)
    if own is None:
        return None
    return constrain(jnp.moveaxis(own, 2, 0), (None, "batch", "length", None))


Seen = dict[str, tuple[Array, Array]]
"""Keys and values [B, T, K, H] of the last layer so far of each stack that others look at."""


def _unseen(decoder: DecoderConfig, x: Array) -> Seen:
    """Before the first layer, whose input is x: zeros, which nothing looks at."""

    def none(c: DecoderConfig) -> Array:
        zeros = jnp.zeros((*x.shape[:2], c.kv_heads, c.head_dim), x.dtype)
        return constrain(zeros, ("batch", "length", "kv_heads", "head_dim"))

    read = {stack.reads for stack in stacks(decoder) if stack.reads}
    each = {stack.name: none(stack.decoder) for stack in stacks(decoder) if stack.name in read}
    return {name: (zeros, zeros) for name, zeros in each.items()}


def _left(decoder: DecoderConfig, found: dict[str, Any], keep: bool) -> Any:
    """What the layers of each stack have left, as ``apply`` returns it."""
    if keep:
        key, value = (together({name: kept[i] for name, kept in found.items()}) for i in (0, 1))
        return Kept(key, value, in_order(decoder, {n: kept.expert for n, kept in found.items()}))
    sums = in_order(decoder, found)
    return None if sums is None else sums.replace(tokens=sums.tokens[0])


def _fuses(layers: Params) -> bool:
    """Whether whole rows are read by fused layers: on GPUs that gather each layer's weights, where
    what is joined is a device's own part. If weights lie whole, that would copy all of them."""
    return platform() == "gpu" and shards("embed") > 1 and not any_quantised(layers)


def _in_order(
    first: bool, columns: tuple[Array, Array, Array | None]
) -> tuple[tuple[Array, Array, Array | None], Callable[[Array], Array]]:
    """(tokens, attention mask, experts) as kernels take them, and what puts columns back where they
    were.

    Args:
      first: real tokens are to stand first, as cuDNN wants them.
    """
    if not first:
        return columns, lambda x: x
    order_BT, back_BT = real_first(columns[1])
    return jax.tree.map(lambda x: reorder(x, order_BT), columns), lambda x: reorder(x, back_BT)


def _attend(
    kernel: AttentionKernel,
    decoder: DecoderConfig,
    which: Array,
    rows: Rows,
    others: tuple[Array, Array] | None,
    query: Array,
    key: Array | None,
    value: Array | None,
    sink_N: Array | None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """What queries see of whole rows; and the keys and values [B, T, K, H], if they are the layer's
    own.

    Args:
      others: those of another layer, which it looks at.
    """
    own = None
    if key is None or value is None:
        assert others is not None
        key, value = others
    else:
        own = key, value
    given = query, key, value, rows.mask_BT, rows.segment_BT, sink_N
    seen = attend_rows(kernel, decoder, which, *given)
    # What a kernel gives is kept already, with what its gradient needs beside it.
    return checkpoint_name(seen, COSTLY) if kernel == "pieces" else seen, own


def _kept(
    decoder: DecoderConfig,
    in_place: Callable[[Array], Array],
    seen: tuple[Array, Array] | None,
    routed: Routed | None,
) -> Kept:
    """``Kept`` of one layer, None in the place of keys and values that are not its own."""
    key, value = (
        (
            constrain(jnp.swapaxes(in_place(x), 1, 2), KEPT, DECODE)  # as decoding reads them
            for x in seen
        )
        if seen
        else (None, None)
    )
    expert = None if routed is None else in_place(compact(decoder, routed.expert))
    return Kept(key, value, expert)


def check_tree(params: Any, declared: Any, path: str) -> None:
    """Compare names and shapes, which ``nnx.merge`` does not, and name the first difference."""
    for name in [*declared, *params]:
        where = f"{path}.{name}"
        if name not in params:
            raise ValueError(f"{where} is missing; the model declares it")
        if name not in declared:
            raise ValueError(f"{where} is not a parameter of this model")
        if isinstance(declared[name], dict):
            check_tree(params[name], declared[name], where)
        elif params[name].shape != declared[name].shape:
            raise ValueError(
                f"{where} has shape {params[name].shape}, the model declares {declared[name].shape}"
            )


def add_adapter(model: Model, kernel: Array, adapter: Params) -> Array:
    """W + lora.scale·A·B of all layers, float32; of DoRA with outputs as long as its magnitudes."""
    assert model.lora is not None
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))
    with exact("float32"):
        change: Any = product(adapter["lora_a"], adapter["lora_b"])
    merged = kernel + model.lora.scale * change
    if not model.lora.dora:
        return merged
    contract = adapter["lora_a"].ndim - 2
    gain = adapter[MAGNITUDE] / norms(merged, contract, first=1)
    return merged * jnp.expand_dims(gain, range(1, 1 + contract))


def merge_lora(model: Model, params: Params, lora: Params) -> Params:
    """The weights with the adapters added in; what they change is float32."""

    def add(weights: Params, adapters: Params) -> Params:
        if "lora_a" in adapters:
            return {**weights, "kernel": add_adapter(model, weights["kernel"], adapters)}
        return {**weights, **{name: add(weights[name], child) for name, child in adapters.items()}}

    return {**params, "layers": add(params["layers"], lora)}


def combine_params(params: Params, frozen: Params | None) -> tuple[Params, Params | None]:
    """What a network is called with: (weights, adapters).

    Full fine-tuning trains the weights themselves; with LoRA, ``params`` is
    ``{"lora": adapters, "head"?: …}`` and ``frozen`` the weights.
    """
    if "lora" not in params:
        return params, None
    if frozen is None:
        raise ValueError("adapters need the frozen weights: update(state, batch, frozen)")
    rest = {name: child for name, child in params.items() if name != "lora"}
    return {**frozen, **rest}, params["lora"]
