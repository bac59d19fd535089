"""Advantage actor-critic: the policy gradient, one pass over each rollout."""

from functools import partial

import jax

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.on_policy import critic_loss, learnable, needs, penalised, price
from jaxrlhf.algorithms.policy_losses import policy_gradient_loss
from jaxrlhf.algorithms.ppo import critic_targets
from jaxrlhf.config.on_policy import A2CConfig
from jaxrlhf.types import Array, Batch, Outputs, Rollout


def a2c(config: A2CConfig) -> Algorithm:
    """Loss −E[U], U = Σ_t log π(a_t|s_t)·A_t, A by ``gae`` (arXiv:1602.01783).

    With λ = 1, A_t is the return minus the critic's value; the value loss is ½(V − R)², unclipped.
    """

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
        value_BT: Array | None = None,
    ) -> tuple[Batch, Metrics]:
        priced = price(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients)
        advantage_BT, return_BT, value_BT, measured = critic_targets(
            priced, value_BT, config.gamma, config.lam
        )
        if config.whiten_advantages:
            advantage_BT = masked.whiten(advantage_BT, priced.mask_BT)
        batch = learnable(config, priced, advantage_BT, return_BT, value_BT)
        return jax.lax.stop_gradient((batch, priced.metrics | measured))

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        total, metrics = policy_gradient_loss(
            outputs.logp_BT, batch.advantage_BT, batch.mask_BT, weight_BT=batch.weight_BT
        )
        return penalised(config, total, metrics, outputs, batch)

    return Algorithm(targets, loss, partial(critic_loss, clip=None), needs(config, "value"))
