"""Algorithms that learn from responses they sample: one dataclass each, told apart by ``name``."""

from dataclasses import dataclass
from typing import ClassVar, Literal

Aggregation = Literal["token", "sequence", "sequence_sum", "fixed"]
"""How token losses become one number; masked.weights gives the formulas."""

PreferenceKind = Literal[
    "sigmoid", "robust", "ipo", "hinge", "exo_pair", "sppo_hard", "apo_zero", "apo_down"
]
"""Losses on pairs relative to a reference; preference_loss gives the formulas."""


@dataclass(frozen=True)
class OnPolicyConfig:
    """What all of them have; class variables are no settings, but what a run has to provide."""

    has_critic: ClassVar[bool] = False
    """Learns a value function."""
    has_ratio: ClassVar[bool] = True
    """Corrects for the updates since the rollout; without, a rollout is right for one update."""
    in_groups: ClassVar[bool] = False
    """Compares the samples of a prompt: sample.n is at least 2."""
    on_pairs: ClassVar[bool] = False
    """Learns from whole responses, two a prompt, instead of from tokens."""

    name: str = ""
    epochs: int = 1
    """Passes over each rollout."""
    minibatches: int = 1
    """Optimizer steps a pass."""
    aggregation: Aggregation = "token"
    """How token losses become one number; see masked.weights."""
    length: int | None = None
    """Tokens a row is divided by under ``aggregation: fixed`` (default: the row's width)."""
    old_logp: Literal["sampler", "rescore"] = "sampler"
    """Source of the ratio's denominator: the cached sampler, or a forward like the update's."""
    off_policy: Literal["none", "token", "sequence", "token_mask", "sequence_mask"] = "none"
    """Importance weights of the denominator over the sampler's draw; see importance_weights."""
    off_policy_cap: float = 2.0
    """Where these weights are cut off; with _mask, outside of [1/cap, cap] they are 0."""
    target_kl: float | None = None
    """Stop the passes over a rollout once KL(old‖new) exceeds this (nats a token)."""
    kl_coef: float = 0.05
    """β, reward units a nat. With the KL in the loss it is in standard deviations of the advantage
    a nat where advantages are divided by those and β·KL is not: PPO and A2C that
    ``whiten_advantages``, REINFORCE++; and, by each group's, GRPO, DAPO, GSPO and CISPO."""
    kl_in: Literal["reward", "loss", "exact_loss"] = "reward"
    """Where β·KL goes: into each token's reward, or into the loss (see kl_loss)."""
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
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (per nat)."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a response that was cut off (reward units)."""
    overlong_buffer: int = 0
    """Last tokens of sample.max_new_tokens, over which a length penalty grows from 0 to 1."""
    mask_truncated: bool = False
    """Leave responses that were cut off out of the loss; their rewards still count in groups."""


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """Proximal policy optimisation with a learned critic (arXiv:1707.06347, arXiv:2203.02155)."""

    has_critic: ClassVar[bool] = True
    name: Literal["ppo"] = "ppo"
    epochs: int = 2
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """λ of generalised advantage estimation (arXiv:1506.02438)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Upper bound c on the ratio where the advantage is negative (arXiv:1912.09729)."""
    value_clip: float | None = 0.2
    """The value may move this far from its old estimate (reward units); null: freely."""
    value_coef: float = 0.1
    """Weight of the value loss where critic and policy share a trunk."""
    whiten_advantages: bool = True
    """Advantages to mean 0, variance 1 over the rollout."""
    whiten_rewards: bool = False
    """Token rewards scaled to variance 1 over the rollout, mean kept."""


@dataclass(frozen=True)
class A2CConfig(OnPolicyConfig):
    """Advantage actor-critic: the policy gradient with a learned critic (arXiv:1602.01783)."""

    has_critic: ClassVar[bool] = True
    has_ratio: ClassVar[bool] = False
    name: Literal["a2c"] = "a2c"
    aggregation: Aggregation = "sequence_sum"
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """λ of generalised advantage estimation; 1: return minus value."""
    value_coef: float = 0.1
    """Weight of the value loss where critic and policy share a trunk."""
    whiten_advantages: bool = False
    """Advantages to mean 0, variance 1 over the rollout."""


@dataclass(frozen=True)
class ReinforceConfig(OnPolicyConfig):
    """REINFORCE: each token is credited with the rewards that follow it (Williams 1992)."""

    has_ratio: ClassVar[bool] = False
    name: Literal["reinforce"] = "reinforce"
    aggregation: Aggregation = "sequence_sum"
    gamma: float = 1.0
    """Discount per token."""
    baseline: Literal["none", "mean"] = "mean"
    """mean: subtract the mean return of the rollout's responses."""


@dataclass(frozen=True)
class ReMaxConfig(OnPolicyConfig):
    """ReMax: REINFORCE whose baseline is the reward of the greedy response (arXiv:2310.10505)."""

    has_ratio: ClassVar[bool] = False
    name: Literal["remax"] = "remax"
    aggregation: Aggregation = "sequence_sum"


@dataclass(frozen=True)
class RLOOConfig(OnPolicyConfig):
    """REINFORCE leave-one-out: the baseline is the mean of the other samples (arXiv:2402.14740)."""

    has_ratio: ClassVar[bool] = False
    in_groups: ClassVar[bool] = True
    name: Literal["rloo"] = "rloo"
    aggregation: Aggregation = "sequence_sum"


@dataclass(frozen=True)
class ReinforcePPConfig(OnPolicyConfig):
    """REINFORCE++: returns whitened over the whole rollout, PPO's clip (arXiv:2501.03262)."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    clip_low: float = 0.2
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""


@dataclass(frozen=True)
class GRPOConfig(OnPolicyConfig):
    """Group-relative policy optimisation (arXiv:2402.03300)."""

    in_groups: ClassVar[bool] = True
    name: Literal["grpo"] = "grpo"
    aggregation: Aggregation = "sequence"
    kl_coef: float = 0.04
    kl_in: Literal["reward", "loss", "exact_loss"] = "loss"
    clip_low: float = 0.2
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""


@dataclass(frozen=True)
class DrGRPOConfig(OnPolicyConfig):
    """GRPO without its two biases: no standard deviation, a fixed length (arXiv:2503.20783)."""

    in_groups: ClassVar[bool] = True
    name: Literal["dr_grpo"] = "dr_grpo"
    aggregation: Aggregation = "fixed"
    kl_coef: float = 0.0
    clip_low: float = 0.2
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""


@dataclass(frozen=True)
class DAPOConfig(OnPolicyConfig):
    """GRPO with a higher upper clip, token means and dynamic sampling (arXiv:2503.14476)."""

    in_groups: ClassVar[bool] = True
    name: Literal["dapo"] = "dapo"
    kl_coef: float = 0.0
    clip_low: float = 0.2
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above at 1 + clip_high."""
    rounds: int = 4
    """Most batches of prompts that are sampled until data.batch_size groups have a signal."""


@dataclass(frozen=True)
class GSPOConfig(OnPolicyConfig):
    """Group sequence policy optimisation: one ratio a response (arXiv:2507.18071)."""

    in_groups: ClassVar[bool] = True
    name: Literal["gspo"] = "gspo"
    aggregation: Aggregation = "sequence"
    kl_coef: float = 0.0
    clip_low: float = 3e-4
    """The ratio, a geometric mean over tokens, is clipped below at 1 − clip_low."""
    clip_high: float = 4e-4
    """The ratio is clipped above at 1 + clip_high."""


@dataclass(frozen=True)
class CISPOConfig(OnPolicyConfig):
    """Clipped importance weights on the policy gradient (MiniMax-M1; arXiv:2506.13585)."""

    in_groups: ClassVar[bool] = True
    name: Literal["cispo"] = "cispo"
    kl_coef: float = 0.0
    clip_low: float = 1.0
    """The weight is clipped below at 1 − clip_low; 1 leaves it free below."""
    clip_high: float = 0.2
    """The weight is clipped above at 1 + clip_high."""


@dataclass(frozen=True)
class OnlineDPOConfig(OnPolicyConfig):
    """DPO on the best and the worst of each prompt's samples (arXiv:2402.04792)."""

    has_ratio: ClassVar[bool] = False
    in_groups: ClassVar[bool] = True
    on_pairs: ClassVar[bool] = True
    name: Literal["online_dpo"] = "online_dpo"
    kl_coef: float = 0.0
    beta: float = 0.1
    """β of the preference loss."""
    kind: PreferenceKind = "sigmoid"
    """The preference loss."""
    min_gap: float = 0.0
    """Pairs whose rewards differ by no more than this are left out (reward units)."""
