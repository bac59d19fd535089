"""The loop over the layers of a decoder, whose stacks may be several; see ``stacks``."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.config import DecoderConfig
from jaxrlhf.core.types import Array
from jaxrlhf.models.stacks import Stack, passes, stacks


def of_stack(stack: Stack, each_L: Any) -> Any:
    """Of a tree of arrays over all layers of a model [L, …] those of a stack's."""
    if not stack.name:
        return each_L
    return jax.tree.map(lambda x: x[jnp.array(stack.layers)], each_L)


def in_order(c: DecoderConfig, found: Mapping[str, Any]) -> Any:
    """Trees of each stack, by its name, over its own layers → one over all, in their order; the
    trees are alike."""
    if "" in found:
        return found[""]
    listed = [layer for stack in stacks(c) for layer in stack.layers]
    back = jnp.array(sorted(range(c.layers), key=listed.__getitem__))
    each = [found[stack.name] for stack in stacks(c)]
    return jax.tree.map(lambda *x: jnp.concatenate(x)[back], *each)


Body = Callable[[Any, Any], tuple[Any, Any]]
"""(carry, what is of one layer) → (carry, what the layer leaves): the body of a scan."""


def walk(
    c: DecoderConfig, bodies: Mapping[str, Body], carry: Any, items: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """``jax.lax.scan`` over layers of several stacks, in the order of the layers.

    One of stacks that follow each other periodically is a scan over the periods, whose body has one
    over each run of like layers: what is compiled does not grow with their number.

    Args:
      bodies: of each stack, by its name.
      items: of each stack, over its layers.

    Returns:
      The last carry; and what the layers of each stack leave, stacked.
    """
    left = {name: [] for name in bodies}
    done = dict.fromkeys(bodies, 0)
    for runs, times in passes(c):
        each = {name: sum(n for other, n in runs if other == name) for name, _ in runs}
        here = {name: _part(items[name], done[name], each[name] * times) for name in each}
        period = functools.partial(_period, bodies, runs)
        if times == 1:
            carry, out = period(carry, here)
        else:
            split = {name: _split(tree, times) for name, tree in here.items()}
            carry, out = jax.lax.scan(period, carry, split)
            out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
        for name in each:
            left[name].append(out[name])
            done[name] += each[name] * times
    return carry, {name: _joined(trees) for name, trees in left.items()}


def _period(
    bodies: Mapping[str, Body],
    runs: tuple[tuple[str, int], ...],
    carry: Any,
    items: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The layers of these runs, one after the other."""
    left = {name: [] for name, _ in runs}
    done = dict.fromkeys(left, 0)
    for name, count in runs:
        part = _part(items[name], done[name], count)
        carry, out = jax.lax.scan(bodies[name], carry, part)
        left[name].append(out)
        done[name] += count
    return carry, {name: _joined(trees) for name, trees in left.items()}


def _part(tree: Any, start: int, count: int) -> Any:
    """So many layers of a stack's; the arrays themselves where that is all of them."""

    def cut(x: Array) -> Array:
        return x if (start, count) == (0, len(x)) else x[start : start + count]

    return jax.tree.map(cut, tree)


def _split(tree: Any, times: int) -> Any:
    """Layers [times·n, …] as [times, n, …]."""
    return jax.tree.map(lambda x: x.reshape(times, -1, *x.shape[1:]), tree)


def _joined(trees: list[Any]) -> Any:
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *trees)
