from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from responses import answers, pair_batch

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config.algorithms import BCOConfig

bco = ALGORITHMS["bco"]


def labelled():
    """(logp, batch): log-ratios ½, −½, 1½, the second undesirable; a row of weight 0.

    Candidate 1, which KTO reads, holds what would be seen.
    """
    other = [-40.0]
    logp = answers(
        [[-0.4, -0.6], other], [[-0.5, -0.5, -1], other], [[0.0], other], [[-70.0], other]
    )
    ref = answers([[-1, -0.5], [-1.0]], [[-0.5] * 3, [-1.0]], [[-1.5], [-1.0]], [[-10.0], [-1.0]])
    lengths = [[2, 1], [3, 1], [1, 1], [1, 1]]
    return logp, pair_batch(ref, lengths, [1 / 3, 1 / 3, 1 / 3, 0], jnp.array([1.0, 0, 1, 0]))


def test_bco_loss_hand_computed():
    """Rewards .05, .15 | −.05: δ = (.1 − .05)/2; gaps .025, .125 and, undesirable, .075."""
    loss, metrics = bco(BCOConfig()).loss(*labelled())
    gaps = np.array([0.025, 0.075, 0.125])
    np.testing.assert_allclose(loss, np.log1p(np.exp(-gaps)).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward"], 0.05, rtol=1e-5)
    np.testing.assert_allclose(metrics["desirable_reward"], 0.2 / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["undesirable_reward"], -0.05 / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["desirable"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"], (1 / 2 + 0) / 3, rtol=1e-6)


def test_bco_loss_beta():
    loss, _ = bco(BCOConfig(beta=1.0)).loss(*labelled())
    gaps = np.array([0.25, 0.75, 1.25])
    np.testing.assert_allclose(loss, np.log1p(np.exp(-gaps)).mean(), rtol=1e-6)


def test_bco_loss_at_the_reference():
    """ln 2; slopes ∓β/2 on the tokens of the answers, and none through the shift."""
    logp, batch = labelled()
    same = replace(batch, ref_logp_BCT=logp)
    loss, gradient = jax.value_and_grad(lambda x: bco(BCOConfig()).loss(x, same)[0])(logp)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    wanted = np.zeros((4, 2, 4))
    wanted[0, 0, 1:3], wanted[1, 0, 1:4], wanted[2, 0, 1] = -0.05 / 3, 0.05 / 3, -0.05 / 3
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-9)


def test_bco_loss_shift_of_rewards_is_taken_off():
    """A nat more on every answer changes δ and nothing else."""
    logp, batch = labelled()
    wanted, _ = bco(BCOConfig()).loss(logp, batch)
    moved, metrics = bco(BCOConfig()).loss(logp.at[:, 0, 1].add(1), batch)
    np.testing.assert_allclose(moved, wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward"], 0.15, rtol=1e-5)
