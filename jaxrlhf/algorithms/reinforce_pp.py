"""REINFORCE++: no critic, statistics of the whole rollout, PPO's clip."""

from functools import partial

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.on_policy import Credit, Priced, needs, ratio_loss, targets_of, to_go
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import ReinforcePPConfig


def reinforce_pp(config: ReinforcePPConfig) -> Algorithm:
    """Returns to go, whitened over all tokens of the rollout, in PPO's loss (arXiv:2501.03262)."""

    def credit(priced: Priced) -> Credit:
        return_BT = to_go(priced.reward_BT, priced.mask_BT)
        return Credit(masked.whiten(return_BT, priced.mask_BT))

    clipped = partial(ppo_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return Algorithm(targets_of(config, credit), ratio_loss(config, clipped), needs=needs(config))
