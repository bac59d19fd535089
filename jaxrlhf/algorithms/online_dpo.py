"""Direct preference optimisation on the policy's own samples."""

import jax
import jax.numpy as jnp

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.on_policy import groups, needs, price
from jaxrlhf.algorithms.pairs import answer_logp, reference_logp, summed
from jaxrlhf.algorithms.preference_losses import preference_loss
from jaxrlhf.config.on_policy import OnlineDPOConfig
from jaxrlhf.types import Array, PreferenceBatch, Rollout


def online_dpo(config: OnlineDPOConfig) -> Algorithm:
    """``preference_loss`` on the best and the worst of each prompt's samples (arXiv:2402.04792).

    The rewards only rank: the KL to the reference is held by ``beta`` of the loss. Prompts whose
    best and worst differ by no more than ``min_gap``, or with fewer than two known rewards, have
    weight 0.
    """

    def targets(
        rollout: Rollout,
        ref_logp_BT: Array,
        reward_B: Array,
        valid_B: Array,
        coefficients: dict[str, Array],
    ) -> tuple[PreferenceBatch, Metrics]:
        priced = price(config, rollout, ref_logp_BT, reward_B, valid_B, coefficients)
        return_QG, known_QG = groups(priced.returns(), rollout), groups(priced.valid_B, rollout)
        best_Q = jnp.argmax(masked.fill(return_QG, known_QG, -jnp.inf), axis=1)
        worst_Q = jnp.argmin(masked.fill(return_QG, known_QG, jnp.inf), axis=1)
        row_QC = jnp.stack([best_Q, worst_Q], 1) + jnp.arange(len(best_Q))[:, None] * rollout.n
        end_QC = priced.returns()[row_QC]
        gap_Q = jnp.where(known_QG.sum(1) > 1, end_QC[:, 0] - end_QC[:, 1], 0)
        counts_Q = (gap_Q > config.min_gap).astype(jnp.float32)
        batch = PreferenceBatch(
            token_BCT=rollout.token_BT[row_QC],
            attention_mask_BCT=rollout.attention_mask_BT[row_QC],
            margin_B=jnp.zeros_like(gap_Q),
            weight_B=counts_Q / jnp.maximum(counts_Q.sum(), 1),
            mask_BCT=priced.mask_BT[row_QC],
            ref_logp_BCT=priced.ref_logp_BT[row_QC],
        )
        measured = {"gap": masked.mean(gap_Q, counts_Q), "pairs": counts_Q.sum()}
        return jax.lax.stop_gradient((batch, priced.metrics | measured))

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        chosen_B, rejected_B = answer_logp(logp_BCT, batch).T
        ref_chosen_B, ref_rejected_B = reference_logp(batch).T
        loss_B, metrics_B = preference_loss(
            chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, config.beta, config.kind
        )
        return summed(loss_B, metrics_B, logp_BCT, batch)

    return Algorithm(targets, loss, needs=needs(config), reads="pairs")
