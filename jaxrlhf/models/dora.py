"""DoRA (arXiv:2402.09353): adapters that turn a map's outputs, and magnitudes that say how long
they are.

W' = m · (W + s·A·B) / ‖W + s·A·B‖, of each output over its inputs, where m starts as ‖W‖. As the
paper and peft do, no gradient flows through the norm. Modules know of none of this: they multiply
by a gain, m / ‖W + s·A·B‖, which is computed here, of a layer once a step, and for decoding once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.core.types import Array, Params
from jaxrlhf.models.quantise import MAGNITUDE, made
from jaxrlhf.models.remat import SMALL


def with_gains(scale: float, tree: Params) -> Params:
    """A layer's tree with adapters, its magnitudes replaced by gains, float32.

    Args:
      scale: s, ``LoraConfig.scale``.
    """
    if MAGNITUDE in tree:
        a, b = (tree[f"lora_{half}"].astype(jnp.float32) for half in "ab")
        with jax.default_matmul_precision("highest"):
            turned = made(tree["kernel"], jnp.float32) + scale * jnp.tensordot(a, b, 1)
        # Kept in place of A·B, which is as large as the weight.
        norm = checkpoint_name(jax.lax.stop_gradient(norms(turned, a.ndim - 1)), SMALL)
        return {**tree, MAGNITUDE: tree[MAGNITUDE].astype(jnp.float32) / norm}
    return {k: with_gains(scale, x) if isinstance(x, dict) else x for k, x in tree.items()}


def with_magnitudes(lora: Params, layers: Params) -> Params:
    """Fresh adapters of all layers, their magnitudes those of the weights that they are for."""
    if MAGNITUDE in lora:
        contract = lora["lora_a"].ndim - 2

        def layer(kernel: Any) -> Array:
            return norms(made(kernel, jnp.float32), contract)

        # A layer at a time: in float32 all of them may be too much.
        return {**lora, MAGNITUDE: jax.lax.map(layer, layers["kernel"])}
    return {k: with_magnitudes(x, layers[k]) if isinstance(x, dict) else x for k, x in lora.items()}


def norms(kernel: Array, contract: int, first: int = 0) -> Array:
    """‖W‖ of each output [out…] of kernels [in…, out…], float32, ``contract`` axes coming in, from
    axis ``first`` on."""
    return jnp.sqrt(jnp.sum(kernel**2, axis=tuple(range(first, first + contract))))
