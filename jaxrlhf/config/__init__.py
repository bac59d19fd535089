"""Configuration: frozen dataclasses by theme, and ``load``. Never imports jax."""

from jaxrlhf.config.algorithm import (
    Aggregation,
    AlgorithmConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
)
from jaxrlhf.config.checks import (
    check,
    check_sample,
    is_on_policy,
    on_policy,
    rows_at_once,
)
from jaxrlhf.config.layout import check_mesh, resolve_mesh
from jaxrlhf.config.load import dump, load, override, save
from jaxrlhf.config.model import (
    CriticConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    ReferenceConfig,
    RopeScaling,
)
from jaxrlhf.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    RewardConfig,
    SampleConfig,
)

__all__ = [
    "Aggregation",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "DecoderConfig",
    "EvalConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RopeScaling",
    "SFTConfig",
    "SampleConfig",
    "check",
    "check_mesh",
    "check_sample",
    "dump",
    "is_on_policy",
    "load",
    "on_policy",
    "override",
    "resolve_mesh",
    "rows_at_once",
    "save",
]
