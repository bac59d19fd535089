"""Decoupled clip and dynamic sampling policy optimisation."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.grpo import group_targets
from jaxrlhf.algorithms.on_policy import needs, penalised
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import DAPOConfig
from jaxrlhf.types import Array, Batch, Outputs


def dapo(config: DAPOConfig) -> Algorithm:
    """GRPO with ``clip_high`` > ``clip_low`` and token means (arXiv:2503.14476).

    The loop samples on until data.batch_size groups have a signal (``rounds``); ``overlong_buffer``
    and ``mask_truncated`` are the paper's soft penalty and filter for long responses.
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

    return Algorithm(group_targets(config), loss, needs=needs(config))
