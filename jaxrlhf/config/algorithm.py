"""The ``algorithm`` section of a config: one of these, told apart by ``name``."""

from jaxrlhf.config.offline import (
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    OfflineConfig,
    ORPOConfig,
    SFTConfig,
    SimPOConfig,
)
from jaxrlhf.config.on_policy import (
    A2CConfig,
    Aggregation,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    OnlineDPOConfig,
    OnPolicyConfig,
    PPOConfig,
    PreferenceKind,
    ReinforceConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
)
from jaxrlhf.config.reward_models import (
    ListwiseRewardModelConfig,
    PointwiseRewardModelConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
)

AlgorithmConfig = (
    PPOConfig
    | A2CConfig
    | ReinforceConfig
    | ReMaxConfig
    | RLOOConfig
    | ReinforcePPConfig
    | GRPOConfig
    | DrGRPOConfig
    | DAPOConfig
    | GSPOConfig
    | CISPOConfig
    | OnlineDPOConfig
    | RewardModelConfig
    | ListwiseRewardModelConfig
    | PointwiseRewardModelConfig
    | ProcessRewardModelConfig
    | SFTConfig
    | DPOConfig
    | ORPOConfig
    | SimPOConfig
    | CPOConfig
    | KTOConfig
    | BCOConfig
)

__all__ = [
    "A2CConfig",
    "Aggregation",
    "AlgorithmConfig",
    "BCOConfig",
    "CISPOConfig",
    "CPOConfig",
    "DAPOConfig",
    "DPOConfig",
    "DrGRPOConfig",
    "GRPOConfig",
    "GSPOConfig",
    "KTOConfig",
    "ListwiseRewardModelConfig",
    "ORPOConfig",
    "OfflineConfig",
    "OnPolicyConfig",
    "OnlineDPOConfig",
    "PPOConfig",
    "PointwiseRewardModelConfig",
    "PreferenceKind",
    "ProcessRewardModelConfig",
    "RLOOConfig",
    "ReMaxConfig",
    "ReinforceConfig",
    "ReinforcePPConfig",
    "RewardModelConfig",
    "SFTConfig",
    "SimPOConfig",
]
