"""Simple preference optimisation."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.pairs import answer_logp, summed
from jaxrlhf.algorithms.reference_free_losses import simpo_loss
from jaxrlhf.config.offline import SimPOConfig
from jaxrlhf.types import Array, PreferenceBatch


def simpo(config: SimPOConfig) -> Algorithm:
    """``simpo_loss`` on the answers' mean log-probs (arXiv:2405.14734)."""

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        chosen_B, rejected_B = answer_logp(logp_BCT, batch, mean=True).T
        loss_B, metrics_B = simpo_loss(chosen_B, rejected_B, config.beta, config.margin)
        return summed(loss_B, metrics_B, logp_BCT, batch, config.sft_coef)

    needs = frozenset()
    return Algorithm(None, loss, needs=needs, reads="pairs")
