"""Group sequence policy optimisation."""

from functools import partial

from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.grpo import group_targets
from jaxrlhf.algorithms.on_policy import needs, ratio_loss
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import GSPOConfig


def gspo(config: GSPOConfig) -> Algorithm:
    """GRPO with one ratio a response, the geometric mean over its tokens (arXiv:2507.18071).

    Clipping then takes or leaves whole responses.
    """
    clipped = partial(
        ppo_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high, ratio="sequence"
    )
    return Algorithm(group_targets(config), ratio_loss(config, clipped), needs=needs(config))
