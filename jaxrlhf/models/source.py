"""Weights where they lie, read a part at a time: what a device is to hold, and never a whole model.

A file holds a tensor a layer; a leaf of the tree is stacked over layers and may be split over
devices. So of each leaf the parts that are wanted are filled from the same parts of its tensors.
Without JAX, whose import takes as long as reading.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxrlhf.config.model import DecoderConfig
from jaxrlhf.models import names
from jaxrlhf.models.names import Naming, Tensor, Weight

READERS = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Tensors that are read at once, each a copy in memory beside the model; a core is left to imports
and tracing, which go on meanwhile."""

Place = tuple[int, ...]
"""A layer, and an expert of a mixture; nothing of what has neither."""

Index = tuple[slice, ...]
"""A part of an array, a slice an axis; None in one is its end."""

ALIGNED = 64
"""Bytes: arrays that begin at a multiple of it become jax's on a CPU without a copy."""

ROWS = 64
"""Of a tensor that are read at once: what is transposed should fit into the processor's cache."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass
class Source:
    """Weights in files: what they are of, and how each is read."""

    decoder: DecoderConfig
    read: Callable[[Weight, Place], Any]
    """(weight, its place) → its tensor, of the shape ``weight.stored``; what is indexed of it is
    read. Called from several threads at once."""
    kept: Callable[[Weight], str]
    """What a leaf can be kept in without loss: float32 or bfloat16."""
    head: bool = False
    """Whether the scalar head is among them."""
    bias: float = 0.0
    """The head's, for which files have no tensor."""
    held: dict[str, np.ndarray] = field(default_factory=dict)
    """Leaves that have been read before, by path."""

    def weights(self) -> list[Weight]:
        """The leaves, but for the head's bias."""
        return names.weights(self.decoder, self.head)

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Of a leaf, layers and experts included."""
        return weight.full

    def bytes(self) -> int:
        """Of all leaves, as they are kept."""
        return sum(prod(self.shape(w)) * dtype_of(self.kept(w)).itemsize for w in self.weights())

    def parts(
        self, weight: Weight, indices: Iterable[Index], dtype: str | None = None
    ) -> list[np.ndarray]:
        """Parts of a leaf, layers and experts included, each an array of its own; of several, each
        tensor is looked up once.

        Args:
          dtype: of the arrays; None: what the leaf is kept in.
        """
        if weight.path in self.held:
            return [self.held[weight.path][index] for index in indices]
        kind, shape = dtype_of(dtype or self.kept(weight)), self.shape(weight)
        whole = [
            tuple(slice(*s.indices(n)) for s, n in zip(i, shape, strict=True)) for i in indices
        ]
        arrays = [empty(tuple(s.stop - s.start for s in index), kind) for index in whole]
        # Axes of layers and experts, of which files hold each apart.
        apart = len(shape) - len(weight.shape)

        def read(place: Place) -> None:
            tensor = self.read(weight, place)
            for array, index in zip(arrays, whole, strict=True):
                here = tuple(i - s.start for i, s in zip(place, index[:apart], strict=True))
                if all(0 <= i < n for i, n in zip(here, array.shape[:apart], strict=True)):
                    fill(array[(*here, ...)], weight, tensor, index[apart:])

        # Of daemons: an error elsewhere does not wait for them.
        with ThreadPool(READERS) as pool:
            pool.map(read, np.ndindex(*shape[:apart]), chunksize=1)
        return arrays

    def whole(self, weight: Weight, dtype: str | None = None) -> np.ndarray:
        """A leaf."""
        return self.parts(weight, [tuple(slice(None) for _ in self.shape(weight))], dtype)[0]

    def tree(self, dtype: str | None = None) -> dict[str, Any]:
        """All leaves in memory, as a tree of arrays."""
        leaves: dict[str, Any] = {w.path: self.whole(w, dtype) for w in self.weights()}
        if self.head:
            leaves["head/bias"] = np.float32(self.bias)
        return names.nested(leaves)

    def hold(self) -> "Source":
        """The same, all leaves in memory."""
        for weight in self.weights():
            self.held[weight.path] = self.whole(weight)
        return self


class Later(NamedTuple):
    """A leaf that is read when it is wanted."""

    shape: tuple[int, ...]
    read: Callable[[], Any]


def weight_reader(
    decoder: DecoderConfig, naming: Naming, find: Callable[[Tensor], Any], head: bool = False
) -> Callable[[Weight, Place], Any]:
    """``Source.read`` of files whose tensors ``naming`` describes.

    Args:
      find: of a tensor of a file → what is read where it is indexed.
    """
    places = {
        (weight.path, place if weight.stacked else ()): (tensor, number)
        for tensor in names.tensors(decoder, naming, head)
        for number, (weight, place) in enumerate(tensor.parts)
    }

    def read(weight: Weight, place: Place) -> Any:
        if naming.as_one(weight):
            tensor, number = places[weight.path, place[:1]]
            one = find(tensor)[place[1] : place[1] + 1][0]
            return names.cut(decoder, naming, tensor, one)[number]
        tensor, number = places[weight.path, place]
        turned = naming.turned(weight) or (naming.neighbours and weight.module in names.ROTATED)
        if len(tensor.parts) == 1 and not turned:
            return find(tensor)
        # What lies otherwise in the file has to be read whole.
        return names.cut(decoder, naming, tensor, find(tensor)[...])[number]

    return read


def dtype_of(name: str) -> np.dtype:
    """numpy's dtype of a name; numpy has no bfloat16 of its own."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that is ``ALIGNED``; pages are not touched before they are written."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def fill(place: np.ndarray, weight: Weight, tensor: Any, index: Index) -> None:
    """Write the part of one layer's leaf that ``index`` names, out of its tensor as files hold it.

    Args:
      index: of the leaf's axes but for the layers, starts and stops all given.
    """
    if len(weight.stored) == 1:
        place[...] = tensor[_flat(index, weight.shape)].reshape(place.shape)
        return
    flat, rows, columns = place, index[0], index[-1]
    if weight.path.endswith("kernel"):
        # stored = kernel.reshape(in, out).T: how many axes come in follows from its size.
        ins = next(i for i in range(len(index) + 1) if prod(weight.shape[:i]) == weight.stored[1])
        columns = _flat(index[:ins], weight.shape[:ins])
        rows = _flat(index[ins:], weight.shape[ins:])
        flat = place.reshape(columns.stop - columns.start, -1).T
    for start in range(rows.start, rows.stop, ROWS):
        stop = min(start + ROWS, rows.stop)
        flat[start - rows.start : stop - rows.start] = tensor[start:stop, columns]


def _flat(index: Index, shape: tuple[int, ...]) -> slice:
    """The stretch that ``index`` is of the axes as one; the first of them alone may be split."""
    if any((s.start, s.stop) != (0, n) for s, n in zip(index[1:], shape[1:], strict=True)):
        raise ValueError(f"{index} of {shape}: only the first axis of a side can be split")
    rest = prod(shape[1:])
    return slice(index[0].start * rest, index[0].stop * rest) if index else slice(0, 1)
