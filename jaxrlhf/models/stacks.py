"""Which layers of a decoder have weights of one shape, where each lies, and in what order.

Layers whose weights have one shape are one stack, and ``params["layers"]`` is it. Where they have
several, as those of Gemma 4 with and without a window, it is a dict of stacks, by name, each of its
own layers in their order. What is of one stack reads a decoder of its own, as if the model had
these layers alone. Without JAX, whose import takes as long as reading.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from jaxrlhf.config.model import DecoderConfig


class Stack(NamedTuple):
    """Layers with weights of one shape."""

    name: str
    """Its key in ``params["layers"]``; "" where it is the only one."""
    decoder: DecoderConfig
    """Of these layers alone, all of one shape."""
    layers: tuple[int, ...]
    """Their numbers in the model."""
    reads: str = ""
    """The stack whose last layer's keys and values they look at, if they have none."""

    @property
    def path(self) -> str:
        """Keys from the root to its weights."""
        return f"layers/{self.name}/" if self.name else "layers/"


def _window(c: DecoderConfig, layer: int) -> int:
    return c.windows[layer % len(c.windows)] if c.windows else 0


def _of(c: DecoderConfig, layers: tuple[int, ...]) -> DecoderConfig:
    """The decoder of these layers, which are alike in having a window, and in sharing keys."""
    full, shares = not _window(c, layers[0]), layers[0] >= own_caches(c)
    return replace(
        c,
        layers=len(layers),
        windows=() if full else tuple(_window(c, layer) for layer in layers),
        no_rope=tuple(c.no_rope[layer % len(c.no_rope)] for layer in layers) if c.no_rope else (),
        head_dim=c.full_head_dim if full and c.full_head_dim else c.head_dim,
        kv_heads=c.full_kv_heads if full and c.full_kv_heads else c.kv_heads,
        full_head_dim=0,
        full_kv_heads=0,
        keys_are_values=full and c.keys_are_values,
        shared_kv_layers=len(layers) if shares else 0,
        mlp=c.shared_mlp if shares and c.shared_mlp else c.mlp,
        shared_mlp=0,
    )


def own_caches(c: DecoderConfig) -> int:
    """How many layers have keys and values of their own: the first ones."""
    return c.layers - c.shared_kv_layers


@functools.lru_cache(maxsize=64)
def caches(c: DecoderConfig) -> tuple[int, ...]:
    """Of each layer the number of that whose keys and values it looks at: its own, as a rule."""
    own = range(own_caches(c))
    near = [bool(_window(c, layer)) for layer in range(c.layers)]
    last = {kind: max(i for i in own if near[i] == kind) for kind in {near[i] for i in own}}
    return tuple(i if i in own else last[near[i]] for i in range(c.layers))


@functools.lru_cache(maxsize=64)
def stacks(c: DecoderConfig) -> tuple[Stack, ...]:
    """The stacks of a decoder, that of its first layer first."""
    every = tuple(range(c.layers))
    if not (c.full_head_dim or c.full_kv_heads or c.keys_are_values or c.shared_kv_layers):
        return (Stack("", c, every),)
    own = own_caches(c)
    if not own:  # a stack's own decoder
        return (Stack("", c, every),)
    kinds = ["window" if _window(c, layer) else "full" for layer in every]
    kinds = [kind if i < own else f"{kind}_shared" for i, kind in enumerate(kinds)]
    groups = {name: tuple(i for i in every if kinds[i] == name) for name in dict.fromkeys(kinds)}
    alone = len(groups) == 1
    return tuple(
        Stack("" if alone else name, _of(c, layers), layers, _reads(name))
        for name, layers in groups.items()
    )


def _reads(name: str) -> str:
    kind, _, shared = name.partition("_")
    return kind if shared else ""


@functools.lru_cache(maxsize=64)
def places(c: DecoderConfig) -> tuple[tuple[Stack, int], ...]:
    """Of each layer its stack, and which of that stack's layers it is."""
    found = {layer: (s, i) for s in stacks(c) for i, layer in enumerate(s.layers)}
    return tuple(found[layer] for layer in range(c.layers))


def apart(c: DecoderConfig, layers: Any) -> dict[str, Any]:
    """``params["layers"]``, or another tree of that form → what is of each stack, by its name."""
    names = [stack.name for stack in stacks(c)]
    return {"": layers} if names == [""] else {name: layers[name] for name in names}


def together(by_stack: Mapping[str, Any]) -> Any:
    """The reverse of ``apart``."""
    return by_stack[""] if "" in by_stack else dict(by_stack)


def by_stack(c: DecoderConfig, make: Callable[[Stack], Any]) -> Any:
    """What ``make`` makes of each stack, in the form of ``params["layers"]``."""
    return together({stack.name: make(stack) for stack in stacks(c)})


class Pass(NamedTuple):
    """Layers one after the other, and all of that several times."""

    runs: tuple[tuple[str, int], ...]
    """Names of stacks, and how many layers of each."""
    times: int


@functools.lru_cache(maxsize=64)
def passes(c: DecoderConfig) -> tuple[Pass, ...]:
    """The layers in their order, told by as few layers as repeat.

    Of 5 with a window, 1 without, and so on ten times: ((("window", 5), ("full", 1)), 10).
    """
    names, found = [stack.name for stack, _ in places(c)], []
    while names:
        period, times = _repeated(names)
        runs: list[tuple[str, int]] = []
        for name in names[:period]:
            count = runs.pop()[1] if runs and runs[-1][0] == name else 0
            runs.append((name, count + 1))
        if len(runs) == 1:
            runs, times = [(runs[0][0], runs[0][1] * times)], 1
        found.append(Pass(tuple(runs), times))
        names = names[sum(count for _, count in runs) * times :]
    return tuple(found)


def _repeated(names: list[str]) -> tuple[int, int]:
    """(how many of the first names, how often they stand there one after the other), such that most
    names are told by it, and of several such the fewest."""
    if len(set(names)) == 1:
        return 1, len(names)

    def times(period: int) -> int:
        here = range(0, len(names), period)
        return next(
            (i for i, at in enumerate(here) if names[at : at + period] != names[:period]),
            len(here),
        )

    several = [(p, times(p)) for p in range(1, len(names) // 2 + 1)]
    return max(several, key=lambda found: (found[0] * found[1], -found[0]), default=(1, 1))
