"""REINFORCE leave-one-out."""

import jax

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.groups import rloo_advantage
from jaxrlhf.algorithms.on_policy import groups, learnable, needs, penalised, price, spread
from jaxrlhf.algorithms.policy_losses import policy_gradient_loss
from jaxrlhf.config.on_policy import RLOOConfig
from jaxrlhf.types import Array, Batch, Outputs, Rollout


def rloo(config: RLOOConfig) -> Algorithm:
    """Loss −log π(y|x)·(R − mean R of the prompt's other samples) (arXiv:2402.14740).

    A response is one action: R is its score minus β·Σ KL, credited to every token alike.
    """

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
    ) -> tuple[Batch, Metrics]:
        priced = price(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients)
        return_QG, known_QG = groups(priced.returns(), rollout), groups(priced.valid_B, rollout)
        advantage_B = rloo_advantage(return_QG, known_QG).reshape(-1)
        batch = learnable(config, priced, spread(advantage_B, priced.mask_BT))
        return jax.lax.stop_gradient((batch, priced.metrics))

    def loss(outputs: Outputs, batch: Batch) -> tuple[Array, Metrics]:
        total, metrics = policy_gradient_loss(
            outputs.logp_BT, batch.advantage_BT, batch.mask_BT, weight_BT=batch.weight_BT
        )
        return penalised(config, total, metrics, outputs, batch)

    return Algorithm(targets, loss, needs=needs(config))
