"""What is learnt: arrays in, arrays out, no model.

Read ``algorithm`` (the record) and ``ppo`` (the longest one) first; the other files hold the
formulas that they are made of, a family to a file.
"""

from collections.abc import Callable
from typing import Any

from jaxrlhf.algorithms.a2c import a2c
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics, reweight
from jaxrlhf.algorithms.bco import bco
from jaxrlhf.algorithms.cispo import cispo
from jaxrlhf.algorithms.cpo import cpo
from jaxrlhf.algorithms.dapo import dapo
from jaxrlhf.algorithms.dpo import dpo
from jaxrlhf.algorithms.dr_grpo import dr_grpo
from jaxrlhf.algorithms.ensemble import ensemble_score
from jaxrlhf.algorithms.gae import explained_variance, gae
from jaxrlhf.algorithms.groups import group_advantage, rloo_advantage
from jaxrlhf.algorithms.grpo import grpo
from jaxrlhf.algorithms.gspo import gspo
from jaxrlhf.algorithms.kl import (
    KL_CONTROLLERS,
    adaptive_kl,
    bounded_exp,
    fixed_kl,
    kl_estimate,
    kl_kind,
    kl_loss,
    token_rewards,
)
from jaxrlhf.algorithms.kto import kto
from jaxrlhf.algorithms.listwise import (
    listwise_reward_loss,
    listwise_reward_model,
    ranked_accuracy,
    ranked_pairs_loss,
)
from jaxrlhf.algorithms.off_policy import importance_weights
from jaxrlhf.algorithms.online_dpo import online_dpo
from jaxrlhf.algorithms.optimal_policy import (
    best_of_n_kl,
    best_of_n_logp,
    implicit_reward,
    importance_resample,
    log_z_estimate,
    optimal_policy,
    resampling_kl,
)
from jaxrlhf.algorithms.orpo import orpo
from jaxrlhf.algorithms.pointwise import pointwise_reward_loss, pointwise_reward_model
from jaxrlhf.algorithms.policy_losses import (
    cispo_loss,
    entropy_bonus,
    policy_gradient_loss,
    ppo_policy_loss,
)
from jaxrlhf.algorithms.ppo import ppo
from jaxrlhf.algorithms.preference_losses import PREFERENCE_KINDS, preference_loss
from jaxrlhf.algorithms.process import (
    aggregate_steps,
    process_reward_loss,
    process_reward_model,
)
from jaxrlhf.algorithms.reference_free_losses import cpo_loss, orpo_loss, simpo_loss
from jaxrlhf.algorithms.reinforce import reinforce
from jaxrlhf.algorithms.reinforce_pp import reinforce_pp
from jaxrlhf.algorithms.remax import greedy_baseline, remax
from jaxrlhf.algorithms.reward_model import pairwise_reward_loss, reward_model
from jaxrlhf.algorithms.rloo import rloo
from jaxrlhf.algorithms.sft import sft
from jaxrlhf.algorithms.simpo import simpo
from jaxrlhf.algorithms.unpaired_losses import bco_loss, bco_shift, kto_loss
from jaxrlhf.algorithms.value_loss import value_loss

ALGORITHMS: dict[str, Callable[[Any], Algorithm]] = {
    "ppo": ppo,
    "a2c": a2c,
    "reinforce": reinforce,
    "remax": remax,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "online_dpo": online_dpo,
    "reward_model": reward_model,
    "listwise_reward_model": listwise_reward_model,
    "pointwise_reward_model": pointwise_reward_model,
    "process_reward_model": process_reward_model,
    "sft": sft,
    "dpo": dpo,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
    "kto": kto,
    "bco": bco,
}
"""``ALGORITHMS[config.algorithm.name](config.algorithm)`` is the algorithm of a run."""

__all__ = [
    "ALGORITHMS",
    "KL_CONTROLLERS",
    "PREFERENCE_KINDS",
    "Algorithm",
    "Metrics",
    "a2c",
    "adaptive_kl",
    "aggregate_steps",
    "bco",
    "bco_loss",
    "bco_shift",
    "best_of_n_kl",
    "best_of_n_logp",
    "bounded_exp",
    "cispo",
    "cispo_loss",
    "cpo",
    "cpo_loss",
    "dapo",
    "dpo",
    "dr_grpo",
    "ensemble_score",
    "entropy_bonus",
    "explained_variance",
    "fixed_kl",
    "gae",
    "greedy_baseline",
    "group_advantage",
    "grpo",
    "gspo",
    "implicit_reward",
    "importance_resample",
    "importance_weights",
    "kl_estimate",
    "kl_kind",
    "kl_loss",
    "kto",
    "kto_loss",
    "listwise_reward_loss",
    "listwise_reward_model",
    "log_z_estimate",
    "online_dpo",
    "optimal_policy",
    "orpo",
    "orpo_loss",
    "pairwise_reward_loss",
    "pointwise_reward_loss",
    "pointwise_reward_model",
    "policy_gradient_loss",
    "ppo",
    "ppo_policy_loss",
    "preference_loss",
    "process_reward_loss",
    "process_reward_model",
    "ranked_accuracy",
    "ranked_pairs_loss",
    "reinforce",
    "reinforce_pp",
    "remax",
    "resampling_kl",
    "reward_model",
    "reweight",
    "rloo",
    "rloo_advantage",
    "sft",
    "simpo",
    "simpo_loss",
    "token_rewards",
    "value_loss",
]
