"""Reinforcement learning from human feedback in JAX: pure, jitted, mesh-sharded steps.

The names below are loaded when they are first used, so that ``import jaxrlhf`` is quick and the
command line can answer before jax is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrlhf import algorithms as algorithms
    from jaxrlhf import config as config
    from jaxrlhf import masked as masked
    from jaxrlhf.errors import InputError as InputError
    from jaxrlhf.loop import train as train
    from jaxrlhf.models.loading import build as build
    from jaxrlhf.models.transformer import Model as Model
    from jaxrlhf.networks import load_model as load_model
    from jaxrlhf.sharding import make_mesh as make_mesh
    from jaxrlhf.steps.iteration import make_iteration as make_iteration
    from jaxrlhf.steps.losses import policy_loss as policy_loss
    from jaxrlhf.steps.sampling import sample as sample
    from jaxrlhf.steps.scoring import forward as forward
    from jaxrlhf.steps.scoring import reward as reward
    from jaxrlhf.steps.scoring import score as score
    from jaxrlhf.steps.scoring import value as value
    from jaxrlhf.steps.updating import make_optimizer as make_optimizer
    from jaxrlhf.steps.updating import make_update as make_update
    from jaxrlhf.types import Batch as Batch
    from jaxrlhf.types import Outputs as Outputs
    from jaxrlhf.types import Rollout as Rollout
    from jaxrlhf.types import TrainState as TrainState

__version__ = "0.1.0"

_HOMES = {
    "algorithms": "jaxrlhf.algorithms",
    "config": "jaxrlhf.config",
    "masked": "jaxrlhf.masked",
    "InputError": "jaxrlhf.errors",
    "train": "jaxrlhf.loop",
    "build": "jaxrlhf.models.loading",
    "Model": "jaxrlhf.models.transformer",
    "load_model": "jaxrlhf.networks",
    "make_mesh": "jaxrlhf.sharding",
    "sample": "jaxrlhf.steps.sampling",
    "forward": "jaxrlhf.steps.scoring",
    "reward": "jaxrlhf.steps.scoring",
    "score": "jaxrlhf.steps.scoring",
    "value": "jaxrlhf.steps.scoring",
    "make_optimizer": "jaxrlhf.steps.updating",
    "make_update": "jaxrlhf.steps.updating",
    "make_iteration": "jaxrlhf.steps.iteration",
    "policy_loss": "jaxrlhf.steps.losses",
    "Batch": "jaxrlhf.types",
    "Outputs": "jaxrlhf.types",
    "Rollout": "jaxrlhf.types",
    "TrainState": "jaxrlhf.types",
}
"""Public name → the module it lives in."""

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxrlhf' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    found = home if home.__name__ == f"jaxrlhf.{name}" else getattr(home, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
