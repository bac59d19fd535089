"""What the backward pass keeps of each layer's forward pass, and what it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxrlhf.config.model import Remat

_again = partial(jax.checkpoint, prevent_cse=False)  # a scan's two loops share nothing as it is

POLICIES: dict[Remat, Callable[[Any], Any]] = {
    "none": lambda layer: layer,
    "full": _again,
    "dots": partial(_again, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
"""``model.remat`` → a layer, the body of a scan over layers, that keeps no more than it says.

``none`` keeps every array that a gradient needs. ``full`` keeps the layer's input alone
(arXiv:1604.06174). ``dots`` keeps the products with weights too, so that the second forward pass is
norms, activations and attention weights, which are products of two arrays with rows.
"""
