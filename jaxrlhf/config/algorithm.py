"""What is learnt, and how: one dataclass an algorithm, told apart by ``name``."""

from dataclasses import dataclass
from typing import Literal

Aggregation = Literal["token", "sequence", "sequence_sum", "fixed"]
"""How token losses become one number; masked.weights gives the formulas."""


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation with a learned critic (arXiv:1707.06347, arXiv:2203.02155)."""

    name: Literal["ppo"] = "ppo"
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
    value_clip: float = 0.2
    """The value may move this far from its old estimate (reward units)."""
    value_coef: float = 0.1
    """Weight of the value loss where critic and policy share a trunk."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (per nat)."""
    aggregation: Aggregation = "token"
    """How token losses become one number; see masked.weights."""
    length: int | None = None
    """Tokens a row is divided by under ``aggregation: fixed`` (default: the row's width)."""
    epochs: int = 2
    """Passes over each rollout."""
    minibatches: int = 1
    """Optimizer steps a pass."""
    old_logp: Literal["sampler", "rescore"] = "sampler"
    """Source of the ratio's denominator: the cached sampler, or a forward like the update's."""
    target_kl: float | None = None
    """Stop the passes over a rollout once KL(old‖new) exceeds this (nats a token)."""
    kl_coef: float = 0.05
    """β, reward units a nat: the per-token reward is −β·kl."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL to the reference."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: β follows ``kl_target`` (arXiv:1909.08593)."""
    kl_target: float = 6.0
    """Wanted KL, nats a sequence (adaptive controller)."""
    kl_horizon: float = 10_000.0
    """Sequences over which the adaptive controller acts."""
    whiten_advantages: bool = True
    """Advantages to mean 0, variance 1 over the rollout."""
    whiten_rewards: bool = False
    """Token rewards scaled to variance 1 over the rollout, mean kept."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a response that was cut off (reward units)."""
    bootstrap_truncated: bool = False
    """A response that was cut off is credited with the critic's value of its last state."""


@dataclass(frozen=True)
class RewardModelConfig:
    """A scalar reward model trained on preference pairs (Bradley-Terry; arXiv:2203.02155)."""

    name: Literal["reward_model"] = "reward_model"
    centre_coef: float = 0.0
    """Weight of (r_chosen + r_rejected)², which keeps scores around 0 (arXiv:2312.09244)."""


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: the negative log-likelihood of completions."""

    name: Literal["sft"] = "sft"


AlgorithmConfig = PPOConfig | RewardModelConfig | SFTConfig
