"""REINFORCE leave-one-out."""

from jaxrlhf.algorithms.algorithm import Algorithm
from jaxrlhf.algorithms.groups import rloo_advantage
from jaxrlhf.algorithms.on_policy import (
    Credit,
    Priced,
    gradient_loss,
    groups,
    needs,
    spread,
    targets_of,
)
from jaxrlhf.config.on_policy import RLOOConfig


def rloo(config: RLOOConfig) -> Algorithm:
    """Loss −log π(y|x)·(R − mean R of the prompt's other samples) (arXiv:2402.14740).

    A response is one action: R is its score minus β·Σ KL, credited to every token alike.
    """

    def credit(priced: Priced) -> Credit:
        rollout = priced.rollout
        return_QG, known_QG = groups(priced.returns(), rollout), groups(priced.valid_B, rollout)
        advantage_B = rloo_advantage(return_QG, known_QG).reshape(-1)
        return Credit(spread(advantage_B, priced.mask_BT))

    return Algorithm(targets_of(config, credit), gradient_loss(config), needs=needs(config))
