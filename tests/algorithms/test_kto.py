from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import answers, pair_batch

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config.algorithms import KTOConfig

kto = ALGORITHMS["kto"]
LENGTHS = [[2, 1], [3, 2], [1, 1]]


def labelled():
    """(logp, batch): log-ratios ½ and −½, of mismatched answers 1 and −½; a row of weight 0.

    The first answer is desirable, the second is not.
    """
    logp = answers([[-0.4, -0.6], [-1.0]], [[-0.5, -0.5, -1], [-1, -2]], [[-30.0], [-50.0]])
    ref = answers([[-1, -0.5], [-2.0]], [[-0.5] * 3, [-2, -0.5]], [[-70.0], [-10.0]])
    return logp, pair_batch(ref, LENGTHS, [0.5, 0.5, 0], jnp.array([1.0, 0, 1]))


@pytest.mark.parametrize(
    ("config", "weights"),
    [(KTOConfig(), (1, 1)), (KTOConfig(desirable_weight=2.0, undesirable_weight=3.0), (2, 3))],
)
def test_kto_loss_hand_computed(config, weights):
    """z₀ = ¼: σ(−.1·(½ − ¼)) and σ(.1·(−½ − ¼)), times their weights."""
    loss, metrics = kto(config).loss(*labelled())
    wanted = (weights[0] * 0.4937503 + weights[1] * 0.4812588) / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    wanted = {
        "reward": 0,
        "desirable_reward": 0.025,
        "undesirable_reward": -0.025,
        "desirable": 0.5,
        "kl": 0.25,
        "nll": 1 / 2 / 2,
        "weight": 1,
    }
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_kto_loss_beta():
    loss, _ = kto(KTOConfig(beta=1.0)).loss(*labelled())
    wanted = (1 / (1 + np.exp(0.25)) + 1 / (1 + np.exp(0.75))) / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_kto_loss_at_the_reference():
    """½ each; slopes ∓λβ/4 on the tokens of the answers, none on those of mismatched ones."""
    logp, batch = labelled()
    config = KTOConfig(desirable_weight=2.0, undesirable_weight=3.0)
    same = replace(batch, ref_logp_BCT=logp)
    loss, gradient = jax.value_and_grad(lambda x: kto(config).loss(x, same)[0])(logp)
    np.testing.assert_allclose(loss, 2.5 / 2, rtol=1e-6)
    wanted = np.zeros((3, 2, 4))
    wanted[0, 0, 1:3], wanted[1, 0, 1:4] = -0.05 / 2, 0.075 / 2
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-9)


def test_kto_nll_is_that_of_desirable_answers():
    """The desirable answer gains a nat a token, the other loses one: only the first is counted."""
    logp, batch = labelled()
    _, before = kto(KTOConfig()).loss(logp, batch)
    _, after = kto(KTOConfig()).loss(logp.at[0].add(1).at[1].add(-1), batch)
    np.testing.assert_allclose(after["nll"] - before["nll"], -0.5, rtol=1e-6)
    np.testing.assert_allclose(after["desirable"], 0.5, rtol=1e-6)


def test_kto_loss_reads_the_candidates_in_their_order():
    """Swapped, the mismatched answers' log-ratios 1 and −½ are judged, and z₀ is 0."""
    logp, batch = labelled()
    swapped = pair_batch(
        batch.ref_logp_BCT[:, ::-1], [n[::-1] for n in LENGTHS], batch.weight_B, batch.label_B
    )
    loss, metrics = kto(KTOConfig()).loss(logp[:, ::-1], swapped)
    wanted = (1 / (1 + np.exp(0.1)) + 1 / (1 + np.exp(0.05))) / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert metrics["kl"] == 0
