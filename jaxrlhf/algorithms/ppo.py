"""Proximal policy optimisation from human feedback, with a learned critic.

Advantage actor-critic: the policy gradient, one pass over each rollout."""

from functools import partial

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.gae import explained_variance, gae
from jaxrlhf.algorithms.on_policy import (
    Credit,
    Priced,
    critic_loss,
    gradient_loss,
    needs,
    ratio_loss,
    targets_of,
)
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.algorithms import A2CConfig, PPOConfig
from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array


def ppo(config: PPOConfig) -> Algorithm:
    """PPO on the KL-regularised objective E[r(x, y)] − β·KL(π‖π_ref) (arXiv:2203.02155).

    ``targets`` turns scores into advantages: score and KL into token rewards, GAE, whitening;
    ``loss`` is the clipped policy loss minus ``entropy_coef``·entropy; ``value_loss`` is the
    critic's, before ``value_coef``. The score is paid on the last token, cut off or not, so that
    nothing follows it: no value of a state after the end is added.
    """

    def credit(priced: Priced, value_BT: Array | None = None) -> Credit:
        if config.whiten_rewards:
            scaled_BT = masked.whiten(priced.reward_BT, priced.mask_BT, shift_mean=False)
            priced = priced._replace(reward_BT=scaled_BT)
        advantage_BT, return_BT, value_BT, measured = critic_targets(
            priced, value_BT, config.gamma, config.lam
        )
        if config.whiten_advantages:
            advantage_BT = masked.whiten(advantage_BT, priced.mask_BT)
        return Credit(advantage_BT, return_BT, value_BT, measured)

    clipped = partial(
        ppo_policy_loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    critic = partial(critic_loss, clip=config.value_clip)
    targets, loss = targets_of(config, credit), ratio_loss(config, clipped)
    return Algorithm(targets, loss, critic, needs(config, "value"))


def critic_targets(
    priced: Priced, value_BT: Array | None, gamma: float, lam: float
) -> tuple[Array, Array, Array, Metrics]:
    """GAE on a priced rollout: (advantage_BT, return_BT, value_BT, metrics).

    Args:
      value_BT: [B, T], V(tokens < t) by a critic of its own; None takes the rollout's.

    Raises:
      InputError: neither has any.
    """
    mask_BT = priced.mask_BT
    value_BT = priced.rollout.value_BT if value_BT is None else value_BT
    if value_BT is None:
        raise InputError("value_BT=None: a critic is needed; pass its values or roll them out")
    value_BT = masked.fill(value_BT, mask_BT)
    advantage_BT, return_BT = gae(priced.reward_BT, value_BT, mask_BT, gamma, lam)
    return (
        advantage_BT,
        return_BT,
        value_BT,
        {
            "advantage_mean": masked.mean(advantage_BT, mask_BT),
            "return_mean": masked.mean(return_BT, mask_BT),
            "explained_variance": explained_variance(value_BT, return_BT, mask_BT),
        },
    )


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
