"""What losses on whole answers share: their log-probs, and sums over the rows of a batch."""

import chex

from jaxrlhf import masked
from jaxrlhf.algorithms.algorithm import Metrics
from jaxrlhf.types import Array, PreferenceBatch


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
