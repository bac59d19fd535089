"""Contrastive preference optimisation."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.pairs import answer_logp, summed
from jaxrlhf.algorithms.reference_free_losses import cpo_loss
from jaxrlhf.config.offline import CPOConfig
from jaxrlhf.types import Array, PreferenceBatch


def cpo(config: CPOConfig) -> Algorithm:
    """DPO's loss without a reference, plus the chosen answer's NLL (arXiv:2401.08417)."""

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        chosen_B, rejected_B = answer_logp(logp_BCT, batch).T
        loss_B, metrics_B = cpo_loss(chosen_B, rejected_B, config.beta, config.label_smoothing)
        return summed(loss_B, metrics_B, logp_BCT, batch, config.sft_coef)

    needs = frozenset()
    return Algorithm(None, loss, needs=needs, reads="pairs")
