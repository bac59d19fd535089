"""GRPO done right: without its biases of difficulty and of length."""

from functools import partial

from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.grpo import group_targets
from jaxrlhf.algorithms.on_policy import needs, ratio_loss
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import DrGRPOConfig


def dr_grpo(config: DrGRPOConfig) -> Algorithm:
    """PPO's loss on R − mean of the prompt's samples, summed over tokens (arXiv:2503.20783).

    Not divided by the group's standard deviation, which favours questions that are nearly always or
    nearly never answered, and with ``aggregation: fixed`` not by the response's own length, which
    favours long wrong answers.
    """
    clipped = partial(ppo_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return Algorithm(
        group_targets(config, scale="none"), ratio_loss(config, clipped), needs=needs(config)
    )
