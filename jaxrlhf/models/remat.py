"""What of a layer is kept for its gradient, and what is computed again."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxrlhf.config.model import Remat

# A scan's forward and backward loops share nothing as it is, so nothing must be kept from merging.
_again = functools.partial(jax.checkpoint, prevent_cse=False)

COSTLY = "costly"
"""The ``checkpoint_name`` of what is not to be computed twice, though it is no product."""

SMALL = "small"
"""The ``checkpoint_name`` of what is made of large arrays that are not to be kept in its place."""


def _is_product(primitive: Any, *given: Any, **params: Any) -> bool:
    """Whether an operation is a product with weights, or what is made of such a one alone."""
    plain = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return params.get("name") == SMALL or bool(plain(primitive, *given, **params))


def _is_costly(primitive: Any, *given: Any, **params: Any) -> bool:
    """Whether it takes time: those products, attention, and the products of a mixture's experts."""
    cudnn = primitive.name == "dot_product_attention_fwd_wrapper"
    return cudnn or params.get("name") == COSTLY or _is_product(primitive, *given, **params)


POLICIES: dict[Remat, Callable[[Any], Any]] = {
    "none": lambda layer: layer,
    "elementwise": functools.partial(_again, policy=_is_costly),
    "dots": functools.partial(_again, policy=_is_product),
    "full": _again,
}
"""``model.remat`` → a layer, the body of a scan over layers, that keeps no more than it says.

``none`` keeps every array that a gradient needs. ``full`` keeps the layer's input alone
(arXiv:1604.06174). ``dots`` keeps the products with weights too, so that the second forward pass is
norms, activations and attention. ``elementwise`` keeps what attention gives as well, and what a
mixture's experts do: all else takes about as long to compute again as to write and to read, and is
more than half of what ``none`` keeps (benchmarks/RESULTS.md). Of attention by XLA's products the
scores are computed twice, as kernels for it do.
"""
