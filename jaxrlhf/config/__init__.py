"""Configuration: frozen dataclasses by theme, and ``load``. Never imports jax."""

from jaxrlhf.config.algorithms import (
    A2CConfig,
    Aggregation,
    AlgorithmConfig,
    CISPOConfig,
    CriticTargetsConfig,
    DAPOConfig,
    DrGRPOConfig,
    GKDConfig,
    GRPOConfig,
    GSPOConfig,
    OnlineDPOConfig,
    OnPolicyConfig,
    PPOConfig,
    RatioConfig,
    ReinforceConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RewardedConfig,
    RLOOConfig,
    TokenLossConfig,
)
from jaxrlhf.config.axes import AXES, across_slices, check_mesh, resolve_mesh, sizes_of
from jaxrlhf.config.checks import check, check_sample, check_seed, rows_at_once
from jaxrlhf.config.load import dump, load, locate_config, override, save
from jaxrlhf.config.model import (
    CriticConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    ReferenceConfig,
    RopeScaling,
)
from jaxrlhf.config.offline import (
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ListwiseRewardModelConfig,
    OfflineConfig,
    ORPOConfig,
    PointwiseRewardModelConfig,
    PreferenceKind,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SFTConfig,
    SimPOConfig,
)
from jaxrlhf.config.rewards import (
    GateConfig,
    IsolateConfig,
    LengthConfig,
    RewardConfig,
    ServiceConfig,
    name_of,
    reward_problems,
)
from jaxrlhf.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    SampleConfig,
    has_critic,
    has_reference,
    is_on_policy,
    is_reward_model,
    on_policy,
)
from jaxrlhf.config.stages import (
    EvaluateConfig,
    PipelineConfig,
    PreferencesConfig,
    StageConfig,
    check_evaluate,
    load_pipeline,
    parse_evaluate,
    stage_evaluation,
    stage_run,
)
