"""Every weight of a decoder: its place in the tree, its shape, and where files have it.

The tree is a nested dict; leaves under ``layers`` are stacked over a leading layer axis, of layers
of several shapes each shape's own (``stacks``). Files hold linear maps as [out, in] (``y = W x``),
where the tree holds ``x @ kernel`` with heads as axes of their own: stored = kernel.reshape(in,
out).T. What a tensor of a file is called, and which of a layer's weights stand in it, is a
``Naming``.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.models.stacks import Stack, stacks


class Weight(NamedTuple):
    """One leaf of the tree."""

    path: str
    """Keys from the root, joined by "/"."""
    shape: tuple[int, ...]
    """In the tree, of one layer."""
    stored: tuple[int, ...]
    """In files."""
    experts: int = 0
    """Of a mixture: so many of this shape, stacked; most files have each apart."""
    layers: tuple[int, ...] = ()
    """The model's layers that it is stacked over; none of what lies outside of them."""
    within: str = ""
    """What its path begins with, if it is of layers."""

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape in the tree, of all experts."""
        return (self.experts, *self.shape) if self.experts else self.shape

    @property
    def full(self) -> tuple[int, ...]:
        """The shape in the tree, of all layers and experts."""
        return (len(self.layers), *self.whole) if self.layers else self.whole

    @property
    def stacked(self) -> bool:
        return bool(self.layers)

    @property
    def module(self) -> str:
        """What has a name in files: "attention/q" of "layers/attention/q/bias"."""
        path = self.leaf
        return path if path.startswith("embed/") else path.rpartition("/")[0]

    @property
    def leaf(self) -> str:
        """ "attention/q/bias" of "layers/attention/q/bias"."""
        return self.path.removeprefix(self.within)


def weights(c: DecoderConfig, head: bool = False) -> list[Weight]:
    """The weights that a decoder has, in the order of the computation; with ``head``, the scalar
    head's too, but for its bias, for which files have no place."""
    D, V = (c.embed,), (c.vocab,)
    found = [Weight("embed/table", V + D, V + D)]
    if c.positions == "learned":
        found.append(Weight("embed/place", (c.context, *D), (c.context, *D)))
    if c.layer_embed:
        wide = c.layers * c.layer_embed
        found.append(Weight("each_layer/table", (c.vocab, wide), (c.vocab, wide)))
        found += _linear("each_layer", D, (c.layers, c.layer_embed))
        found += _norm("each_norm", (c.layer_embed,), False)
    for stack in stacks(c):
        found += _of_layers(stack)
    found += _norm("norm", D, c.norm_bias)
    if not c.tied:
        found += _linear("unembed", D, V)
    if head:
        found += _linear("head", D, ())
    return found


def _norm(path: str, shape: tuple[int, ...], bias: bool) -> list[Weight]:
    return [Weight(f"{path}/{x}", shape, (prod(shape),)) for x in ("scale", "bias")[: 1 + bias]]


def _linear(
    path: str, ins: tuple[int, ...], outs: tuple[int, ...], bias: bool = False, experts: int = 0
) -> list[Weight]:
    found = [Weight(f"{path}/kernel", ins + outs, (prod(outs), prod(ins)), experts)]
    return found + [Weight(f"{path}/bias", outs, (prod(outs),), experts)] * bias


def _of_layers(stack: Stack) -> list[Weight]:
    """The weights of layers of one shape."""
    c = stack.decoder
    D, F, H = (c.embed,), (c.mlp,), (c.head_dim,)
    N, K = (c.heads, *H), (c.kv_heads, *H)
    before, after = c.norms != "after", c.norms != "before"
    found: list[Weight] = []

    def norm(path: str, shape: tuple[int, ...], there: bool, bias: bool = c.norm_bias) -> None:
        found.extend(_norm(path, shape, bias) if there else [])

    experts = c.moe.experts if c.moe else 0
    norm("attention_norm", D, before)
    own = 1 if c.shared_kv_layers else 2 if c.keys_are_values else 3
    for name, outs in (("q", N), ("k", K), ("v", K))[:own]:
        found += _linear(f"attention/{name}", D, outs, c.qkv_bias)
    found += _linear("attention/o", N, D, c.o_bias)
    if c.attention_sinks:
        found.append(Weight("attention/sinks", (c.heads,), (c.heads,)))
    for name, outs in (("q_norm", N), ("k_norm", K))[:own]:
        over = outs if c.qk_norm_all else H
        norm(f"attention/{name}", over, c.qk_norm or c.qk_norm_all, False)
    norm("attention_out_norm", D, after)
    norm("mlp_norm", D, before and c.block != "one_norm")

    def mlp(path: str, F: tuple[int, ...], experts: int) -> None:
        for name in ("gate", "up")[not c.gated :]:
            found.extend(_linear(f"{path}/{name}", D, F, c.mlp_bias, experts))
        found.extend(_linear(f"{path}/down", F, D, c.mlp_bias, experts))

    if c.moe and c.moe.beside:
        mlp("mlp", (c.moe.beside,), 0)
        norm("beside_norm", D, True)
        norm("experts_norm", D, True)
        found.append(Weight("experts/router_scale", D, D))
        found += _linear("experts/router", D, (experts,), c.mlp_bias)
        found.append(Weight("experts/expert_scale", (experts,), (experts,)))
        mlp("experts", F, experts)
        norm("experts_out_norm", D, True)
    else:
        found += _linear("mlp/router", D, (experts,), c.mlp_bias) if experts else []
        mlp("mlp", F, experts)
    norm("mlp_out_norm", D, after)
    if c.layer_embed:
        found += _linear("own_gate", D, (c.layer_embed,))
        found += _linear("own_out", (c.layer_embed,), D)
        norm("own_norm", D, True, False)
    if c.layer_scale:
        found.append(Weight("layer_scale", (), (1,)))
    within = stack.path
    return [w._replace(path=within + w.path, layers=stack.layers, within=within) for w in found]


class Naming(NamedTuple):
    """How files of a kind name weights, and lay them out."""

    layer: str
    """Before the names of a layer's; ``{}`` is its number."""
    names: Mapping[str, str]
    """``Weight.module`` → name, to which ".weight" or ".bias" is added, or ``Weight.leaf`` → the
    whole name; ``{}`` is an expert's number."""
    fused: Mapping[str, tuple[str, ...]] = {}
    """Name → the modules or leaves of a layer that stand in one tensor under it, one after the
    other."""
    by_head: bool = False
    """What is fused is so within each head (GPT-NeoX)."""
    transposed: bool = False
    """Linear maps of layers are [in, out] (GPT-2)."""
    neighbours: bool = False
    """Rotated pairs are (0, 1), (2, 3), … of a head, not (i, i + half) (GLM-4, GGUF)."""
    experts_as_one: bool = False
    """A layer's experts stand in one tensor, each [in, out]; what is fused in it takes turns, one
    output each (gpt-oss)."""
    experts_out_first: bool = False
    """Of these, each is [out, in], and what is fused in it stands one after the other (Gemma 4)."""
    left_out: tuple[str, ...] = ()
    """How names begin of tensors that are of other models in the same files: those that see or hear
    (Gemma 4)."""

    def turned(self, weight: Weight) -> bool:
        """Whether a linear map is [in, out]."""
        if self.as_one(weight):
            return not self.experts_out_first
        return self.transposed and weight.stacked

    def as_one(self, weight: Weight) -> bool:
        """Whether a weight is one of many in its tensor, as those of other experts are."""
        return self.experts_as_one and weight.experts > 0


class Tensor(NamedTuple):
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Weight, tuple[int, ...]], ...]
    """The weights in it, each with which of its layers it is of (0 where there is none), and its
    expert, if it is one's alone."""


def tensors(c: DecoderConfig, naming: Naming, head: bool = False) -> list[Tensor]:
    """What files hold, in the order of the computation."""
    together = {module: (name, them) for name, them in naming.fused.items() for module in them}
    found = weights(c, head)
    by_path = {weight.path: weight for weight in found}
    listed = []
    for weight in found:
        *_, leaf = weight.path.rpartition("/")
        module = weight.leaf if weight.leaf in {**naming.names, **together} else weight.module
        end = ".bias" if leaf == "bias" else ".weight"
        if module != weight.module:
            end = ""
        if module not in together:
            name, parts = naming.names[module], (weight,)
        else:
            name, modules = together[module]
            if module != modules[0]:
                continue
            paths = (f"{weight.within}{x}/{leaf}" if end else weight.within + x for x in modules)
            parts = tuple(by_path[path] for path in paths)
        shape = (sum(part.stored[0] for part in parts), *weight.stored[1:])
        shape = shape[::-1] if naming.turned(weight) else shape
        apart = weight.experts if not naming.as_one(weight) else 0
        shape = shape if apart or not weight.experts else (weight.experts, *shape)
        for number, layer in enumerate(weight.layers or (0,)):
            prefix = naming.layer.format(layer) if weight.stacked else ""
            for expert in range(apart or 1):
                place = (number, expert) if apart else (number,)
                each = tuple((part, place) for part in parts)
                listed.append(Tensor(f"{prefix}{name.format(expert)}{end}", shape, each))
    return listed


def cut(c: DecoderConfig, naming: Naming, tensor: Tensor, array: np.ndarray) -> list[np.ndarray]:
    """The weights of a tensor of a file, as ``Weight.stored``; views where that can be.

    Args:
      array: of one expert where the tensor is of all.
    """
    parts = [part for part, _ in tensor.parts]
    if naming.turned(parts[0]):
        array = array.T
    if len(parts) == 1:
        found = [array]
    elif naming.as_one(parts[0]) and not naming.experts_out_first:
        found = [array[i :: len(parts)] for i in range(len(parts))]
    elif naming.by_head:
        heads = array.reshape(c.heads, len(parts), -1, *array.shape[1:])
        found = [heads[:, i].reshape(part.stored) for i, part in enumerate(parts)]
    else:
        found = np.split(array, np.cumsum([part.stored[0] for part in parts])[:-1])
    if naming.neighbours:
        found = [pairs(c, *both, apart=True) for both in zip(parts, found, strict=True)]
    return found


def joined(c: DecoderConfig, naming: Naming, tensor: Tensor, found: list[np.ndarray]) -> np.ndarray:
    """The reverse of ``cut``."""
    parts = [part for part, _ in tensor.parts]
    if naming.neighbours:
        found = [pairs(c, *both, apart=False) for both in zip(parts, found, strict=True)]
    if len(parts) == 1:
        array = found[0]
    elif naming.as_one(parts[0]) and not naming.experts_out_first:
        array = np.stack(found, axis=1).reshape(-1, *found[0].shape[1:])
    elif naming.by_head:
        heads = [x.reshape(c.heads, 1, -1, *x.shape[1:]) for x in found]
        array = np.concatenate(heads, axis=1).reshape(-1, *found[0].shape[1:])
    else:
        array = np.concatenate(found)
    return array.T if naming.turned(parts[0]) else array


ROTATED = ("attention/q", "attention/k")
"""Modules whose outputs are rotated."""


def pairs(c: DecoderConfig, weight: Weight, array: np.ndarray, apart: bool) -> np.ndarray:
    """Rows of queries and keys with the pairs of a head's rotated numbers apart, half of them from
    each other, or else side by side; other weights as they are."""
    if weight.module not in ROTATED:
        return array
    head_dim = weight.shape[-1]
    size = c.rotary_dim or head_dim
    heads = array.reshape(-1, head_dim, *array.shape[1:])
    turned, rest = heads[:, :size], heads[:, size:]
    split = (size // 2, 2) if apart else (2, size // 2)
    turned = turned.reshape(-1, *split, *array.shape[1:]).swapaxes(1, 2)
    turned = turned.reshape(-1, size, *array.shape[1:])
    return np.concatenate([turned, rest], axis=1).reshape(array.shape)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree whose leaves, by path, are given."""
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return params


def stored(
    c: DecoderConfig, naming: Naming, leaves: Mapping[str, Any], tensor: Tensor
) -> np.ndarray:
    """One of ``tensors``, as files hold it, out of what ``flatten`` returns; may be a view."""

    def of(weight: Weight, at: tuple[int, ...]) -> np.ndarray:
        array = np.asarray(leaves[weight.path][at] if weight.stacked else leaves[weight.path])
        if weight.path.endswith("kernel"):
            return array.reshape(weight.stored[::-1]).T
        return array.reshape(weight.stored)

    def whole(*expert: int) -> np.ndarray:
        found = [of(weight, (*place, *expert)) for weight, place in tensor.parts]
        return joined(c, naming, tensor, found)

    first = tensor.parts[0][0]
    return np.stack([*map(whole, range(first.experts))]) if naming.as_one(first) else whole()


def flatten(c: DecoderConfig, params: Any, head: bool = False) -> dict[str, Any]:
    """The leaves of ``params`` by path; ``head`` as of ``weights``.

    Raises:
      InputError: if names or shapes are not those of the decoder; names the first difference.
    """
    leaves = dict(leaves_of(params))
    shapes = {w.path: w.full for w in weights(c, head)}
    for path in sorted(leaves.keys() | shapes.keys()):
        want = shapes.get(path)
        have = tuple(leaves[path].shape) if path in leaves else None
        if want != have:
            raise InputError(
                f"params: {path} is {have or 'missing'}, the decoder has {want or 'no such weight'}"
            )
    return leaves


def leaves_of(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree, each with its path: the inverse of ``nested``."""
    for key, child in node.items():
        if isinstance(child, dict):
            yield from leaves_of(child, f"{path}{key}/")
        else:
            yield path + key, child
