"""A policy learnt from whole answers: DPO and its kin on pairs, KTO and BCO on single answers.

The losses of ``preference_losses``, given the log-probs of a batch's answers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Algorithm, Loss, Metrics, weighted
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
    OnlineDPOConfig,
)
from jaxrlhf.config.offline import (
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    SimPOConfig,
)
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array, PreferenceBatch, Rollout

REFERENCE = frozenset({"reference"})


def dpo(config: DPOConfig) -> Algorithm:
    """``preference_loss`` on chosen and rejected answers (DPO; arXiv:2305.18290).

    The reward that is learnt without being named is β·log π/π_ref, up to a constant of the prompt.
    """
    options = {"kind": config.kind, "label_smoothing": config.label_smoothing}
    loss = partial(preference_loss, beta=config.beta, **options)
    loss = pair_loss(loss, config.sft_coef, mean=config.mean_logp, reference=True)
    return Algorithm(None, loss, needs=REFERENCE, reads="pairs")


def online_dpo(config: OnlineDPOConfig) -> Algorithm:
    """``preference_loss`` on the best and the worst of each prompt's samples (arXiv:2402.04792).

    The rewards only rank: the KL to the reference is held by ``beta`` of the loss. Prompts whose
    best and worst differ by no more than ``min_gap``, or with fewer than two known rewards, have
    weight 0.
    """

    def targets(rollout: Rollout, *scored: Any) -> tuple[PreferenceBatch, Metrics]:
        priced = price(config, rollout, *scored)
        return_QG, known_QG = groups(priced.returns(), rollout), groups(priced.valid_B, rollout)
        # an unknown reward is neither the best nor the worst
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

    loss = pair_loss(
        partial(preference_loss, beta=config.beta, kind=config.kind), mean=False, reference=True
    )
    return Algorithm(targets, loss, needs=needs(config), reads="pairs")


def orpo(config: ORPOConfig) -> Algorithm:
    """NLL of the chosen answer plus β times the log odds ratio (arXiv:2403.07691)."""
    loss = partial(orpo_loss, beta=config.beta)
    return Algorithm(None, pair_loss(loss, config.sft_coef, mean=True), reads="pairs")


def simpo(config: SimPOConfig) -> Algorithm:
    """``simpo_loss`` on the answers' mean log-probs (arXiv:2405.14734)."""
    loss = partial(simpo_loss, beta=config.beta, gamma=config.margin)
    return Algorithm(None, pair_loss(loss, config.sft_coef, mean=True), reads="pairs")


def cpo(config: CPOConfig) -> Algorithm:
    """DPO's loss without a reference, plus the chosen answer's NLL (arXiv:2401.08417)."""
    loss = partial(cpo_loss, beta=config.beta, label_smoothing=config.label_smoothing)
    return Algorithm(None, pair_loss(loss, config.sft_coef, mean=False), reads="pairs")


def kto(config: KTOConfig) -> Algorithm:
    """``kto_loss`` on single answers labelled true or false (arXiv:2402.01306).

    Candidate 1 of each row is another row's answer to this prompt: the log-ratio of those, over the
    whole batch, is the reference point, so the batch is not cut into microbatches.
    """

    def rows(logp_BC: Array, ref_BC: Array, label_B: Array, valid_B: Array):
        (logp_B, other_B), (ref_logp_B, ref_other_B) = logp_BC.T, ref_BC.T
        weights = (config.desirable_weight, config.undesirable_weight)
        arrays = (logp_B, ref_logp_B, label_B, other_B, ref_other_B)
        return kto_loss(*arrays, config.beta, *weights, valid_B)

    return Algorithm(None, label_loss(rows), needs=REFERENCE, reads="pairs")


def bco(config: BCOConfig) -> Algorithm:
    """``bco_loss`` on single answers labelled true or false (arXiv:2404.04656).

    The shift is that of the batch, which is not cut into microbatches; the paper keeps a running
    mean.
    """

    def rows(logp_BC: Array, ref_BC: Array, label_B: Array, valid_B: Array):
        given = (logp_BC[:, 0], ref_BC[:, 0], label_B, config.beta)
        return bco_loss(*given, bco_shift(*given, valid_B), valid_B)

    return Algorithm(None, label_loss(rows), needs=REFERENCE, reads="pairs")


def pair_loss(loss: Loss, sft_coef: float = 0, *, mean: bool, reference: bool = False) -> Loss:
    """A loss [B] of the log-probs of chosen and rejected answers, ``summed`` over a batch.

    Args:
      mean: read means over an answer's tokens, not sums.
      reference: read those under the reference after those of the policy.
    """

    def of_batch(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        logp_CB = [*answer_logp(logp_BCT, batch, mean).T]
        if reference:
            logp_CB += [*reference_logp(batch, mean).T]
        return summed(*loss(*logp_CB), logp_BCT, batch, sft_coef)

    return of_batch


def label_loss(loss: Callable[[Array, Array, Array, Array], tuple[Array, Metrics]]) -> Loss:
    """A loss of (log π [B, C], log π_ref [B, C], labels, weights of the rows), ``summed``."""

    def of_batch(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        label_B = batch.label_B
        assert label_B is not None  # labelled_batch makes it
        logp_BC, ref_BC = answer_logp(logp_BCT, batch), reference_logp(batch)
        # the weights say which rows count; by how much is for the sum
        loss_B, metrics_B = loss(logp_BC, ref_BC, label_B, batch.weight_B)
        return summed(loss_B, metrics_B, logp_BCT, batch, chosen_B=label_B)

    return of_batch


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
    """``weighted`` by the batch, plus ``sft_coef`` times the chosen answers' ``nll``, nats a token.

    Args:
      chosen_B: [B], non-zero where candidate 0 is a chosen answer; None: everywhere.
    """
    logp_B = answer_logp(logp_BCT, batch, mean=True)[:, 0]
    if chosen_B is not None:
        logp_B = masked.fill(logp_B, chosen_B)
    loss, metrics = weighted(loss_B, metrics_B | {"logp": logp_B}, batch.weight_B)
    nll = -metrics.pop("logp")
    return loss + sft_coef * nll, metrics | {"nll": nll}
