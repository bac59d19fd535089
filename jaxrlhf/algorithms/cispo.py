"""Clipped importance weights on the policy gradient."""

from functools import partial

from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.grpo import group_targets
from jaxrlhf.algorithms.on_policy import needs, ratio_loss
from jaxrlhf.algorithms.policy_losses import cispo_loss
from jaxrlhf.config.on_policy import CISPOConfig


def cispo(config: CISPOConfig) -> Algorithm:
    """−Σ weight·sg(clip(ρ))·A·log π, A as in GRPO (MiniMax-M1; arXiv:2506.13585).

    Where PPO's clip stops a token's gradient, here only its weight is bounded.
    """
    clipped = partial(cispo_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return Algorithm(group_targets(config), ratio_loss(config, clipped), needs=needs(config))
