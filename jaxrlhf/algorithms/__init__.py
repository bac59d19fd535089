"""What is learnt: arrays in, arrays out, no model.

Read ``algorithm`` (the record) and ``ppo`` (the longest one) first; the other files hold the
formulas that they are made of, a family to a file.
"""

from collections.abc import Callable
from typing import Any

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics, reweight
from jaxrlhf.algorithms.gae import explained_variance, gae
from jaxrlhf.algorithms.groups import group_advantage, rloo_advantage
from jaxrlhf.algorithms.kl import (
    KL_CONTROLLERS,
    adaptive_kl,
    bounded_exp,
    fixed_kl,
    kl_estimate,
    token_rewards,
)
from jaxrlhf.algorithms.policy_losses import entropy_bonus, policy_gradient_loss, ppo_policy_loss
from jaxrlhf.algorithms.ppo import ppo
from jaxrlhf.algorithms.reward_model import pairwise_reward_loss, reward_model
from jaxrlhf.algorithms.sft import sft
from jaxrlhf.algorithms.value_loss import value_loss

ALGORITHMS: dict[str, Callable[[Any], Algorithm]] = {
    "ppo": ppo,
    "reward_model": reward_model,
    "sft": sft,
}
"""``ALGORITHMS[config.algorithm.name](config.algorithm)`` is the algorithm of a run."""

__all__ = [
    "ALGORITHMS",
    "KL_CONTROLLERS",
    "Algorithm",
    "Metrics",
    "adaptive_kl",
    "bounded_exp",
    "entropy_bonus",
    "explained_variance",
    "fixed_kl",
    "gae",
    "group_advantage",
    "kl_estimate",
    "pairwise_reward_loss",
    "policy_gradient_loss",
    "ppo",
    "ppo_policy_loss",
    "reward_model",
    "reweight",
    "rloo_advantage",
    "sft",
    "token_rewards",
    "value_loss",
]
