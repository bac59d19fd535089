"""Decoupled clip and dynamic sampling policy optimisation."""

from functools import partial

from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.grpo import group_targets
from jaxrlhf.algorithms.on_policy import needs, ratio_loss
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import DAPOConfig


def dapo(config: DAPOConfig) -> Algorithm:
    """GRPO with ``clip_high`` > ``clip_low`` and token means (arXiv:2503.14476).

    The loop samples on until data.batch_size groups have a signal (``rounds``); ``overlong_buffer``
    and ``mask_truncated`` are the paper's soft penalty and filter for long responses.
    """
    clipped = partial(ppo_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return Algorithm(group_targets(config), ratio_loss(config, clipped), needs=needs(config))
