"""What devices can do at best: one table. Does not import jax."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A device, as far as a roofline sees it; a link's direction counts once."""

    kind: str
    """What jax calls it: the start of its ``device_kind``."""
    torus: int
    """Dimensions of a slice of TPUs; 0 for other devices."""
    memory: float
    """Bytes that a program may use: what is left of its HBM after the compiler's reserve."""
    flops: float
    """Peak FLOP/s, dense bfloat16."""
    bandwidth: float
    """Bytes/s to and from its memory."""
    link: float
    """Bytes/s that one device sends during a collective along one mesh axis."""
    source: str
    """Where the numbers are from."""


TPU = "cloud.google.com/tpu/docs; memory as XLA reports it; link: one torus dimension, both ways"
GPU = "NVIDIA data sheet, SXM; memory less 6 % for the runtime; link: NVLink, one way"
CARD = "NVIDIA white paper; memory less 6 % for the runtime; link: PCIe 4.0 x16, one way"
HOST = "nominal, to compare layouts with; not a measurement"

CHIPS = {
    "v4": Chip("TPU v4", 3, 30.75 * GIB, 275e12, 1228e9, 100e9, TPU),
    # before v5p, whose kind ("TPU v5" or "TPU v5p") is the start of this one
    "v5e": Chip("TPU v5 lite", 2, 15.75 * GIB, 197e12, 819e9, 100e9, TPU),
    "v5p": Chip("TPU v5", 3, 95.74 * GIB, 459e12, 2765e9, 200e9, TPU),
    "v6e": Chip("TPU v6 lite", 2, 31.25 * GIB, 918e12, 1638e9, 200e9, TPU),
    "a100": Chip("NVIDIA A100", 0, 0.94 * 80e9, 312e12, 2039e9, 300e9, GPU),
    "h100": Chip("NVIDIA H100", 0, 0.94 * 80e9, 989e12, 3350e9, 450e9, GPU),
    "h200": Chip("NVIDIA H200", 0, 0.94 * 141e9, 989e12, 4800e9, 450e9, GPU),
    "b200": Chip("NVIDIA B200", 0, 0.94 * 180e9, 2250e12, 8000e9, 900e9, GPU),
    # with float32 sums; it has no NVLink
    "rtx4090": Chip("NVIDIA GeForce RTX 4090", 0, 0.94 * 24e9, 165e12, 1008e9, 32e9, CARD),
    "cpu": Chip("cpu", 0, 16 * GIB, 1e11, 2e10, 1e10, HOST),
}
"""Name → facts. Published peaks are not reached: a roofline is a lower bound of the time."""


def name_of(kind: str) -> str | None:
    """The key in ``CHIPS`` of a device that jax calls ``kind``; None if it is not there."""
    return next((name for name, chip in CHIPS.items() if kind.startswith(chip.kind)), None)
