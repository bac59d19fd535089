"""Binary classifier optimisation."""

from jaxrlhf.algorithms.algorithm import Algorithm, Metrics
from jaxrlhf.algorithms.pairs import answer_logp, reference_logp, summed
from jaxrlhf.algorithms.unpaired_losses import bco_loss, bco_shift
from jaxrlhf.config.offline import BCOConfig
from jaxrlhf.types import Array, PreferenceBatch


def bco(config: BCOConfig) -> Algorithm:
    """``bco_loss`` on single answers labelled true or false (arXiv:2404.04656).

    The shift is that of the batch, which is not cut into microbatches; the paper keeps a running
    mean.
    """

    def loss(logp_BCT: Array, batch: PreferenceBatch) -> tuple[Array, Metrics]:
        assert batch.label_B is not None  # labelled_batch makes it
        logp_B, ref_logp_B = answer_logp(logp_BCT, batch)[:, 0], reference_logp(batch)[:, 0]
        given = (logp_B, ref_logp_B, batch.label_B, config.beta)
        shift = bco_shift(*given, batch.weight_B)
        loss_B, metrics_B = bco_loss(*given, shift, batch.weight_B)
        return summed(loss_B, metrics_B, logp_BCT, batch, chosen_B=batch.label_B)

    needs = frozenset({"reference"})
    return Algorithm(None, loss, needs=needs, reads="pairs")
