"""The ``algorithm`` section of a config: one dataclass an algorithm, told apart by ``name``.

First those that sample, then those that learn from the rows of a file, then reward models. Each has
just the settings that it reads.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

Aggregation = Literal["token", "sequence", "sequence_sum", "fixed"]
"""How token losses become one number; masked.weights gives the formulas."""

PreferenceKind = Literal[
    "sigmoid", "robust", "ipo", "hinge", "exo_pair", "sppo_hard", "apo_zero", "apo_down"
]
"""Losses on pairs relative to a reference; preference_loss gives the formulas."""

Normalise = Literal["sum", "each"]
KLPlace = Literal["reward", "loss", "exact_loss"]
OffPolicy = Literal["none", "token", "sequence", "token_mask", "sequence_mask"]


@dataclass(frozen=True)
class OnPolicyConfig:
    """What all algorithms have that learn from responses they sample.

    Class variables are no settings. They say what a run has to provide, and stand for settings
    that only some of them read (``TokenLossConfig``, ``RatioConfig``).
    """

    name: str = ""
    has_critic: ClassVar[bool] = False
    """Learns a value function."""
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
class PPOConfig(CriticTargetsConfig, RatioConfig, TokenLossConfig, OnPolicyConfig):
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
class A2CConfig(CriticTargetsConfig, TokenLossConfig, OnPolicyConfig):
    """Advantage actor-critic: the policy gradient with a learned critic (arXiv:1602.01783)."""

    name: Literal["a2c"] = "a2c"
    aggregation: Aggregation = "sequence_sum"
    lam: float = 1.0
    whiten_advantages: bool = False


@dataclass(frozen=True)
class ReinforceConfig(TokenLossConfig, OnPolicyConfig):
    """REINFORCE: each token is credited with the rewards that follow it (Williams 1992)."""

    name: Literal["reinforce"] = "reinforce"
    aggregation: Aggregation = "sequence_sum"
    gamma: float = 1.0
    """Discount per token."""
    baseline: Literal["none", "mean"] = "mean"
    """mean: subtract the mean return of the rollout's responses."""


@dataclass(frozen=True)
class ReMaxConfig(TokenLossConfig, OnPolicyConfig):
    """ReMax: REINFORCE whose baseline is the reward of the greedy response (arXiv:2310.10505)."""

    name: Literal["remax"] = "remax"
    aggregation: Aggregation = "sequence_sum"


@dataclass(frozen=True)
class RLOOConfig(TokenLossConfig, OnPolicyConfig):
    """REINFORCE leave-one-out: the baseline is the mean of the other samples (arXiv:2402.14740)."""

    in_groups: ClassVar[bool] = True
    name: Literal["rloo"] = "rloo"
    aggregation: Aggregation = "sequence_sum"


@dataclass(frozen=True)
class ReinforcePPConfig(RatioConfig, TokenLossConfig, OnPolicyConfig):
    """REINFORCE++: returns whitened over the whole rollout, PPO's clip (arXiv:2501.03262)."""

    name: Literal["reinforce_pp"] = "reinforce_pp"


@dataclass(frozen=True)
class GRPOConfig(GroupConfig, RatioConfig, TokenLossConfig, OnPolicyConfig):
    """Group-relative policy optimisation (arXiv:2402.03300)."""

    name: Literal["grpo"] = "grpo"
    aggregation: Aggregation = "sequence"
    kl_coef: float = 0.04
    kl_in: KLPlace = "loss"


@dataclass(frozen=True)
class DrGRPOConfig(RatioConfig, TokenLossConfig, OnPolicyConfig):
    """GRPO without its two biases: no standard deviation, a fixed length (arXiv:2503.20783)."""

    in_groups: ClassVar[bool] = True
    name: Literal["dr_grpo"] = "dr_grpo"
    aggregation: Aggregation = "fixed"
    kl_coef: float = 0.0


@dataclass(frozen=True)
class DAPOConfig(GroupConfig, RatioConfig, TokenLossConfig, OnPolicyConfig):
    """GRPO with a higher upper clip, token means and dynamic sampling (arXiv:2503.14476)."""

    name: Literal["dapo"] = "dapo"
    kl_coef: float = 0.0
    clip_high: float = 0.28
    rounds: int = 4
    """Most batches of prompts that are sampled until data.batch_size groups have a signal."""


@dataclass(frozen=True)
class GSPOConfig(GroupConfig, RatioConfig, TokenLossConfig, OnPolicyConfig):
    """Group sequence policy optimisation: one ratio a response (arXiv:2507.18071)."""

    name: Literal["gspo"] = "gspo"
    aggregation: Aggregation = "sequence"
    kl_coef: float = 0.0
    clip_low: float = 3e-4
    """The ratio, a geometric mean over tokens, is clipped below at 1 − clip_low."""
    clip_high: float = 4e-4


@dataclass(frozen=True)
class CISPOConfig(GroupConfig, RatioConfig, TokenLossConfig, OnPolicyConfig):
    """Clipped importance weights on the policy gradient (MiniMax-M1; arXiv:2506.13585)."""

    name: Literal["cispo"] = "cispo"
    kl_coef: float = 0.0
    clip_low: float = 1.0
    """The weight is clipped below at 1 − clip_low; 1 leaves it free below."""


@dataclass(frozen=True)
class OnlineDPOConfig(OnPolicyConfig):
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


Rows = Literal["pairs", "completions", "labelled", "judged", "ranked", "scored", "steps"]
"""What the data holds: ``labelled`` answers are compared with answers to other prompts, ``judged``
ones, labelled as well, are not; ``ranked`` are several answers in order, ``scored`` ones have a
number each, ``steps`` a label for each step of an answer."""


@dataclass(frozen=True)
class OfflineConfig:
    """What all of them have; class variables are no settings, but what a run has to provide."""

    rows: ClassVar[Rows] = "pairs"
    has_reference: ClassVar[bool] = False
    """Compares the policy with a reference."""
    whole_batch: ClassVar[bool] = False
    """Has a mean over the batch inside its loss: no microbatches."""
    is_reward_model: ClassVar[bool] = False
    """Trains the scalar head to judge, instead of a policy to write."""
    normalise_on: ClassVar[str] = ""
    """See ``ScalarConfig``; only scores of whole answers are normalised."""

    name: str = ""


@dataclass(frozen=True)
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning: the negative log-likelihood of completions."""

    rows: ClassVar[Rows] = "completions"
    name: Literal["sft"] = "sft"
    train_on: Literal["completion", "assistant"] = "completion"
    """Of chats: imitate the completion (of ``messages``, the last turn), or all turns of the
    assistant's, those in the prompt too."""


@dataclass(frozen=True)
class DPOConfig(OfflineConfig):
    """Direct preference optimisation and its relatives on pairs (arXiv:2305.18290)."""

    has_reference: ClassVar[bool] = True
    name: Literal["dpo"] = "dpo"
    kind: PreferenceKind = "sigmoid"
    """The loss; with label_smoothing, sigmoid is cDPO."""
    beta: float = 0.1
    """β: how strongly the reference holds (nats a unit of implicit reward)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (sigmoid, robust, exo_pair)."""
    mean_logp: bool = False
    """Mean log-probs over an answer's tokens instead of sums: IPO per token."""
    sft_coef: float = 0.0
    """Weight of the negative log-likelihood of the chosen answer (nats a token)."""


@dataclass(frozen=True)
class ORPOConfig(OfflineConfig):
    """Odds-ratio preference optimisation: SFT plus an odds-ratio term (arXiv:2403.07691)."""

    name: Literal["orpo"] = "orpo"
    beta: float = 0.1
    """Weight of the odds-ratio term."""
    sft_coef: float = 1.0
    """Weight of the negative log-likelihood of the chosen answer (nats a token)."""


@dataclass(frozen=True)
class SimPOConfig(OfflineConfig):
    """Simple preference optimisation: mean log-probs, a margin, no reference (arXiv:2405.14734)."""

    name: Literal["simpo"] = "simpo"
    beta: float = 2.0
    """Scale of the mean log-prob."""
    margin: float = 1.0
    """The paper's γ: wanted difference of β·mean log-probs."""
    sft_coef: float = 0.0
    """Weight of the negative log-likelihood of the chosen answer (nats a token)."""


@dataclass(frozen=True)
class CPOConfig(OfflineConfig):
    """Contrastive preference optimisation: DPO's loss without reference (arXiv:2401.08417)."""

    name: Literal["cpo"] = "cpo"
    beta: float = 0.1
    """Scale of the summed log-prob."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""
    sft_coef: float = 1.0
    """Weight of the negative log-likelihood of the chosen answer (nats a token)."""


@dataclass(frozen=True)
class KTOConfig(OfflineConfig):
    """Kahneman-Tversky optimisation on single labelled answers (arXiv:2402.01306)."""

    rows: ClassVar[Rows] = "labelled"
    has_reference: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True
    name: Literal["kto"] = "kto"
    beta: float = 0.1
    """β: how strongly the reference holds."""
    desirable_weight: float = 1.0
    """Weight of rows labelled true."""
    undesirable_weight: float = 1.0
    """Weight of rows labelled false."""


@dataclass(frozen=True)
class BCOConfig(OfflineConfig):
    """Binary classifier optimisation on single labelled answers (arXiv:2404.04656)."""

    rows: ClassVar[Rows] = "judged"
    has_reference: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True
    name: Literal["bco"] = "bco"
    beta: float = 0.1
    """β: how strongly the reference holds."""


@dataclass(frozen=True)
class ScalarConfig:
    """Settings of reward models that give an answer one score."""

    is_reward_model: ClassVar[bool] = True
    score_l2: float = 0.0
    """Weight of the mean of score² over a row's answers."""
    normalise_on: str = ""
    """Rows of prompt and completion, the SFT policy's samples, say, whose scores are to have mean 0
    and standard deviation 1 once training ends; the first 128 are measured. Empty: scores stay as
    they are."""


@dataclass(frozen=True)
class RewardModelConfig(ScalarConfig, OfflineConfig):
    """A scalar reward model trained on preference pairs (Bradley-Terry; arXiv:2203.02155)."""

    name: Literal["reward_model"] = "reward_model"
    centre_coef: float = 0.0
    """Weight of (r_chosen + r_rejected)², which keeps scores around 0 (arXiv:2312.09244)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""


@dataclass(frozen=True)
class ListwiseRewardModelConfig(ScalarConfig, OfflineConfig):
    """A scalar reward model trained on rankings of 2 to K responses (Plackett-Luce)."""

    rows: ClassVar[Rows] = "ranked"
    name: Literal["listwise_reward_model"] = "listwise_reward_model"
    as_pairs: bool = False
    """Bradley-Terry on all pairs of unequal rank instead, each prompt with weight 1 in total."""


@dataclass(frozen=True)
class PointwiseRewardModelConfig(ScalarConfig, OfflineConfig):
    """A scalar reward model trained on answers with a score, one by one."""

    rows: ClassVar[Rows] = "scored"
    name: Literal["pointwise_reward_model"] = "pointwise_reward_model"
    kind: Literal["mse", "huber", "binary"] = "mse"
    """Regression with (r − score)², the same beyond ``delta`` linear, or cross-entropy of σ(r)
    with a label, or a score in [0, 1]."""
    delta: float = 1.0
    """Error above which the Huber loss is linear (units of the score)."""


@dataclass(frozen=True)
class ProcessRewardModelConfig(OfflineConfig):
    """A score at the end of each step of an answer (arXiv:2211.14275, arXiv:2305.20050)."""

    rows: ClassVar[Rows] = "steps"
    is_reward_model: ClassVar[bool] = True
    name: Literal["process_reward_model"] = "process_reward_model"
    separator: str = "\n"
    """Text between two steps: joins a row's steps, and cuts what a policy has sampled."""
    aggregate: Literal["min", "product", "last"] = "min"
    """An answer's reward: least, product or last of its steps' probabilities of being right."""
    score_l2: float = 0.0
    """Weight of the mean of score² (a log-odds, squared) over a row's steps."""


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
