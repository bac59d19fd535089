"""Odds-ratio preference optimisation."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.pairs import answer_logp, summed
from jaxrlhf.algorithms.reference_free_losses import orpo_loss
from jaxrlhf.config.offline import ORPOConfig
from jaxrlhf.types import Array, PreferenceBatch


def orpo(config: ORPOConfig) -> Algorithm:
    """NLL of the chosen answer plus β times the log odds ratio (arXiv:2403.07691)."""

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        chosen_B, rejected_B = answer_logp(logp_BCT, batch, mean=True).T
        loss_B, metrics_B = orpo_loss(chosen_B, rejected_B, config.beta)
        return summed(loss_B, metrics_B, logp_BCT, batch, config.sft_coef)

    needs = frozenset()
    return Algorithm(None, loss, needs=needs, reads="pairs")
