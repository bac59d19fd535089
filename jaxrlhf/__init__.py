"""Reinforcement learning from human feedback in JAX: pure, jitted, mesh-sharded steps.

The names below are loaded when they are first used, so that ``import jaxrlhf`` is quick and the
command line can answer before jax is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrlhf import algorithms as algorithms
    from jaxrlhf import config as config
    from jaxrlhf.core import masked as masked
    from jaxrlhf.core.errors import InputError as InputError
    from jaxrlhf.core.types import Batch as Batch
    from jaxrlhf.core.types import Outputs as Outputs
    from jaxrlhf.core.types import Rollout as Rollout
    from jaxrlhf.core.types import TrainState as TrainState
    from jaxrlhf.mesh.sharding import make_mesh as make_mesh
    from jaxrlhf.models.ends import read_ends as read_ends
    from jaxrlhf.models.load import build as build
    from jaxrlhf.models.load import load_model as load_model
    from jaxrlhf.models.stop_strings import stop_table as stop_table
    from jaxrlhf.models.transformer import Model as Model
    from jaxrlhf.run import quartet as quartet
    from jaxrlhf.run.loop import train as train
    from jaxrlhf.steps.iteration import make_iteration as make_iteration
    from jaxrlhf.steps.sample import sample as sample
    from jaxrlhf.steps.score import forward as forward
    from jaxrlhf.steps.score import reward as reward
    from jaxrlhf.steps.score import score as score
    from jaxrlhf.steps.score import value as value
    from jaxrlhf.steps.update import make_optimizer as make_optimizer
    from jaxrlhf.steps.update import make_update as make_update
    from jaxrlhf.steps.update import policy_loss as policy_loss

__version__ = "0.1.0"

_HOMES = {
    "algorithms": "jaxrlhf.algorithms",
    "config": "jaxrlhf.config",
    "masked": "jaxrlhf.core.masked",
    "InputError": "jaxrlhf.core.errors",
    "train": "jaxrlhf.run.loop",
    "build": "jaxrlhf.models.load",
    "Model": "jaxrlhf.models.transformer",
    "load_model": "jaxrlhf.models.load",
    "read_ends": "jaxrlhf.models.ends",
    "stop_table": "jaxrlhf.models.stop_strings",
    "make_iteration": "jaxrlhf.steps.iteration",
    "make_mesh": "jaxrlhf.mesh.sharding",
    "quartet": "jaxrlhf.run.quartet",
    "sample": "jaxrlhf.steps.sample",
    "forward": "jaxrlhf.steps.score",
    "reward": "jaxrlhf.steps.score",
    "score": "jaxrlhf.steps.score",
    "value": "jaxrlhf.steps.score",
    "make_optimizer": "jaxrlhf.steps.update",
    "make_update": "jaxrlhf.steps.update",
    "policy_loss": "jaxrlhf.steps.update",
    "Batch": "jaxrlhf.core.types",
    "Outputs": "jaxrlhf.core.types",
    "Rollout": "jaxrlhf.core.types",
    "TrainState": "jaxrlhf.core.types",
}
"""Public name → the module it lives in."""

_MODULES = {"algorithms", "config", "masked", "quartet"}
"""Those of them that are modules themselves."""

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxrlhf' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    found = home if name in _MODULES else getattr(home, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
