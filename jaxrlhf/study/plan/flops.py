"""FLOPs of a program, counted in its jaxpr: XLA's own count has the body of a loop only once."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxrlhf.core.errors import InputError


def count(jaxpr: ClosedJaxpr | Jaxpr, trips: int | None = None) -> float:
    """FLOPs of all matrix products of a jaxpr, over all devices.

    A product [M, K]·[K, N] is 2·M·N·K FLOPs. What a scan repeats counts once a step, the dearest
    branch of a cond counts, the body of a shard_map once a device. Elementwise work is left out.

    Args:
      trips: iterations of each while loop: a jaxpr does not say how many there are.

    Raises:
      InputError: there is a while loop, and ``trips`` is not given.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_equation(equation, trips) for equation in inner.eqns)


def _equation(equation: Any, trips: int | None) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval, equation.outvars[0].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / features
    parts = [count(inner, trips) for inner in _inner(params)]
    if not any(parts):
        return 0.0
    if name == "cond":
        return max(parts)
    return sum(parts) * _repeats(name, params, trips)


def _repeats(name: str, params: Any, trips: int | None) -> float:
    """How often the body of an equation is carried out, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "while":
        if trips is None:
            raise InputError("a while loop whose trips are not known: state them")
        return trips
    if name == "shard_map":
        axes = params.get("newly_manual_axes", params.get("manual_axes", ()))  # by version
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _inner(params: Any) -> Iterator[ClosedJaxpr | Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
