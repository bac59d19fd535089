"""Group sequence policy optimisation."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.grpo import group_targets
from jaxrlhf.algorithms.on_policy import needs, penalised
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import GSPOConfig
from jaxrlhf.types import Array, Batch, Outputs


def gspo(config: GSPOConfig) -> Algorithm:
    """GRPO with one ratio a response, the geometric mean over its tokens (arXiv:2507.18071).

    Clipping then takes or leaves whole responses.
    """

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        total, metrics = ppo_policy_loss(
            outputs.logp_BT,
            batch.old_logp_BT,
            batch.advantage_BT,
            batch.mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            ratio="sequence",
            weight_BT=batch.weight_BT,
        )
        return penalised(config, total, metrics, outputs, batch)

    return Algorithm(group_targets(config), loss, needs=needs(config))
