"""Kahneman-Tversky optimisation."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.pairs import answer_logp, reference_logp, summed
from jaxrlhf.algorithms.unpaired_losses import kto_loss
from jaxrlhf.config.offline import KTOConfig
from jaxrlhf.types import Array, PreferenceBatch


def kto(config: KTOConfig) -> Algorithm:
    """``kto_loss`` on single answers labelled true or false (arXiv:2402.01306).

    Candidate 1 of each row is another row's answer to this prompt: the log-ratio of those, over the
    whole batch, is the reference point, so the batch is not cut into microbatches.
    """

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        assert batch.label_B is not None  # labelled_batch makes it
        logp_B, other_B = answer_logp(logp_BCT, batch).T
        ref_logp_B, ref_other_B = reference_logp(batch).T
        loss_B, metrics_B = kto_loss(
            logp_B,
            ref_logp_B,
            batch.label_B,
            other_B,
            ref_other_B,
            config.beta,
            config.desirable_weight,
            config.undesirable_weight,
            valid_B=batch.weight_B,
        )
        return summed(loss_B, metrics_B, logp_BCT, batch, chosen_B=batch.label_B)

    needs = frozenset({"reference"})
    return Algorithm(None, loss, needs=needs, reads="pairs")
