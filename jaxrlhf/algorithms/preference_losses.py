"""The DPO family: a policy learnt from pairs of answers, against a reference, without a reward.

Each kind is a function of the implicit rewards of the two answers, β·(log π − log π_ref).
"""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Metrics
from jaxrlhf.algorithms.optimal_policy import implicit_reward
from jaxrlhf.types import Array


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
      chosen_logp_B: [B], nats, log π of the whole answer: the sum over its tokens, prompt excluded.
        Pass means over tokens, here and in the other three, for the IPO that counts per token.
      rejected_logp_B: [B], nats, of the other answer.
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
    inputs = [chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B]
    chex.assert_rank(inputs, 1)
    chex.assert_equal_shape(inputs)
    if kind not in PREFERENCE_KINDS:
        raise ValueError(f"kind={kind!r}: choose {', '.join(PREFERENCE_KINDS)}")
    check_label_smoothing(label_smoothing)
    if label_smoothing and kind not in SMOOTHED_KINDS:
        readers = ", ".join(sorted(SMOOTHED_KINDS))
        raise ValueError(f"label_smoothing={label_smoothing:g}: kind={kind!r} has none: {readers}")
    chosen_B = implicit_reward(chosen_logp_B, ref_chosen_logp_B, beta)
    rejected_B = implicit_reward(rejected_logp_B, ref_rejected_logp_B, beta)
    option = {"label_smoothing": label_smoothing} if kind in SMOOTHED_KINDS else {}
    loss_B = PREFERENCE_KINDS[kind](chosen_B, rejected_B, beta, **option)
    return loss_B, pair_metrics(chosen_B, rejected_B)


def pair_metrics(chosen_B: Array, rejected_B: Array) -> Metrics:
    """What to watch of a pair, float32 [B] each: rewards, their difference, and who won.

    Args:
      chosen_B, rejected_B: [B], rewards of the two answers.

    Returns:
      ``chosen_reward``, ``rejected_reward``, ``margin`` (chosen − rejected), all in reward units;
      ``accuracy`` (1 where the chosen answer has the higher reward, a tie counts one half).
    """
    return {
        "chosen_reward": chosen_B,
        "rejected_reward": rejected_B,
        "margin": chosen_B - rejected_B,
        "accuracy": (1 + jnp.sign(chosen_B - rejected_B)) / 2,
    }


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises ValueError unless 0 ≤ label_smoothing < ½."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: choose from 0 up to below 0.5")


def sigmoid(
    chosen_B: Array, rejected_B: Array, beta: Array | float, label_smoothing: float = 0.0
) -> Array:
    """−(1 − ε)·log σ(c − r) − ε·log σ(r − c) (DPO; arXiv:2305.18290, with ε > 0 its cDPO).

    Minimal where σ(c − r) = 1 − ε.
    """
    del beta
    margin_B = chosen_B - rejected_B
    right_B, wrong_B = -jax.nn.log_sigmoid(margin_B), -jax.nn.log_sigmoid(-margin_B)
    return (1 - label_smoothing) * right_B + label_smoothing * wrong_B


def robust(
    chosen_B: Array, rejected_B: Array, beta: Array | float, label_smoothing: float = 0.0
) -> Array:
    """(−(1 − ε)·log σ(c − r) + ε·log σ(r − c)) / (1 − 2ε) (robust DPO; arXiv:2403.00409).

    On labels of which a share ε is flipped, its mean is the DPO loss on the right ones.
    """
    del beta
    margin_B = chosen_B - rejected_B
    right_B, wrong_B = -jax.nn.log_sigmoid(margin_B), -jax.nn.log_sigmoid(-margin_B)
    return ((1 - label_smoothing) * right_B - label_smoothing * wrong_B) / (1 - 2 * label_smoothing)


def ipo(chosen_B: Array, rejected_B: Array, beta: Array | float) -> Array:
    """((c − r)/β − 1/(2β))², nats² (IPO; arXiv:2310.12036, where β is τ)."""
    return ((chosen_B - rejected_B - 0.5) / beta) ** 2


def hinge(chosen_B: Array, rejected_B: Array, beta: Array | float) -> Array:
    """max(0, 1 − (c − r)) (SLiC; arXiv:2305.10425, relative to a reference as in 2309.06657).

    The paper's margin δ is 1/β nats.
    """
    del beta
    return jax.nn.relu(1 - (chosen_B - rejected_B))


def exo_pair(
    chosen_B: Array, rejected_B: Array, beta: Array | float, label_smoothing: float
) -> Array:
    """KL((σ(c − r), σ(r − c)) ‖ (1 − ε, ε)), nats (EXO on pairs; arXiv:2402.00856, eq. 16).

    The reverse of the KL that cDPO minimises, with the same minimum; 1e-3 is a usual ε.

    Raises:
      ValueError: if ``label_smoothing`` is 0, where the loss is infinite.
    """
    del beta
    if label_smoothing == 0:
        raise ValueError("label_smoothing=0: exo_pair needs it to be > 0, 1e-3 is usual")
    log_win_B = jax.nn.log_sigmoid(chosen_B - rejected_B)
    log_lose_B = jax.nn.log_sigmoid(rejected_B - chosen_B)
    win_B = jnp.exp(log_win_B) * (log_win_B - math.log1p(-label_smoothing))
    return win_B + jnp.exp(log_lose_B) * (log_lose_B - math.log(label_smoothing))


def sppo_hard(chosen_B: Array, rejected_B: Array, beta: Array | float) -> Array:
    """(c/β − 1/(2β))² + (r/β + 1/(2β))², nats² (SPPO; arXiv:2405.00675, where 1/β is η).

    With hard labels: the chosen answer wins with probability 1, the rejected one with 0.
    """
    return ((chosen_B - 0.5) / beta) ** 2 + ((rejected_B + 0.5) / beta) ** 2


def apo_zero(chosen_B: Array, rejected_B: Array, beta: Array | float) -> Array:
    """1 − σ(c) + σ(r): the chosen up, the rejected down (APO-zero; arXiv:2408.06266)."""
    del beta
    return jax.nn.sigmoid(-chosen_B) + jax.nn.sigmoid(rejected_B)


def apo_down(chosen_B: Array, rejected_B: Array, beta: Array | float) -> Array:
    """σ(c) + 1 − σ(c − r): the chosen down, the rejected more so (APO-down; arXiv:2408.06266)."""
    del beta
    return jax.nn.sigmoid(chosen_B) + jax.nn.sigmoid(rejected_B - chosen_B)


PREFERENCE_KINDS: dict[str, Callable[..., Array]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "exo_pair": exo_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}
"""(chosen_B, rejected_B, beta) → loss_B, of implicit rewards c and r, float32 [B]."""

SMOOTHED_KINDS = frozenset({"sigmoid", "robust", "exo_pair"})
"""Those that take ``label_smoothing`` (ε) as well."""
