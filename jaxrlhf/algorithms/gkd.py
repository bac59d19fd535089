"""On-policy distillation: learn a teacher's next-token distributions on texts of one's own."""

from functools import partial

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics, check_shapes
from jaxrlhf.algorithms.on_policy import drawn
from jaxrlhf.config.algorithms import GKDConfig
from jaxrlhf.core import masked
from jaxrlhf.core.types import Array, Outputs, Rollout, TokenBatch


def gkd(config: GKDConfig) -> Algorithm:
    """Σ weight·D_β(teacher‖student) over the tokens of sampled texts (GKD; arXiv:2306.13649).

    No gradient flows through the sampling, as in the paper: each token's distribution is moved to
    the teacher's, not to where texts lead that the teacher knows better. At every β the optimum is
    the teacher itself, where the student can be it; β says what is given up where it cannot.
    """

    def targets(rollout: Rollout) -> tuple[TokenBatch, Metrics]:
        mask_BT = rollout.mask_BT
        batch = TokenBatch(
            token_BT=rollout.token_BT,
            attention_mask_BT=rollout.attention_mask_BT,
            weight_BT=masked.weights(mask_BT, config.aggregation, config.length),
        )
        valid_B = jnp.ones(mask_BT.shape[0], bool)
        return jax.lax.stop_gradient((batch, drawn(rollout, mask_BT, rollout.logp_BT, valid_B)))

    def loss(outputs: Outputs, batch: TokenBatch) -> tuple[Array, Metrics]:
        assert outputs.divergence_BT is not None  # "teacher" is in needs
        check_shapes(2, outputs.divergence_BT, batch.weight_BT)
        total = (batch.weight_BT * masked.fill(outputs.divergence_BT, batch.weight_BT)).sum()
        return total, {"divergence": total, "weight": batch.weight_BT.sum()}

    divergence = partial(generalised_jsd, beta=config.beta)
    return Algorithm(targets, loss, needs=frozenset({"teacher"}), divergence=divergence)


def generalised_jsd(logits: Array, teacher_logits: Array, beta: float) -> Array:
    """D_β(p‖q) = β·KL(p‖m) + (1 − β)·KL(q‖m), m = β·p + (1 − β)·q, p the teacher, q the student.

    The generalised Jensen-Shannon divergence (arXiv:2306.13649, equation 1); β = ½ is Jensen and
    Shannon's, at most log 2. At its ends it is 0, but D_β/β → KL(p‖q) as β → 0 and
    D_β/(1 − β) → KL(q‖p) as β → 1: so β = 0 stands for the forward KL(p‖q) and β = 1 for the
    reverse KL(q‖p), as in TRL. Its gradient by the student's logits, with g = (1 − β)·log(q/m), is
    q·(g − Σ q·g).

    Args:
      logits, teacher_logits: [..., V], finite; softmax makes q and p of them.
      beta: in [0, 1], a Python number.

    Returns:
      [...], nats, float32, at least 0. No gradient flows into ``teacher_logits``.

    Raises:
      ValueError: if ``beta`` is out of range.
    """
    chex.assert_equal_shape([logits, teacher_logits])
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta}: must be in [0, 1]")
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32))

    def kl(log_from: Array, log_to: Array) -> Array:
        return (jnp.exp(log_from) * (log_from - log_to)).sum(-1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
