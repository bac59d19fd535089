"""Advantage actor-critic: the policy gradient, one pass over each rollout."""

from functools import partial

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.on_policy import (
    Credit,
    Priced,
    critic_loss,
    gradient_loss,
    needs,
    targets_of,
)
from jaxrlhf.algorithms.ppo import critic_targets
from jaxrlhf.config.on_policy import A2CConfig
from jaxrlhf.types import Array


def a2c(config: A2CConfig) -> Algorithm:
    """Loss −E[U], U = Σ_t log π(a_t|s_t)·A_t, A by ``gae`` (arXiv:1602.01783).

    With λ = 1, A_t is the return minus the critic's value; the value loss is ½(V − R)², unclipped.
    """

    def credit(priced: Priced, value_BT: Array | None = None) -> Credit:
        advantage_BT, return_BT, value_BT, measured = critic_targets(
            priced, value_BT, config.gamma, config.lam
        )
        if config.whiten_advantages:
            advantage_BT = masked.whiten(advantage_BT, priced.mask_BT)
        return Credit(advantage_BT, return_BT, value_BT, measured)

    return Algorithm(
        targets_of(config, credit),
        gradient_loss(config),
        partial(critic_loss, clip=None),
        needs(config, "value"),
    )
