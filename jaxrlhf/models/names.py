"""Every weight of a decoder: its place in the tree, its shape, and its names in files.

The tree is a nested dict; leaves under ``layers`` are stacked over a leading layer axis. Files
hold one tensor a layer, and linear maps as [out, in] (``y = W x``), where the tree holds
``x @ kernel`` with heads as axes of their own: stored = kernel.reshape(in, out).T.
"""

import os
from collections.abc import Callable, Iterator
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


def weights(decoder: DecoderConfig, head: bool = False) -> list[Weight]:
    """The weights that ``decoder`` has, in the order of the computation; with ``head``, the scalar
    head's too, but for its bias, for which files have no place."""
    D, F, V, H = (decoder.embed,), (decoder.mlp,), (decoder.vocab,), (decoder.head_dim,)
    N, K = (decoder.heads, *H), (decoder.kv_heads, *H)
    attention, mlp = "layers/attention", "layers/mlp"
    # Path, axes of input (none: added or multiplied in place) and output, names in files, if any.
    rows: list[tuple[str, tuple[int, ...], tuple[int, ...], str, str, bool]] = [
        ("embed/table", V, D, "model.embed_tokens", "token_embd", True),
        ("layers/attention_norm/scale", (), D, "input_layernorm", "attn_norm", True),
    ]
    for x, out in (("q", N), ("k", K), ("v", K)):
        names = f"self_attn.{x}_proj", f"attn_{x}"
        rows += [
            (f"{attention}/{x}/kernel", D, out, *names, True),
            (f"{attention}/{x}/bias", (), out, *names, decoder.qkv_bias),
        ]
    rows += [
        (f"{attention}/o/kernel", N, D, "self_attn.o_proj", "attn_output", True),
        (f"{attention}/q_norm/scale", (), H, "self_attn.q_norm", "attn_q_norm", decoder.qk_norm),
        (f"{attention}/k_norm/scale", (), H, "self_attn.k_norm", "attn_k_norm", decoder.qk_norm),
        ("layers/mlp_norm/scale", (), D, "post_attention_layernorm", "ffn_norm", True),
        (f"{mlp}/gate/kernel", D, F, "mlp.gate_proj", "ffn_gate", True),
        (f"{mlp}/up/kernel", D, F, "mlp.up_proj", "ffn_up", True),
        (f"{mlp}/down/kernel", F, D, "mlp.down_proj", "ffn_down", True),
        ("norm/scale", (), D, "model.norm", "output_norm", True),
        ("unembed/kernel", D, V, "lm_head", "output", not decoder.tied),
        ("head/kernel", D, (), "score", "cls.output", head),
    ]
    return [
        _weight(path, ins, outs, (hf, gguf)) for path, ins, outs, hf, gguf, there in rows if there
    ]


def _weight(
    path: str, inputs: tuple[int, ...], outputs: tuple[int, ...], files: tuple[str, str]
) -> Weight:
    stored = (prod(outputs), prod(inputs)) if inputs else (prod(outputs),)
    if path == "embed/table":  # rows are looked up, not multiplied: the same way round in files
        stored = inputs + outputs
    kind = "bias" if path.endswith("bias") else "weight"
    layer = ("model.layers.{}.", "blk.{}.") if path.startswith("layers/") else ("", "")
    hf, gguf = (f"{layer[i]}{files[i]}.{kind}" for i in range(2))
    return Weight(path, inputs + outputs, stored, hf, gguf)


def tensors(decoder: DecoderConfig, head: bool = False) -> list[tuple[Weight, int]]:
    """What files hold, a tensor each: weight and layer (0 where there is none)."""
    return [
        (weight, layer)
        for weight in weights(decoder, head)
        for layer in range(decoder.layers if weight.stacked else 1)
    ]


def assemble(
    decoder: DecoderConfig, read: Callable[[Weight, int], np.ndarray], head: bool = False
) -> dict[str, Any]:
    """The tree of float32 arrays, filled tensor by tensor: one copy of the model in memory.

    Args:
      read: called with each of ``tensors``, from several threads at once; returns it in the shape
        ``weight.stored``, of any float dtype.
    """
    # Empty, not zeros: each number is written once, and pages are not touched before.
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

    with ThreadPool(READERS) as pool:  # of daemons: an error elsewhere does not wait for them
        pool.starmap(fill, tensors(decoder, head), chunksize=1)

    params: dict[str, Any] = {}
    for weight, array in arrays.items():
        *parents, name = weight.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = array if weight.stacked else array[0]
    return params


def stored(leaves: dict[str, Any], weight: Weight, layer: int) -> np.ndarray:
    """One of ``tensors``, as files hold it, out of what ``flatten`` returns; may be a view."""
    array = np.asarray(leaves[weight.path][layer] if weight.stacked else leaves[weight.path])
    if weight.path.endswith("kernel"):
        return array.reshape(weight.stored[::-1]).T
    return array.reshape(weight.stored)


def flatten(decoder: DecoderConfig, params: Any, head: bool = False) -> dict[str, Any]:
    """The leaves of ``params`` by path; ``head`` as of ``weights``.

    Raises:
      InputError: if names or shapes are not those of ``decoder``; names the first difference.
    """
    leaves = dict(_leaves(params))
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


def _leaves(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, child in node.items():
        if isinstance(child, dict):
            yield from _leaves(child, f"{path}{key}/")
        else:
            yield path + key, child
