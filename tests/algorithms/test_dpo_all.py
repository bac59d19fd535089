"""Sums over answers; and what holds for every algorithm that reads them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from responses import answers, assert_tree_close, one_pair, pair_batch

from jaxrlhf.algorithms import ALGORITHMS, reweight
from jaxrlhf.algorithms.dpo import answer_logp, reference_logp, summed
from jaxrlhf.config import OnlineDPOConfig
from jaxrlhf.config.offline import (
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    SimPOConfig,
)

CONFIGS = {
    "dpo": DPOConfig(sft_coef=0.3),
    "cdpo": DPOConfig(label_smoothing=0.1),
    "ipo": DPOConfig(kind="ipo", mean_logp=True),
    "sppo": DPOConfig(kind="sppo_hard"),
    "online_dpo": OnlineDPOConfig(kind="hinge"),
    "orpo": ORPOConfig(),
    "simpo": SimPOConfig(sft_coef=0.3),
    "cpo": CPOConfig(label_smoothing=0.1),
    "kto": KTOConfig(desirable_weight=1.3),
    "bco": BCOConfig(),
}
FREE = ("orpo", "simpo", "cpo")
"""Without a reference."""

ALL = pytest.mark.parametrize("name", CONFIGS)
REFERENCE = pytest.mark.parametrize("name", [n for n in CONFIGS if n not in FREE])
PAIRED = pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("kto", "bco")])
"""Without a mean over the batch inside."""

LENGTHS = [[3, 1], [2, 2], [1, 3], [2, 3]]


def pairs():
    """(logp, batch): four pairs of unequal lengths, the third of weight 0."""
    logp, ref = -jnp.exp(jax.random.normal(jax.random.key(0), (2, 4, 2, 4)))
    batch = pair_batch(ref, LENGTHS, [0.4, 0.3, 0, 0.3], jnp.array([1.0, 0, 1, 0]))
    return logp, batch


def both(name, logp, batch):
    """((loss, metrics), gradient)."""
    loss = ALGORITHMS[CONFIGS[name].name](CONFIGS[name]).loss
    return jax.value_and_grad(loss, has_aux=True)(logp, batch)


def test_answer_logp_hand_computed():
    """Sums and means over the answer's tokens; neither prompt nor padding nor a row of weight 0."""
    logp = answers([[-0.4, -0.6], [-1, -1, -4]], [[-5], [-6, -8]], [[-7], [-7]])
    batch = pair_batch(logp / 2, [[2, 3], [1, 2], [1, 1]], [0.5, 0.5, 0])
    np.testing.assert_allclose(answer_logp(logp, batch), [[-1, -6], [-5, -14], [0, 0]], rtol=1e-6)
    means = answer_logp(logp, batch, mean=True)
    np.testing.assert_allclose(means, [[-0.5, -2], [-5, -7], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(reference_logp(batch), [[-0.5, -3], [-2.5, -7], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(reference_logp(batch, mean=True), means / 2, rtol=1e-6)
    assert means.dtype == jnp.float32


def test_answer_logp_half_precision_is_summed_in_float32():
    batch = pair_batch(jnp.zeros((1, 2, 4)), [[3, 3]])
    logp = jnp.full((1, 2, 4), -100.25).astype(jnp.bfloat16)
    np.testing.assert_array_equal(answer_logp(logp, batch), 3 * logp[:, :, 0].astype(jnp.float32))


def test_answer_logp_shapes():
    logp, batch = one_pair()
    with pytest.raises(AssertionError):
        answer_logp(logp[:, :, 1:], batch)


def test_summed_hand_computed():
    """¼·8 + ¾·4 and the NLL of the chosen answers, ½ and 5 a token; the third row is not read."""
    logp = answers([[-0.4, -0.6], [-1, -1]], [[-5], [-6, -8]], [[-7], [-7]])
    batch = pair_batch(logp, [[2, 2], [1, 2], [1, 1]], [0.25, 0.75, 0])
    loss_B, metrics_B = jnp.array([8, 4, jnp.nan]), {"margin": jnp.array([1, 2, jnp.inf])}
    for coefficient, wanted in ((0, 5), (0.1, 5 + 0.1 * 3.875)):
        loss, metrics = summed(loss_B, metrics_B, logp, batch, coefficient)
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        assert metrics == {"margin": 1.75, "nll": pytest.approx(3.875), "weight": 1}


@ALL
def test_pairs_algorithms_make_no_targets(name):
    config = CONFIGS[name]
    algorithm = ALGORITHMS[config.name](config)
    assert (algorithm.targets is None) == (name != "online_dpo")
    assert algorithm.reads == "pairs"
    assert algorithm.needs == (set() if name in FREE else {"reference"})


@ALL
def test_pairs_losses_read_only_answers(name):
    """NaN and infinities in prompts, padding and the row of weight 0: not a bit changes."""
    logp, batch = pairs()
    wanted = both(name, logp, batch)
    counts = (batch.mask_BCT == 1) & (batch.weight_B != 0)[:, None, None]
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        spoilt = replace(batch, ref_logp_BCT=jnp.where(counts, batch.ref_logp_BCT, bad))
        result = both(name, jnp.where(counts, logp, bad), spoilt)
        jax.tree.map(np.testing.assert_array_equal, result, wanted)
    assert (wanted[1][~counts] == 0).all()
    assert (wanted[1][:, 0][counts[:, 0]] != 0).all()


@ALL
def test_pairs_losses_rows_and_padding(name):
    """Rows in another order, and columns of anything on either side."""
    logp, batch = pairs()
    (loss, metrics), gradient = both(name, logp, batch)
    row_B = jnp.array([2, 0, 3, 1])
    moved = both(name, *jax.tree.map(lambda x: x[row_B], (logp, batch)))
    assert_tree_close(moved, ((loss, metrics), gradient[row_B]))

    def pad(x, value=9):
        return jnp.pad(x, ((0, 0), (0, 0), (2, 1)), constant_values=value)

    wide = replace(batch, mask_BCT=pad(batch.mask_BCT, 0), ref_logp_BCT=pad(batch.ref_logp_BCT))
    assert_tree_close(both(name, pad(logp), wide), ((loss, metrics), pad(gradient, 0)))


@ALL
def test_pairs_losses_half_precision(name):
    """bfloat16 log-probs come out as float32."""
    logp, batch = pairs()
    (loss, metrics), _ = both(name, logp.astype(jnp.bfloat16), batch)
    assert all(x.dtype == jnp.float32 for x in (loss, *metrics.values()))


@REFERENCE
def test_pairs_losses_no_gradient_into_the_reference(name):
    logp, batch = pairs()

    def value(ref):
        config = CONFIGS[name]
        return ALGORITHMS[config.name](config).loss(logp, replace(batch, ref_logp_BCT=ref))[0]

    np.testing.assert_array_equal(jax.grad(value)(batch.ref_logp_BCT), jnp.zeros((4, 2, 4)))


@PAIRED
def test_pairs_losses_microbatches_add_up(name):
    """Rows under the weights of the whole: losses, metrics and gradients."""
    logp, batch = pairs()
    (loss, metrics), gradient = both(name, logp, batch)
    rows = (slice(1), slice(1, 3), slice(3, 4))
    parts, slopes = zip(
        *(both(name, *jax.tree.map(lambda x, r=r: x[r], (logp, batch))) for r in rows), strict=True
    )
    np.testing.assert_allclose(sum(part[0] for part in parts), loss, rtol=1e-5)
    for key, value in metrics.items():
        np.testing.assert_allclose(sum(p[1][key] for p in parts), value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.concatenate(slopes), gradient, rtol=1e-5, atol=1e-7)


@PAIRED
def test_pairs_losses_reweighted(name):
    """A minibatch under its own weights is the weighted mean of its rows."""
    logp, batch = pairs()
    each = [
        both(name, *jax.tree.map(lambda x, i=i: x[i : i + 1], (logp, batch)))[0][0] for i in (0, 1)
    ]
    half = reweight(jax.tree.map(lambda x: x[:2], batch), "token")
    np.testing.assert_allclose(half.weight_B, [4 / 7, 3 / 7], rtol=1e-6)
    (loss, metrics), _ = both(name, logp[:2], half)
    np.testing.assert_allclose(loss, sum(each) / 0.7, rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"], 1, rtol=1e-6)


@ALL
def test_pairs_losses_without_any_row_are_zero(name):
    logp, batch = pairs()
    (loss, metrics), gradient = both(name, logp, replace(batch, weight_B=jnp.zeros(4)))
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert (gradient == 0).all()
    assert (reweight(replace(batch, weight_B=jnp.zeros(4)), "token").weight_B == 0).all()
