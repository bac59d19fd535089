"""Every weight of a decoder: its place in the tree, its shape, and its names in files.

The tree is a nested dict; leaves under ``layers`` are stacked over a leading layer axis. Files
hold one tensor a layer, and linear maps as [out, in] (``y = W x``), where the tree holds
``x @ kernel`` with heads as axes of their own: stored = kernel.reshape(in, out).T.
"""

import os
from collections.abc import Callable
from math import prod
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.core.errors import InputError

READERS = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Tensors that are read at once, each a copy in memory beside the model; a core is left to imports
and tracing, which go on meanwhile."""


class Weight(NamedTuple):
    """One leaf of the tree; ``{}`` in a file's name stands for the layer."""

    path: str
    """Keys from the root, joined by "/"."""
    shape: tuple[int, ...]
    """In the tree, of one layer."""
    stored: tuple[int, ...]
    """In files."""
    hf: str
    """Name in a Hugging Face checkpoint."""
    gguf: str
    """Name in a GGUF file of llama.cpp."""

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")


def _kernel(path: str, inputs: tuple[int, ...], outputs: tuple[int, ...], hf: str, gguf: str):
    return Weight(path, inputs + outputs, (prod(outputs), prod(inputs)), hf, gguf)


def _vector(path: str, shape: tuple[int, ...], hf: str, gguf: str) -> Weight:
    return Weight(path, shape, (prod(shape),), hf, gguf)


def _attention(decoder: DecoderConfig) -> list[Weight]:
    D, H = (decoder.embed,), (decoder.head_dim,)
    heads = {"q": (decoder.heads,), "k": (decoder.kv_heads,), "v": (decoder.kv_heads,)}
    tree, hf, gguf = "layers/attention", "model.layers.{}.self_attn", "blk.{}.attn"
    weights = []
    for x, N in heads.items():
        names = f"{hf}.{x}_proj", f"{gguf}_{x}"
        weights += [_kernel(f"{tree}/{x}/kernel", D, N + H, *(n + ".weight" for n in names))]
        if decoder.qkv_bias:
            weights += [_vector(f"{tree}/{x}/bias", N + H, *(n + ".bias" for n in names))]
    names = f"{hf}.o_proj.weight", f"{gguf}_output.weight"
    weights += [_kernel(f"{tree}/o/kernel", (decoder.heads, *H), D, *names)]
    if decoder.qk_norm:
        for x in ("q_norm", "k_norm"):
            names = f"{hf}.{x}.weight", f"{gguf}_{x}.weight"
            weights += [_vector(f"{tree}/{x}/scale", H, *names)]
    return weights


def weights(decoder: DecoderConfig, head: bool = False) -> list[Weight]:
    """The weights that ``decoder`` has, in the order of the computation; with ``head``, the scalar
    head's too, but for its bias, for which files have no place."""
    D, F, V = (decoder.embed,), (decoder.mlp,), (decoder.vocab,)
    layer, blk = "model.layers.{}", "blk.{}"
    table = Weight(
        "embed/table", V + D, V + D, "model.embed_tokens.weight", "token_embd.weight"
    )  # rows are looked up, not multiplied: the same way round in tree and files
    mlp = [("gate", D, F), ("up", D, F), ("down", F, D)]
    return [
        table,
        _vector("layers/attention_norm/scale", D, f"{layer}.input_layernorm.weight",
                f"{blk}.attn_norm.weight"),
        *_attention(decoder),
        _vector("layers/mlp_norm/scale", D, f"{layer}.post_attention_layernorm.weight",
                f"{blk}.ffn_norm.weight"),
        *(_kernel(f"layers/mlp/{x}/kernel", i, o, f"{layer}.mlp.{x}_proj.weight",
                  f"{blk}.ffn_{x}.weight") for x, i, o in mlp),
        _vector("norm/scale", D, "model.norm.weight", "output_norm.weight"),
        *([] if decoder.tied else
          [_kernel("unembed/kernel", D, V, "lm_head.weight", "output.weight")]),
        *([_kernel("head/kernel", D, (), "score.weight", "cls.output.weight")] if head else []),
    ]  # fmt: skip


def assemble(
    decoder: DecoderConfig, read: Callable[[Weight, int], np.ndarray], head: bool = False
) -> dict[str, Any]:
    """The tree of float32 arrays, filled tensor by tensor: one copy of the model in memory.

    Args:
      read: called with a weight and a layer (0 where there is none), from several threads at once;
        returns the tensor in the shape ``weight.stored``, of any float dtype.
    """
    arrays = {
        weight: np.empty((decoder.layers if weight.stacked else 1, *weight.shape), np.float32)
        for weight in weights(decoder, head)
    }

    def fill(weight: Weight, layer: int) -> None:
        tensor, place = read(weight, layer), arrays[weight][layer]
        if weight.path.endswith("kernel"):
            place.reshape(weight.stored[::-1])[...] = tensor.T
        else:
            place[...] = tensor.reshape(weight.shape)

    jobs = [(weight, layer) for weight, array in arrays.items() for layer in range(len(array))]
    with ThreadPool(READERS) as pool:  # of daemons: an error elsewhere does not wait for them
        pool.starmap(fill, jobs, chunksize=1)

    params: dict[str, Any] = {}
    for weight, array in arrays.items():
        *parents, name = weight.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = array if weight.stacked else array[0]
    return params


def stored(weight: Weight, array: Any) -> np.ndarray:
    """``array``, one layer's leaf as in the tree, turned to how files hold it (may be a view)."""
    if weight.path.endswith("kernel"):
        return np.asarray(array).reshape(weight.stored[::-1]).T
    return np.asarray(array).reshape(weight.stored)


def flatten(decoder: DecoderConfig, params: Any, head: bool = False) -> dict[str, Any]:
    """The leaves of ``params`` by path; ``head`` as of ``weights``.

    Raises:
      InputError: if names or shapes are not those of ``decoder``; names the first difference.
    """
    leaves: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if not isinstance(node, dict):
            leaves["/".join(path)] = node
            return
        for key, child in node.items():
            walk(child, (*path, key))

    walk(params, ())
    shapes = {
        w.path: (decoder.layers, *w.shape) if w.stacked else w.shape for w in weights(decoder, head)
    }
    for path in sorted(leaves.keys() | shapes.keys()):
        want = shapes.get(path)
        have = tuple(leaves[path].shape) if path in leaves else None
        if want != have:
            raise InputError(
                f"params: {path} is {have or 'missing'}, the decoder has {want or 'no such weight'}"
            )
    return leaves
