"""REINFORCE++: no critic, statistics of the whole rollout, PPO's clip."""

import jax

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.on_policy import learnable, needs, penalised, price, to_go
from jaxrlhf.algorithms.policy_losses import ppo_policy_loss
from jaxrlhf.config.on_policy import ReinforcePPConfig
from jaxrlhf.types import Array, Batch, Outputs, Rollout


def reinforce_pp(config: ReinforcePPConfig) -> Algorithm:
    """Returns to go, whitened over all tokens of the rollout, in PPO's loss (arXiv:2501.03262)."""

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
    ) -> tuple[Batch, Metrics]:
        priced = price(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients)
        return_BT = to_go(priced.reward_BT, priced.mask_BT)
        advantage_BT = masked.whiten(return_BT, priced.mask_BT)
        return jax.lax.stop_gradient((learnable(config, priced, advantage_BT), priced.metrics))

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

    return Algorithm(targets, loss, needs=needs(config))
