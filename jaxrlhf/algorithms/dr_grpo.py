"""GRPO done right: without its biases of difficulty and of length."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.grpo import group_targets
from jaxrlhf.algorithms.on_policy import needs, penalised
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import DrGRPOConfig
from jaxrlhf.types import Array, Batch, Outputs


def dr_grpo(config: DrGRPOConfig) -> Algorithm:
    """PPO's loss on R − mean of the prompt's samples, summed over tokens (arXiv:2503.20783).

    Not divided by the group's standard deviation, which favours questions that are nearly always or
    nearly never answered, and with ``aggregation: fixed`` not by the response's own length, which
    favours long wrong answers.
    """

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        total, metrics = ppo_policy_loss(
            outputs.logp_BT,
            batch.old_logp_BT,
            batch.advantage_BT,
            batch.mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            weight_BT=batch.weight_BT,
        )
        return penalised(config, total, metrics, outputs, batch)

    return Algorithm(group_targets(config, scale="none"), loss, needs=needs(config))
