"""Losses on whole answers: of pairs with a reference, of pairs without one, of single answers.

With a reference they read the implicit rewards of the answers, β·(log π − log π_ref). Those
without (ORPO, SimPO, CPO) leave out the negative log-likelihood that ORPO and CPO are meant with:
it is added where the whole loss is put together. KTO and BCO learn from answers one by one, each
marked as desirable or not.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Metrics, check_shapes
from jaxrlhf.algorithms.optimal_policy import implicit_reward
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array


def preference_loss(
    chosen_logp_B: Array,
    rejected_logp_B: Array,
    ref_chosen_logp_B: Array,
    ref_rejected_logp_B: Array,
    beta: Array | float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Array, Metrics]:
    """``PREFERENCE_KINDS[kind]`` of the implicit rewards c and r of the two answers of each pair.

    With c = β·(log π − log π_ref) of the chosen answer and r of the rejected one, ``sigmoid`` is
    −log σ(c − r) (DPO; arXiv:2305.18290). The formulas and papers of the others stand with their
    functions below.

    Args:
      chosen_logp_B, rejected_logp_B: [B], nats, log π of whole answers: sums over their tokens,
        prompt excluded. Pass means, here and in the other two, for the IPO that counts per token.
      ref_chosen_logp_B, ref_rejected_logp_B: [B], nats, log π_ref of the same answers; no gradient
        flows into them.
      beta: > 0, reward units a nat.
      kind: a name of ``PREFERENCE_KINDS``.
      label_smoothing: share of the pairs taken to be labelled the wrong way round, a Python number;
        read by ``sigmoid`` (then cDPO), ``robust`` and ``exo_pair`` (which needs it to be > 0).

    Returns:
      float32 [B], and the metrics of ``pair_metrics``. A row that is to be left out must hold
      numbers: its loss and gradient are those of what it holds.

    Raises:
      ValueError: if ``kind`` is unknown, or ``label_smoothing`` is not in [0, ½) or is given to a
        kind that does not read it.
    """
    check_shapes(1, chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B)
    if kind not in PREFERENCE_KINDS:
        raise ValueError(f"kind={kind!r}: choose {', '.join(PREFERENCE_KINDS)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: choose from 0 up to below 0.5")
    if label_smoothing and kind not in SMOOTHED_KINDS:
        readers = ", ".join(sorted(SMOOTHED_KINDS))
        raise ValueError(f"label_smoothing={label_smoothing:g}: kind={kind!r} has none: {readers}")
    chosen_B = implicit_reward(chosen_logp_B, ref_chosen_logp_B, beta)
    rejected_B = implicit_reward(rejected_logp_B, ref_rejected_logp_B, beta)
    option = {"label_smoothing": label_smoothing} if kind in SMOOTHED_KINDS else {}
    loss_B = PREFERENCE_KINDS[kind](chosen_B, rejected_B, beta, **option)
    return loss_B, pair_metrics(chosen_B, rejected_B)


def pair_metrics(chosen_B: Array, rejected_B: Array) -> Metrics:
    """What to watch of the rewards [B] of a pair, float32 [B] each.

    ``chosen_reward``, ``rejected_reward``, ``margin`` (chosen − rejected), all in reward units;
    ``accuracy`` (1 where the chosen answer has the higher reward, a tie counts one half).
    """
    return {
        "chosen_reward": chosen_B,
        "rejected_reward": rejected_B,
        "margin": chosen_B - rejected_B,
        "accuracy": (1 + jnp.sign(chosen_B - rejected_B)) / 2,
    }


def sigmoid(
    chosen_B: Array, rejected_B: Array, _beta: Array | float, label_smoothing: float = 0.0
) -> Array:
    """−(1 − ε)·log σ(c − r) − ε·log σ(r − c) (DPO; arXiv:2305.18290, with ε > 0 its cDPO).

    Minimal where σ(c − r) = 1 − ε.
    """
    margin_B = chosen_B - rejected_B
    right_B, wrong_B = -jax.nn.log_sigmoid(margin_B), -jax.nn.log_sigmoid(-margin_B)
    return (1 - label_smoothing) * right_B + label_smoothing * wrong_B


def robust(
    chosen_B: Array, rejected_B: Array, _beta: Array | float, label_smoothing: float = 0.0
) -> Array:
    """(−(1 − ε)·log σ(c − r) + ε·log σ(r − c)) / (1 − 2ε) (robust DPO; arXiv:2403.00409).

    On labels of which a share ε is flipped, its mean is the DPO loss on the right ones.
    """
    margin_B = chosen_B - rejected_B
    right_B, wrong_B = -jax.nn.log_sigmoid(margin_B), -jax.nn.log_sigmoid(-margin_B)
    return ((1 - label_smoothing) * right_B - label_smoothing * wrong_B) / (1 - 2 * label_smoothing)


def ipo(chosen_B: Array, rejected_B: Array, beta: Array | float) -> Array:
    """((c − r)/β − 1/(2β))², nats² (IPO; arXiv:2310.12036, where β is τ)."""
    return ((chosen_B - rejected_B - 0.5) / beta) ** 2


def hinge(chosen_B: Array, rejected_B: Array, _beta: Array | float) -> Array:
    """max(0, 1 − (c − r)) (SLiC; arXiv:2305.10425, relative to a reference as in 2309.06657).

    The paper's margin δ is 1/β nats.
    """
    return jax.nn.relu(1 - (chosen_B - rejected_B))


def exo_pair(
    chosen_B: Array, rejected_B: Array, _beta: Array | float, label_smoothing: float
) -> Array:
    """KL((σ(c − r), σ(r − c)) ‖ (1 − ε, ε)), nats (EXO on pairs; arXiv:2402.00856, eq. 16).

    The reverse of the KL that cDPO minimises, with the same minimum; 1e-3 is a usual ε.

    Raises:
      ValueError: if ``label_smoothing`` is 0, where the loss is infinite.
    """
    if label_smoothing == 0:
        raise ValueError("label_smoothing=0: exo_pair needs it to be > 0, 1e-3 is usual")
    # by logs: p·(log p − log q) stays 0 where σ underflows
    log_win_B = jax.nn.log_sigmoid(chosen_B - rejected_B)
    log_lose_B = jax.nn.log_sigmoid(rejected_B - chosen_B)
    win_B = jnp.exp(log_win_B) * (log_win_B - math.log1p(-label_smoothing))
    return win_B + jnp.exp(log_lose_B) * (log_lose_B - math.log(label_smoothing))


def sppo_hard(chosen_B: Array, rejected_B: Array, beta: Array | float) -> Array:
    """(c/β − 1/(2β))² + (r/β + 1/(2β))², nats² (SPPO; arXiv:2405.00675, where 1/β is η).

    With hard labels: the chosen answer wins with probability 1, the rejected one with 0.
    """
    return ((chosen_B - 0.5) / beta) ** 2 + ((rejected_B + 0.5) / beta) ** 2


def apo_zero(chosen_B: Array, rejected_B: Array, _beta: Array | float) -> Array:
    """1 − σ(c) + σ(r): the chosen up, the rejected down (APO-zero; arXiv:2408.06266)."""
    return jax.nn.sigmoid(-chosen_B) + jax.nn.sigmoid(rejected_B)


def apo_down(chosen_B: Array, rejected_B: Array, _beta: Array | float) -> Array:
    """σ(c) + 1 − σ(c − r): the chosen down, the rejected more so (APO-down; arXiv:2408.06266)."""
    return jax.nn.sigmoid(chosen_B) + jax.nn.sigmoid(rejected_B - chosen_B)


PREFERENCE_KINDS: dict[str, Callable[..., Array]] = {
    kind.__name__: kind
    for kind in (sigmoid, robust, ipo, hinge, exo_pair, sppo_hard, apo_zero, apo_down)
}
"""(chosen_B, rejected_B, beta) → loss_B, of implicit rewards c and r, float32 [B]."""

SMOOTHED_KINDS = frozenset({"sigmoid", "robust", "exo_pair"})
"""Those that take ``label_smoothing`` (ε) as well."""

CLOSEST = 1e-6
"""ORPO: nats that a mean log-prob is kept away from 0, where the odds are infinite."""


def orpo_loss(
    chosen_mean_logp_B: Array, rejected_mean_logp_B: Array, beta: Array | float
) -> tuple[Array, Metrics]:
    """−β·log σ(log odds(chosen) − log odds(rejected)) (ORPO's odds-ratio term; arXiv:2403.07691).

    odds = p/(1 − p), p = exp(mean log-prob). The negative log-likelihood is not part of it.

    Args:
      chosen_mean_logp_B, rejected_mean_logp_B: [B], nats a token, means over an answer's tokens;
        ≤ 0. Above −1e-6 one counts as −1e-6 in 1 − p, where the odds would be infinite.
      beta: weight of the term (λ in the paper).

    Returns:
      float32 [B], and the metrics of ``pair_metrics`` for rewards β·(mean log-prob), and
      ``log_odds_ratio`` (nats).
    """
    chosen_B, rejected_B = _pair(chosen_mean_logp_B, rejected_mean_logp_B)
    # log odds = log p − log(1 − p), by log1p(−exp) or log(−expm1), whichever keeps its digits
    log_odds_B, other_odds_B = (
        x_B - jax.nn.log1mexp(jnp.maximum(-x_B, CLOSEST)) for x_B in (chosen_B, rejected_B)
    )
    log_odds_ratio_B = log_odds_B - other_odds_B
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
      chosen_mean_logp_B, rejected_mean_logp_B: [B], nats a token, means over an answer's tokens.
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

    The negative log-likelihood is not part of it. Arguments, result and errors as in
    ``preference_loss`` with kind ``sigmoid``; the rewards of the metrics are β·log π.
    """
    # what a uniform reference says of the two answers is alike and cancels: 0 will do
    same_B = jnp.zeros_like(chosen_logp_B)
    pair = (chosen_logp_B, rejected_logp_B, same_B, same_B)
    return preference_loss(*pair, beta, "sigmoid", label_smoothing)


def _pair(chosen_B: Array, rejected_B: Array) -> tuple[Array, Array]:
    check_shapes(1, chosen_B, rejected_B)
    return chosen_B.astype(jnp.float32), rejected_B.astype(jnp.float32)


def kto_loss(
    logp_B: Array,
    ref_logp_B: Array,
    desirable_B: Array,
    kl_logp_B: Array,
    kl_ref_logp_B: Array,
    beta: Array | float,
    desirable_weight: Array | float = 1.0,
    undesirable_weight: Array | float = 1.0,
    valid_B: Array | None = None,
) -> tuple[Array, Metrics]:
    """λ·(1 − σ(±β·(d − z₀))), + for desirable answers, − for the others (KTO; arXiv:2402.01306).

    d = log π − log π_ref. The reference point z₀ = max(0, mean over the batch of the same of
    mismatched pairs, each prompt with another prompt's answer), an estimate of the KL to the
    reference in nats; no gradient flows through it. Because of z₀, losses of microbatches with
    their own mismatched pairs do not add up to that of the batch.

    Args:
      logp_B: [B], nats, log π of each answer: sum over its tokens.
      ref_logp_B: [B], nats, log π_ref of the same; no gradient flows into it.
      desirable_B: [B], non-zero where the answer is desirable.
      kl_logp_B, kl_ref_logp_B: [B], nats, of row b's prompt with the answer of another row.
      beta: > 0, reward units a nat.
      desirable_weight, undesirable_weight: λ of each class.
      valid_B: [B], non-zero on rows that count, their mismatched pair included; the others are
        never read. None: all.

    Returns:
      float32 [B] and metrics [B], all 0 in rows that do not count: those of ``unpaired_metrics``
      and ``kl``, z₀ in nats.
    """
    valid_B = _valid(valid_B, logp_B, ref_logp_B, desirable_B, kl_logp_B, kl_ref_logp_B)
    # filled first: a NaN in a row that does not count would come back in the gradient
    logp_B, ref_logp_B, kl_logp_B, kl_ref_logp_B = (
        masked.fill(x, valid_B) for x in (logp_B, ref_logp_B, kl_logp_B, kl_ref_logp_B)
    )
    # an estimate of a KL may come out negative, a KL never is
    mismatched_B = jax.lax.stop_gradient(kl_logp_B - kl_ref_logp_B)
    z0 = jnp.maximum(masked.mean(mismatched_B, valid_B), 0)
    reward_B = implicit_reward(logp_B, ref_logp_B, beta)
    gap_B = reward_B - beta * z0
    loss_B = jnp.where(
        desirable_B != 0,
        desirable_weight * jax.nn.sigmoid(-gap_B),
        undesirable_weight * jax.nn.sigmoid(gap_B),
    )
    metrics = unpaired_metrics(reward_B, desirable_B, valid_B)
    return masked.fill(loss_B, valid_B), metrics | {"kl": z0 * valid_B}


def bco_loss(
    logp_B: Array,
    ref_logp_B: Array,
    desirable_B: Array,
    beta: Array | float,
    shift: Array | float,
    valid_B: Array | None = None,
) -> tuple[Array, Metrics]:
    """−log σ(±(β·(log π − log π_ref) − δ)), + for desirable answers (BCO; arXiv:2404.04656).

    The policy is a classifier of desirable against undesirable answers. The paper's importance
    weights for prompts that differ between the two classes are weights of rows, the caller's.

    Args:
      logp_B, ref_logp_B, desirable_B, beta, valid_B: as in ``kto_loss``.
      shift: δ, reward units, scalar; the mean of ``bco_shift`` so far. No gradient flows into it.

    Returns:
      float32 [B], nats, and the metrics of ``unpaired_metrics``; 0 in rows that do not count.
    """
    valid_B = _valid(valid_B, logp_B, ref_logp_B, desirable_B)
    reward_B = implicit_reward(masked.fill(logp_B, valid_B), masked.fill(ref_logp_B, valid_B), beta)
    gap_B = reward_B - jax.lax.stop_gradient(shift)
    loss_B = -jax.nn.log_sigmoid(jnp.where(desirable_B != 0, gap_B, -gap_B))
    return masked.fill(loss_B, valid_B), unpaired_metrics(reward_B, desirable_B, valid_B)


def bco_shift(
    logp_B: Array,
    ref_logp_B: Array,
    desirable_B: Array,
    beta: Array | float,
    valid_B: Array | None = None,
) -> Array:
    """½·(mean reward of desirable answers + mean reward of the others), reward units.

    δ of ``bco_loss`` on one batch (arXiv:2404.04656); keep a running mean of it. If a class has no
    row, the mean of the other is δ.

    Args:
      logp_B, ref_logp_B, desirable_B, beta, valid_B: as in ``kto_loss``.

    Returns:
      float32 scalar, without gradient.
    """
    valid_B = _valid(valid_B, logp_B, ref_logp_B, desirable_B)
    reward_B = jax.lax.stop_gradient(implicit_reward(logp_B, ref_logp_B, beta))
    # each class by its own mean, or δ would follow the larger one
    classes = [valid_B & (desirable_B != 0), valid_B & (desirable_B == 0)]
    present = sum(class_B.any() for class_B in classes)
    return sum(masked.mean(reward_B, class_B) for class_B in classes) / jnp.maximum(present, 1)


def unpaired_metrics(reward_B: Array, desirable_B: Array, valid_B: Array) -> Metrics:
    """What to watch of the implicit rewards [B] of single answers, 0 in rows that do not count.

    ``reward``; ``desirable_reward`` and ``undesirable_reward``, the same with 0 in rows of the
    other class; ``desirable``, 1 in rows of that class: the mean reward of desirable answers is
    mean ``desirable_reward`` / mean ``desirable``. All float32 [B].
    """
    desirable_B = desirable_B != 0
    return {
        "reward": masked.fill(reward_B, valid_B),
        "desirable_reward": masked.fill(reward_B, valid_B & desirable_B),
        "undesirable_reward": masked.fill(reward_B, valid_B & ~desirable_B),
        "desirable": (valid_B & desirable_B).astype(jnp.float32),
    }


def _valid(valid_B: Array | None, *array_B: Array) -> Array:
    """The rows that count, bool, of arrays that are alike."""
    valid_B = jnp.ones(array_B[0].shape, bool) if valid_B is None else valid_B != 0
    check_shapes(1, *array_B, valid_B)
    return valid_B
