"""Clipped importance weights on the policy gradient."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.grpo import group_targets
from jaxrlhf.algorithms.on_policy import needs, penalised
from jaxrlhf.algorithms.policy_losses import cispo_loss
from jaxrlhf.config.on_policy import CISPOConfig
from jaxrlhf.types import Array, Batch, Outputs


def cispo(config: CISPOConfig) -> Algorithm:
    """−Σ weight·sg(clip(ρ))·A·log π, A as in GRPO (MiniMax-M1; arXiv:2506.13585).

    Where PPO's clip stops a token's gradient, here only its weight is bounded.
    """

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        total, metrics = cispo_loss(
            outputs.logp_BT,
            batch.old_logp_BT,
            batch.advantage_BT,
            batch.mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            weight_BT=batch.weight_BT,
        )
        return penalised(config, total, metrics, outputs, batch)

    return Algorithm(group_targets(config), loss, needs=needs(config))
