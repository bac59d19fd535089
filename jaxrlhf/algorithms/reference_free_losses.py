"""ORPO, SimPO and CPO: a policy learnt from pairs of answers without a reference.

ORPO and CPO are meant with the negative log-likelihood of the chosen answer beside them. That term
is an SFT loss and is added where the whole loss is put together, not here.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Metrics
from jaxrlhf.algorithms.preference_losses import check_label_smoothing, pair_metrics, sigmoid
from jaxrlhf.types import Array

CLOSEST = 1e-6
"""ORPO: nats that a mean log-prob is kept away from 0, where the odds are infinite."""


def orpo_loss(
    chosen_mean_logp_B: Array, rejected_mean_logp_B: Array, beta: Array | float
) -> tuple[Array, Metrics]:
    """−β·log σ(log odds(chosen) − log odds(rejected)) (ORPO's odds-ratio term; arXiv:2403.07691).

    odds = p/(1 − p), p = exp(mean log-prob). The negative log-likelihood is not part of it.

    Args:
      chosen_mean_logp_B: [B], nats a token, mean over the chosen answer's tokens; ≤ 0. Above −1e-6
        it counts as −1e-6 in 1 − p, where the odds would be infinite.
      rejected_mean_logp_B: [B], nats a token, of the other answer.
      beta: weight of the term (λ in the paper).

    Returns:
      float32 [B], and the metrics of ``pair_metrics`` for rewards β·(mean log-prob), and
      ``log_odds_ratio`` (nats).
    """
    chosen_B, rejected_B = _pair(chosen_mean_logp_B, rejected_mean_logp_B)
    log_odds_ratio_B = _log_odds(chosen_B) - _log_odds(rejected_B)
    loss_B = -beta * jax.nn.log_sigmoid(log_odds_ratio_B)
    metrics = pair_metrics(beta * chosen_B, beta * rejected_B)
    return loss_B, metrics | {"log_odds_ratio": log_odds_ratio_B}


def simpo_loss(
    chosen_mean_logp_B: Array,
    rejected_mean_logp_B: Array,
    beta: Array | float,
    gamma: Array | float,
) -> tuple[Array, Metrics]:
    """−log σ(β·(chosen − rejected) − γ), of mean log-probs (SimPO; arXiv:2405.14734).

    Args:
      chosen_mean_logp_B: [B], nats a token, mean over the chosen answer's tokens.
      rejected_mean_logp_B: [B], nats a token, of the other answer.
      beta: reward units per nat a token; 2 to 10 in the paper, as means are small.
      gamma: target margin in reward units, that is after β: γ/β nats a token. Where a ratio γ/β is
        quoted instead, multiply it by β.

    Returns:
      float32 [B], nats, and the metrics of ``pair_metrics`` for rewards β·(mean log-prob).
    """
    chosen_B, rejected_B = _pair(chosen_mean_logp_B, rejected_mean_logp_B)
    metrics = pair_metrics(beta * chosen_B, beta * rejected_B)
    return -jax.nn.log_sigmoid(metrics["margin"] - gamma), metrics


def cpo_loss(
    chosen_logp_B: Array,
    rejected_logp_B: Array,
    beta: Array | float,
    label_smoothing: float = 0.0,
) -> tuple[Array, Metrics]:
    """−log σ(β·(chosen − rejected)): DPO with a uniform reference (CPO; arXiv:2401.08417).

    The negative log-likelihood is not part of it.

    Args:
      chosen_logp_B: [B], nats, sum over the chosen answer's tokens.
      rejected_logp_B: [B], nats, of the other answer.
      beta: reward units a nat.
      label_smoothing: as in ``preference_loss`` with kind ``sigmoid``.

    Returns:
      float32 [B], nats, and the metrics of ``pair_metrics`` for rewards β·log π.

    Raises:
      ValueError: if ``label_smoothing`` is not in [0, ½).
    """
    check_label_smoothing(label_smoothing)
    chosen_B, rejected_B = (beta * x_B for x_B in _pair(chosen_logp_B, rejected_logp_B))
    loss_B = sigmoid(chosen_B, rejected_B, beta, label_smoothing)
    return loss_B, pair_metrics(chosen_B, rejected_B)


def _pair(chosen_B: Array, rejected_B: Array) -> tuple[Array, Array]:
    chex.assert_rank([chosen_B, rejected_B], 1)
    chex.assert_equal_shape([chosen_B, rejected_B])
    return chosen_B.astype(jnp.float32), rejected_B.astype(jnp.float32)


def _log_odds(logp: Array) -> Array:
    """log p − log(1 − p), by log1p(−exp) or log(−expm1), whichever keeps its digits."""
    return logp - jax.nn.log1mexp(jnp.maximum(-logp, CLOSEST))
