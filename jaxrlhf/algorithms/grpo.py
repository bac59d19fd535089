"""Group-relative policy optimisation."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics, Targets
from jaxrlhf.algorithms.groups import group_advantage
from jaxrlhf.algorithms.on_policy import groups, learnable, needs, penalised, price, spread
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import GRPOConfig, OnPolicyConfig
from jaxrlhf.types import Array, Batch, Outputs, Rollout


def grpo(config: GRPOConfig) -> Algorithm:
    """PPO's loss on (R − mean) / (std + ε) of the prompt's samples (arXiv:2402.03300).

    The paper's KL is a k3 term in the loss (``kl_in: loss``); its gradient is that of the other
    direction (see ``kl_loss``). With ``kl_in: reward`` the optimum is that of the KL-regularised
    objective.
    """

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        total, metrics = ppo_policy_loss(
            outputs.logp_BT,
            batch.old_logp_BT,
            batch.advantage_BT,
            batch.mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            weight_BT=batch.weight_BT,
        )
        return penalised(config, total, metrics, outputs, batch)

    return Algorithm(group_targets(config), loss, needs=needs(config))


def group_targets(config: OnPolicyConfig, scale: Literal["std", "none"] = "std") -> Targets:
    """The targets of the GRPO family: ``group_advantage`` of the returns, on every token alike."""

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
    ) -> tuple[Batch, Metrics]:
        priced = price(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients)
        return_QG, known_QG = groups(priced.returns(), rollout), groups(priced.valid_B, rollout)
        advantage_QG = group_advantage(return_QG, known_QG, scale)
        silent = (jnp.abs(advantage_QG).max(1) == 0).mean(dtype=jnp.float32)
        batch = learnable(config, priced, spread(advantage_QG.reshape(-1), priced.mask_BT))
        return jax.lax.stop_gradient((batch, priced.metrics | {"groups_without_signal": silent}))

    return targets
