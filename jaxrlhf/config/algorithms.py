"""The ``algorithm`` section of a config: one dataclass an algorithm, told apart by ``name``.

Here are those that sample; those that learn from the rows of a file are in ``offline``. Each has
just the settings that it reads.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxrlhf.config.offline import (
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ListwiseRewardModelConfig,
    ORPOConfig,
    PointwiseRewardModelConfig,
    PreferenceKind,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SFTConfig,
    SimPOConfig,
)

Aggregation = Literal["token", "sequence", "sequence_sum", "fixed"]
"""How token losses become one number; masked.weights gives the formulas."""

Normalise = Literal["sum", "each"]
KLPlace = Literal["reward", "loss", "exact_loss"]
OffPolicy = Literal["none", "token", "sequence", "token_mask", "sequence_mask"]


@dataclass(frozen=True)
class OnPolicyConfig:
    """What all algorithms have that learn from responses they sample.

    Class variables are no settings. They say what a run has to provide, and stand for settings
    that only some of them read (``RewardedConfig``, ``TokenLossConfig``, ``RatioConfig``).
    """

    name: str = ""
    has_critic: ClassVar[bool] = False
    """Learns a value function."""
    has_teacher: ClassVar[bool] = False
    """Learns from the distributions of the reference instead of from rewards."""
    in_groups: ClassVar[bool] = False
    """Compares the samples of a prompt: sample.n is at least 2."""
    normalise: ClassVar[Normalise] = "sum"
    on_pairs: ClassVar[bool] = False
    """Learns from whole responses, two a prompt, instead of from tokens."""
    # Without a ratio π/π_old a rollout is right for one update.
    epochs: ClassVar[int] = 1
    minibatches: ClassVar[int] = 1
    target_kl: ClassVar[float | None] = None
    # Without a loss on tokens there is one weight a row, and the KL is in the reward.
    aggregation: ClassVar[Aggregation] = "token"
    length: ClassVar[int | None] = None
    kl_in: ClassVar[KLPlace] = "reward"
    off_policy: ClassVar[OffPolicy] = "none"
    off_policy_cap: ClassVar[float] = 2.0
    entropy_coef: ClassVar[float] = 0.0
    mask_truncated: ClassVar[bool] = False
    # A policy has no scores to normalise; whoever loads a run asks.
    normalise_on: ClassVar[str] = ""
    # Without rewards there is nothing to weigh a KL against.
    old_logp: ClassVar[Literal["sampler", "rescore"]] = "sampler"
    kl_coef: ClassVar[float] = 0.0
    kl_estimator: ClassVar[Literal["k1", "k2", "k3"] | None] = None
    kl_controller: ClassVar[Literal["fixed", "adaptive"]] = "fixed"
    kl_target: ClassVar[float] = 6.0
    kl_horizon: ClassVar[float] = 10_000.0
    missing_eos_penalty: ClassVar[float] = 0.0
    overlong_buffer: ClassVar[int] = 0


@dataclass(frozen=True)
class RewardedConfig:
    """Settings of learning from rewards: the KL to the reference, penalties on length."""

    old_logp: Literal["sampler", "rescore"] = "sampler"
    """Source of the ratio's denominator: the cached sampler, or a forward like the update's."""
    kl_coef: float = 0.05
    """β, reward units a nat. With the KL in the loss it is in standard deviations of the advantage
    a nat where advantages are divided by those and β·KL is not: PPO and A2C that
    ``whiten_advantages``, REINFORCE++; and, by each group's, GRPO, DAPO, GSPO and CISPO."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the per-token KL to the reference (default: k1 in the reward, k3 in the loss).
    As rewards, k2 and k3 leave the KL of a token's own choice unpunished, to first order, near the
    reference: only what the choice does to the KL of later tokens is charged."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: β follows ``kl_target`` (arXiv:1909.08593)."""
    kl_target: float = 6.0
    """Wanted KL, nats a sequence (adaptive controller)."""
    kl_horizon: float = 10_000.0
    """Sequences over which the adaptive controller acts."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a response that was cut off (reward units)."""
    overlong_buffer: int = 0
    """Last tokens of sample.max_new_tokens, over which a length penalty grows from 0 to 1."""


@dataclass(frozen=True)
class TokenLossConfig:
    """Settings of a loss that is a weighted sum over tokens."""

    aggregation: Aggregation = "token"
    """How token losses become one number; see masked.weights."""
    length: int | None = None
    """Tokens a row is divided by under ``aggregation: fixed`` (default: the row's width)."""
    kl_in: KLPlace = "reward"
    """Where β·KL goes: into each token's reward, or into the loss (see kl_loss)."""
    off_policy: OffPolicy = "none"
    """Importance weights of the denominator over the sampler's draw; see importance_weights."""
    off_policy_cap: float = 2.0
    """Where these weights are cut off; with _mask, outside of [1/cap, cap] they are 0."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (per nat)."""
    mask_truncated: bool = False
    """Leave responses that were cut off out of the loss; their rewards still count in groups."""


@dataclass(frozen=True)
class RatioConfig:
    """Settings of a loss in π/π_old, which allows several updates on a rollout."""

    epochs: int = 1
    """Passes over each rollout."""
    minibatches: int = 1
    """Optimizer steps a pass."""
    target_kl: float | None = None
    """Stop the passes over a rollout once KL(old‖new) exceeds this (nats a token)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""


@dataclass(frozen=True)
class GroupConfig:
    """Settings of advantages in standard deviations of the prompt's samples."""

    in_groups: ClassVar[bool] = True
    normalise: Normalise = "sum"
    """What is normalised within a prompt's samples: the weighted sum of the rewards, or each of
    them before they are summed, and their sum then over the rollout (GDPO; arXiv:2601.05242)."""


@dataclass(frozen=True)
class CriticTargetsConfig:
    """Settings of advantages and returns by a learned value function."""

    has_critic: ClassVar[bool] = True
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """λ of generalised advantage estimation (arXiv:1506.02438); 1: return minus value."""
    value_coef: float = 0.1
    """Weight of the value loss where critic and policy share a trunk."""
    whiten_advantages: bool = True
    """Advantages to mean 0, variance 1 over the rollout."""


@dataclass(frozen=True)
class PPOConfig(CriticTargetsConfig, RatioConfig, TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """Proximal policy optimisation with a learned critic (arXiv:1707.06347, arXiv:2203.02155)."""

    name: Literal["ppo"] = "ppo"
    epochs: int = 2
    dual_clip: float | None = None
    """Upper bound c on the ratio where the advantage is negative (arXiv:1912.09729)."""
    value_clip: float | None = 0.2
    """The value may move this far from its old estimate (reward units); null: freely."""
    whiten_rewards: bool = False
    """Token rewards scaled to variance 1 over the rollout, mean kept."""


@dataclass(frozen=True)
class A2CConfig(CriticTargetsConfig, TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """Advantage actor-critic: the policy gradient with a learned critic (arXiv:1602.01783)."""

    name: Literal["a2c"] = "a2c"
    aggregation: Aggregation = "sequence_sum"
    lam: float = 1.0
    whiten_advantages: bool = False


@dataclass(frozen=True)
class ReinforceConfig(TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """REINFORCE: each token is credited with the rewards that follow it (Williams 1992)."""

    name: Literal["reinforce"] = "reinforce"
    aggregation: Aggregation = "sequence_sum"
    gamma: float = 1.0
    """Discount per token."""
    baseline: Literal["none", "mean"] = "mean"
    """mean: subtract the mean return of the rollout's responses."""


@dataclass(frozen=True)
class ReMaxConfig(TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """ReMax: REINFORCE whose baseline is the reward of the greedy response (arXiv:2310.10505)."""

    name: Literal["remax"] = "remax"
    aggregation: Aggregation = "sequence_sum"


@dataclass(frozen=True)
class RLOOConfig(TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """REINFORCE leave-one-out: the baseline is the mean of the other samples (arXiv:2402.14740)."""

    in_groups: ClassVar[bool] = True
    name: Literal["rloo"] = "rloo"
    aggregation: Aggregation = "sequence_sum"


@dataclass(frozen=True)
class ReinforcePPConfig(RatioConfig, TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """REINFORCE++: returns whitened over the whole rollout, PPO's clip (arXiv:2501.03262)."""

    name: Literal["reinforce_pp"] = "reinforce_pp"


@dataclass(frozen=True)
class GRPOConfig(GroupConfig, RatioConfig, TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """Group-relative policy optimisation (arXiv:2402.03300)."""

    name: Literal["grpo"] = "grpo"
    aggregation: Aggregation = "sequence"
    kl_coef: float = 0.04
    kl_in: KLPlace = "loss"


@dataclass(frozen=True)
class DrGRPOConfig(RatioConfig, TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """GRPO without its two biases: no standard deviation, a fixed length (arXiv:2503.20783)."""

    in_groups: ClassVar[bool] = True
    name: Literal["dr_grpo"] = "dr_grpo"
    aggregation: Aggregation = "fixed"
    kl_coef: float = 0.0


@dataclass(frozen=True)
class DAPOConfig(GroupConfig, RatioConfig, TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """GRPO with a higher upper clip, token means and dynamic sampling (arXiv:2503.14476)."""

    name: Literal["dapo"] = "dapo"
    kl_coef: float = 0.0
    clip_high: float = 0.28
    rounds: int = 4
    """Most batches of prompts that are sampled until data.batch_size groups have a signal."""


@dataclass(frozen=True)
class GSPOConfig(GroupConfig, RatioConfig, TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """Group sequence policy optimisation: one ratio a response (arXiv:2507.18071)."""

    name: Literal["gspo"] = "gspo"
    aggregation: Aggregation = "sequence"
    kl_coef: float = 0.0
    clip_low: float = 3e-4
    """The ratio, a geometric mean over tokens, is clipped below at 1 − clip_low."""
    clip_high: float = 4e-4


@dataclass(frozen=True)
class CISPOConfig(GroupConfig, RatioConfig, TokenLossConfig, RewardedConfig, OnPolicyConfig):
    """Clipped importance weights on the policy gradient (MiniMax-M1; arXiv:2506.13585)."""

    name: Literal["cispo"] = "cispo"
    kl_coef: float = 0.0
    clip_low: float = 1.0
    """The weight is clipped below at 1 − clip_low; 1 leaves it free below."""


@dataclass(frozen=True)
class OnlineDPOConfig(RewardedConfig, OnPolicyConfig):
    """DPO on the best and the worst of each prompt's samples (arXiv:2402.04792)."""

    in_groups: ClassVar[bool] = True
    on_pairs: ClassVar[bool] = True
    name: Literal["online_dpo"] = "online_dpo"
    epochs: int = 1
    """Passes over each rollout's pairs."""
    minibatches: int = 1
    """Optimizer steps a pass."""
    kl_coef: float = 0.0
    beta: float = 0.1
    """β of the preference loss."""
    kind: PreferenceKind = "sigmoid"
    """The preference loss."""
    min_gap: float = 0.0
    """Pairs whose rewards differ by no more than this are left out (reward units)."""


@dataclass(frozen=True)
class GKDConfig(OnPolicyConfig):
    """On-policy distillation: own texts, a teacher's distributions (GKD; arXiv:2306.13649)."""

    has_teacher: ClassVar[bool] = True
    name: Literal["gkd"] = "gkd"
    beta: float = 0.5
    """Of the divergence from teacher to student: 0 is KL(teacher‖student), 1 KL(student‖teacher),
    between them the generalised Jensen-Shannon divergence; see generalised_jsd."""
    lmbda: float = 1.0
    """Probability that an iteration learns from texts that the student samples, else from the
    answers in the data (prompt and completion)."""
    aggregation: Aggregation = "token"
    """How token losses become one number; see masked.weights."""
    length: int | None = None
    """Tokens a row is divided by under ``aggregation: fixed`` (default: the row's width)."""


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
    | GKDConfig
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
