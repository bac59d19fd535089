"""Early stopping: the parameters that held-out rows liked best are kept beside those that learn.

They are a part of the training states ("best") and of every checkpoint, as is what is known of them
(``host["best"]``): a run that is killed goes on with both as they were. When it ends, the two
change places, so that whoever reads the run finds the best ones as its policy; a run that is given
more steps, or more patience, changes them back first.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxrlhf.core.types import Array, States, TrainState

Host = dict[str, Any]


def keep(state: TrainState, spare: TrainState | None = None) -> TrainState:
    """A copy of a state's parameters, laid out as they are, without its optimizer.

    Args:
      spare: an earlier copy, which gives its memory to this one and is gone afterwards.
    """
    leaves, tree = jax.tree.flatten(replace(state, opt_state=()))
    # Setting up on shapes has nothing to copy.
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return jax.tree.unflatten(tree, leaves)
    copy = _copier(tuple(x.sharding for x in leaves))
    return jax.tree.unflatten(tree, copy(leaves, jax.tree.leaves(spare)))


@lru_cache(maxsize=8)
def _copier(layout: tuple[Sharding, ...]) -> Callable[..., list[Array]]:
    """(arrays, arrays whose memory is free) → copies that lie so; jitted once for a layout."""

    def copy(leaves: list[Array], spare: list[Array]) -> list[Array]:
        del spare  # donated: each copy is written over one of them
        return [jnp.copy(x) for x in leaves]

    return jax.jit(copy, out_shardings=list(layout), donate_argnums=1, keep_unused=True)


def compare(
    states: States, host: Host, step: int, metrics: Mapping[str, float], curve: Any = None
) -> States:
    """Note an evaluation of the policy, and keep its parameters if its loss is the lowest so far.

    Args:
      host: its ``best`` is written: ``step``, ``metrics`` and ``curve`` of the best evaluation,
        ``last``, the step of this one, and ``waited``, evaluations since the best.
      step: iterations done.
      metrics: of the evaluation, ``loss`` among them; one that is not a number is never the best.
      curve: the evaluation's reliability curve, where it has one; JSON-able.

    Returns:
      The states, with "best" as it now is; a new one takes the memory of the old.
    """
    best = host.get("best")
    lowest = math.inf if best is None else _number(best["metrics"]["loss"])
    if best is None or _number(metrics["loss"]) < lowest:
        found = {"step": step, "metrics": dict(metrics), "curve": curve}
        host["best"] = {**found, "last": step, "waited": 0}
        return {**states, "best": keep(states["policy"], states.get("best"))}
    host["best"] = {**best, "last": step, "waited": best["waited"] + 1}
    return states


def is_over(host: Host, patience: int) -> bool:
    """Whether the last ``patience`` evaluations have not improved on the best; never if it is 0."""
    return bool(patience) and "best" in host and host["best"]["waited"] >= patience


def has_ended(host: Host) -> bool:
    """Whether the best parameters are the policy's: the run is over, early or in its time."""
    return host.get("best", {}).get("in_use", False)


def exchange(states: States, host: Host, in_use: bool) -> States:
    """The states with the best parameters as the policy's (``in_use``), or back as they were."""
    if has_ended(host) == in_use:
        return states
    # Said in the host's numbers, which the checkpoint saves together with the exchanged arrays.
    host["best"] = {**host["best"], "in_use": in_use}
    policy, best = states["policy"], states["best"]
    swapped = {
        "policy": replace(policy, params=best.params),
        "best": replace(best, params=policy.params),
    }
    return {**states, **swapped}


def _number(loss: float | None) -> float:
    """The loss, or infinity in place of what is no number."""
    return math.inf if loss is None or math.isnan(loss) else loss
