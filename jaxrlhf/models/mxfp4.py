"""MXFP4, in which gpt-oss has its experts: 32 numbers of four bits share a scale.

A number is a sign, two bits of exponent and one of fraction; the scale is a power of two (E2M1 and
E8M0 of the OCP microscaling formats, 1.0). What they stand for has two significant bits, so that
bfloat16 holds it exactly: nothing is lost where it is read.

Of maps [E, in, out] files have blocks [E, out, in / 32, 16], two numbers a byte, the first in its
lower half, and scales [E, out, in / 32], whose exponents are 127 less.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 32
"""Numbers that share a scale."""

_ABOVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_LEVELS = np.concatenate([_ABOVE, -_ABOVE])
_BYTE = np.arange(256)
_PAIRS = np.stack([_LEVELS[_BYTE % 16], _LEVELS[_BYTE // 16]], axis=1).view(np.uint64)[:, 0]
"""Both numbers of a byte, as the eight bytes that they are."""


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks [..., G, 16] and scales [..., G], uint8 → what they stand for, float32 [..., 32·G]."""
    power = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    numbers = np.take(_PAIRS, blocks).view(np.float32)
    numbers *= power[..., None]
    return numbers.reshape(*scales.shape[:-1], -1)


def whole_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """[E, in, out] of blocks [E, out, in / 32, 16]."""
    experts, outs, groups, _ = blocks
    return experts, groups * BLOCK, outs


@dataclass(frozen=True)
class Packed:
    """Maps [E, in, out] in a file, made where experts of them are indexed."""

    blocks: Any
    scales: Any

    def __getitem__(self, experts: slice) -> np.ndarray:
        return dequantised(self.blocks[experts], self.scales[experts]).swapaxes(1, 2)
