"""Proximal policy optimisation from human feedback, with a learned critic; and A2C beside it."""

from collections.abc import Callable
from functools import partial

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.gae import explained_variance, gae, value_loss
from jaxrlhf.algorithms.on_policy import (
    Credit,
    Priced,
    gradient_loss,
    needs,
    ratio_loss,
    targets_of,
)
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.algorithms import A2CConfig, PPOConfig
from jaxrlhf.core import masked
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, Batch, Outputs


def ppo(config: PPOConfig) -> Algorithm:
    """PPO on the KL-regularised objective E[r(x, y)] − β·KL(π‖π_ref) (arXiv:2203.02155).

    ``targets`` turns scores into advantages: score and KL into token rewards, GAE, whitening;
    ``loss`` is the clipped policy loss minus ``entropy_coef``·entropy; ``value_loss`` is the
    critic's, before ``value_coef``. The score is paid on the last token, cut off or not, so that
    nothing follows it: no value of a state after the end is added.
    """
    clipped = partial(
        ppo_policy_loss,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    return Algorithm(
        targets_of(config, critic_credit(config, config.whiten_rewards)),
        ratio_loss(config, clipped),
        partial(critic_loss, clip=config.value_clip),
        needs(config, "value"),
    )


def a2c(config: A2CConfig) -> Algorithm:
    """Loss −E[U], U = Σ_t log π(a_t|s_t)·A_t, A by ``gae`` (arXiv:1602.01783).

    With λ = 1, A_t is the return minus the critic's value; the value loss is ½(V − R)², unclipped.
    """
    targets = targets_of(config, critic_credit(config))
    return Algorithm(targets, gradient_loss(config), critic_loss, needs(config, "value"))


def critic_credit(
    config: PPOConfig | A2CConfig, whiten_rewards: bool = False
) -> Callable[..., Credit]:
    """GAE on a priced rollout.

    Its ``value_BT`` is [B, T], V(tokens < t) by a critic of its own; None takes the rollout's, and
    InputError says that neither has any.
    """

    def credit(priced: Priced, value_BT: Array | None = None) -> Credit:
        mask_BT, reward_BT = priced.mask_BT, priced.reward_BT
        if whiten_rewards:
            # scaled, not moved: the sign of a reward means something
            reward_BT = masked.whiten(reward_BT, mask_BT, shift_mean=False)
        value_BT = priced.rollout.value_BT if value_BT is None else value_BT
        if value_BT is None:
            raise InputError("value_BT=None: a critic is needed; pass its values or roll them out")
        value_BT = masked.fill(value_BT, mask_BT)
        advantage_BT, return_BT = gae(reward_BT, value_BT, mask_BT, config.gamma, config.lam)
        metrics = {
            "advantage_mean": masked.mean(advantage_BT, mask_BT),
            "return_mean": masked.mean(return_BT, mask_BT),
            "explained_variance": explained_variance(value_BT, return_BT, mask_BT),
        }
        if config.whiten_advantages:
            # after the metrics, which would all be 0, and not the returns: the critic's unit stays
            advantage_BT = masked.whiten(advantage_BT, mask_BT)
        return Credit(advantage_BT, return_BT, value_BT, metrics)

    return credit


def critic_loss(outputs: Outputs, batch: Batch, clip: float | None = None) -> tuple[Array, Metrics]:
    """``value_loss`` of what a forward pass says, against a batch's returns."""
    assert outputs.value_BT is not None  # "value" is in needs
    assert batch.old_value_BT is not None
    assert batch.return_BT is not None
    arrays = (outputs.value_BT, batch.old_value_BT, batch.return_BT, batch.mask_BT)
    loss, metrics = value_loss(*arrays, clip=clip, weight_BT=batch.weight_BT)
    return loss, metrics | {"value_loss": loss}
