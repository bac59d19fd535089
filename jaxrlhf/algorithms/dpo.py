"""Direct preference optimisation and its relatives."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.pairs import answer_logp, reference_logp, summed
from jaxrlhf.algorithms.preference_losses import preference_loss
from jaxrlhf.config.offline import DPOConfig
from jaxrlhf.types import Array, PreferenceBatch


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
