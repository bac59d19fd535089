"""What losses on whole answers share: their log-probs, and sums over the rows of a batch.

Direct preference optimisation and its relatives.

Direct preference optimisation on the policy's own samples.

Odds-ratio preference optimisation.

Simple preference optimisation.

Contrastive preference optimisation.

Kahneman-Tversky optimisation.

Binary classifier optimisation."""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.on_policy import groups, needs, price
from jaxrlhf.algorithms.preference_losses import (
    bco_loss,
    bco_shift,
    cpo_loss,
    kto_loss,
    orpo_loss,
    preference_loss,
    simpo_loss,
)
from jaxrlhf.config.algorithms import (
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    ORPOConfig,
    SimPOConfig,
)
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array, PreferenceBatch, Rollout


def answer_logp(logp_BCT: Array, batch: PreferenceBatch, mean: bool = False) -> Array:
    """log π(answer | prompt) of every candidate, float32 [B, C], nats; over prompt tokens nothing.

    Args:
      logp_BCT: log-prob of each token; columns where the batch's ``mask_BCT`` is 0, and rows of
        weight 0, are never read, and these rows' are 0.
      mean: divide by the answer's number of tokens.
    """
    assert batch.mask_BCT is not None  # made by whoever reads answers
    chex.assert_equal_shape([logp_BCT, batch.mask_BCT])
    over = masked.mean if mean else masked.sum
    return over(logp_BCT, batch.mask_BCT * (batch.weight_B != 0)[:, None, None], axis=2)


def reference_logp(batch: PreferenceBatch, mean: bool = False) -> Array:
    """The same under the reference."""
    assert batch.ref_logp_BCT is not None  # "reference" is in needs
    return answer_logp(batch.ref_logp_BCT, batch, mean)


def summed(
    loss_B: Array,
    metrics_B: Metrics,
    logp_BCT: Array,
    batch: PreferenceBatch,
    sft_coef: float = 0,
    chosen_B: Array | None = None,
) -> tuple[Array, Metrics]:
    """Σ weight·loss over rows, plus ``sft_coef`` times the chosen answers' ``nll``, nats a token.

    Args:
      chosen_B: [B], non-zero where candidate 0 is a chosen answer; None: everywhere.

    Returns:
      The loss, and the metrics as sums under the same weights, ``weight`` among them. Rows of
      weight 0 are never read.
    """
    weight_B = batch.weight_B

    def total(x_B: Array) -> Array:
        return (weight_B * masked.fill(x_B, weight_B)).sum()

    logp_B = answer_logp(logp_BCT, batch, mean=True)[:, 0]
    nll = -total(logp_B if chosen_B is None else masked.fill(logp_B, chosen_B))
    metrics = {name: total(x_B) for name, x_B in metrics_B.items()}
    return total(loss_B) + sft_coef * nll, {**metrics, "nll": nll, "weight": weight_B.sum()}


def dpo(config: DPOConfig) -> Algorithm:
    """``preference_loss`` on chosen and rejected answers (DPO; arXiv:2305.18290).

    The reward that is learnt without being named is β·log π/π_ref, up to a constant of the prompt.
    """

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        chosen_B, rejected_B = answer_logp(logp_BCT, batch, config.mean_logp).T
        ref_chosen_B, ref_rejected_B = reference_logp(batch, config.mean_logp).T
        loss_B, metrics_B = preference_loss(
            chosen_B,
            rejected_B,
            ref_chosen_B,
            ref_rejected_B,
            config.beta,
            config.kind,
            config.label_smoothing,
        )
        return summed(loss_B, metrics_B, logp_BCT, batch, config.sft_coef)

    needs = frozenset({"reference"})
    return Algorithm(None, loss, needs=needs, reads="pairs")


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


def orpo(config: ORPOConfig) -> Algorithm:
    """NLL of the chosen answer plus β times the log odds ratio (arXiv:2403.07691)."""

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        chosen_B, rejected_B = answer_logp(logp_BCT, batch, mean=True).T
        loss_B, metrics_B = orpo_loss(chosen_B, rejected_B, config.beta)
        return summed(loss_B, metrics_B, logp_BCT, batch, config.sft_coef)

    needs = frozenset()
    return Algorithm(None, loss, needs=needs, reads="pairs")


def simpo(config: SimPOConfig) -> Algorithm:
    """``simpo_loss`` on the answers' mean log-probs (arXiv:2405.14734)."""

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        chosen_B, rejected_B = answer_logp(logp_BCT, batch, mean=True).T
        loss_B, metrics_B = simpo_loss(chosen_B, rejected_B, config.beta, config.margin)
        return summed(loss_B, metrics_B, logp_BCT, batch, config.sft_coef)

    needs = frozenset()
    return Algorithm(None, loss, needs=needs, reads="pairs")


def cpo(config: CPOConfig) -> Algorithm:
    """DPO's loss without a reference, plus the chosen answer's NLL (arXiv:2401.08417)."""

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        chosen_B, rejected_B = answer_logp(logp_BCT, batch).T
        loss_B, metrics_B = cpo_loss(chosen_B, rejected_B, config.beta, config.label_smoothing)
        return summed(loss_B, metrics_B, logp_BCT, batch, config.sft_coef)

    needs = frozenset()
    return Algorithm(None, loss, needs=needs, reads="pairs")


def kto(config: KTOConfig) -> Algorithm:
    """``kto_loss`` on single answers labelled true or false (arXiv:2402.01306).

    Candidate 1 of each row is another row's answer to this prompt: the log-ratio of those, over the
    whole batch, is the reference point, so the batch is not cut into microbatches.
    """

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        assert batch.label_B is not None  # labelled_batch makes it
        logp_B, other_B = answer_logp(logp_BCT, batch).T
        ref_logp_B, ref_other_B = reference_logp(batch).T
        loss_B, metrics_B = kto_loss(
            logp_B,
            ref_logp_B,
            batch.label_B,
            other_B,
            ref_other_B,
            config.beta,
            config.desirable_weight,
            config.undesirable_weight,
            valid_B=batch.weight_B,
        )
        return summed(loss_B, metrics_B, logp_BCT, batch, chosen_B=batch.label_B)

    needs = frozenset({"reference"})
    return Algorithm(None, loss, needs=needs, reads="pairs")


def bco(config: BCOConfig) -> Algorithm:
    """``bco_loss`` on single answers labelled true or false (arXiv:2404.04656).

    The shift is that of the batch, which is not cut into microbatches; the paper keeps a running
    mean.
    """

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        assert batch.label_B is not None  # labelled_batch makes it
        logp_B, ref_logp_B = answer_logp(logp_BCT, batch)[:, 0], reference_logp(batch)[:, 0]
        given = (logp_B, ref_logp_B, batch.label_B, config.beta)
        shift = bco_shift(*given, batch.weight_B)
        loss_B, metrics_B = bco_loss(*given, shift, batch.weight_B)
        return summed(loss_B, metrics_B, logp_BCT, batch, chosen_B=batch.label_B)

    needs = frozenset({"reference"})
    return Algorithm(None, loss, needs=needs, reads="pairs")
