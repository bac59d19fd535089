"""Group-relative policy optimisation."""

from functools import partial
from typing import Literal

import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Algorithm, Targets
from jaxrlhf.algorithms.groups import group_advantage
from jaxrlhf.algorithms.on_policy import (
    Credit,
    Priced,
    groups,
    needs,
    ratio_loss,
    spread,
    targets_of,
)
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import GRPOConfig, OnPolicyConfig


def grpo(config: GRPOConfig) -> Algorithm:
    """PPO's loss on (R − mean) / (std + ε) of the prompt's samples (arXiv:2402.03300).

    The paper's KL is a k3 term in the loss (``kl_in: loss``); its gradient is that of the other
    direction (see ``kl_loss``). With ``kl_in: reward``, and k1 as by default there, the optimum is
    that of the KL-regularised objective.
    """
    clipped = partial(ppo_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return Algorithm(group_targets(config), ratio_loss(config, clipped), needs=needs(config))


def group_targets(config: OnPolicyConfig, scale: Literal["std", "none"] = "std") -> Targets:
    """The targets of the GRPO family: ``group_advantage`` of the returns, on every token alike."""

    def credit(priced: Priced) -> Credit:
        rollout = priced.rollout
        return_QG, known_QG = groups(priced.returns(), rollout), groups(priced.valid_B, rollout)
        advantage_QG = group_advantage(return_QG, known_QG, scale)
        silent = (jnp.abs(advantage_QG).max(1) == 0).mean(dtype=jnp.float32)
        advantage_BT = spread(advantage_QG.reshape(-1), priced.mask_BT)
        return Credit(advantage_BT, metrics={"groups_without_signal": silent})

    return targets_of(config, credit)
