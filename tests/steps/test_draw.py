"""Draws are exact, of the distribution that truncation leaves, and cost no second [B, V] array."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrlhf.config import MeshConfig, SampleConfig
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.steps.draw import BLOCK, draw, forbid, log_prob, truncate

VOCAB = 300
DRAWS = 20_000
PLAIN = SampleConfig()
LOGITS = (2.0 * np.random.default_rng(0).standard_normal(VOCAB)).astype(np.float32)
FOUR = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


@partial(jax.jit, static_argnames="config")
def many(logits, seed, config=PLAIN):
    """DRAWS tokens from one row of logits."""
    allowed = truncate(logits[None], config)
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return jax.vmap(lambda key: draw(key[None], allowed)[0][0])(keys)


def exact(logits, top_k=0, top_p=1.0, min_p=0.0):
    """The truncated distribution in float64, a token at a time from the least likely up."""
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    if top_k:
        p[np.argsort(p)[:-top_k]] = 0
        p /= p.sum()
    tail = 0.0
    for token in np.argsort(p)[:-1]:
        tail += p[token]
        if top_p < 1 and tail <= 1 - top_p:  # the rule of Hugging Face's TopPLogitsWarper
            p[token] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def kept(config, logits=FOUR):
    return np.flatnonzero(np.isfinite(truncate(logits, config)[0])).tolist()


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=["plain", "top_k", "top_p", "min_p", "all"],
)
def test_draw_frequencies(setting):
    logits = LOGITS / np.float32(0.7)
    p = exact(logits, **setting)
    assert (p > 0).sum() == VOCAB if not setting else 3 < (p > 0).sum() < VOCAB / 4
    count = np.bincount(many(logits, 1, SampleConfig(**setting)), minlength=VOCAB)
    assert not count[p == 0].any()
    expected = p * DRAWS
    rare = expected < 10  # the test wants several draws a bin, so these share one
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (count, expected))
    filled = expected > 0
    assert scipy.stats.chisquare(observed[filled], expected[filled]).pvalue > 1e-3


def test_draw_levels_are_independent():
    """Equal tokens in two full blocks: Gumbels shared by the levels would double token 0."""
    count = np.bincount(many(np.zeros(2 * BLOCK, np.float32), 5), minlength=2 * BLOCK)
    assert scipy.stats.chisquare(count).pvalue > 1e-3


def test_draw_forbidden_tokens_never():
    allowed = np.array([3, BLOCK - 1, BLOCK, VOCAB - 1])
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[allowed] = [0.0, -3.0, 2.0, -12.0]
    drawn = set(many(logits, 2).tolist())
    assert {3, BLOCK - 1, BLOCK} <= drawn <= set(allowed.tolist())


@pytest.mark.parametrize("token", [0, BLOCK - 1, BLOCK, VOCAB - 1])
def test_draw_only_one_allowed(token):
    logits = jnp.full(VOCAB, -jnp.inf).at[token].set(-50.0)
    assert (many(logits, 3) == token).all()


def test_draw_rows_have_their_own_keys():
    logits = jnp.zeros((64, VOCAB))
    draws = jax.jit(lambda *x: draw(*x)[0])
    same = draws(jnp.broadcast_to(jax.random.key(0), 64), logits)
    assert len(set(same.tolist())) == 1
    rows = draws(jax.random.split(jax.random.key(0), 64), logits)
    assert len(set(rows.tolist())) > 40
    assert rows.dtype == jnp.int32


def test_draw_survives_rounding_of_logits():
    """An inverse CDF flips a token wherever the cumulative sum moves across the uniform draw."""
    noise = 1e-6 * np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32)
    assert (many(LOGITS, 4) == many(LOGITS + noise, 4)).mean() > 0.9999


def test_truncate_nothing_is_the_identity():
    assert truncate(FOUR, SampleConfig()) is FOUR
    assert truncate(FOUR, SampleConfig(top_k=4)) is FOUR


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [(0.79, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2]), (0.5, [0]), (0.51, [0, 1]), (1e-9, [0])],
)
def test_truncate_top_p_edges(top_p, tokens):
    assert kept(SampleConfig(top_p=top_p)) == tokens
    order = jnp.array([2, 0, 3, 1])
    assert kept(SampleConfig(top_p=top_p), FOUR[:, order]) == sorted(
        order.tolist().index(token) for token in tokens
    )


def test_truncate_top_k_keeps_ties():
    assert kept(SampleConfig(top_k=1)) == [0]
    assert kept(SampleConfig(top_k=3)) == [0, 1, 2]
    assert kept(SampleConfig(top_k=2), jnp.array([[1.0, 2.0, 1.0, 0.0]])) == [0, 1, 2]


def test_truncate_min_p_is_relative_to_the_likeliest():
    assert kept(SampleConfig(min_p=0.29)) == [0, 1, 2]  # .15 / .5 = .3
    assert kept(SampleConfig(min_p=0.31)) == [0, 1]
    assert kept(SampleConfig(min_p=0.999)) == [0]


def test_truncate_top_p_counts_what_top_k_left():
    assert kept(SampleConfig(top_k=2, top_p=0.6)) == [0]  # .5 / (.5 + .3) = .625
    assert kept(SampleConfig(top_p=0.6)) == [0, 1]


def test_truncate_rows_are_independent():
    rows = jnp.concatenate([FOUR, FOUR[:, ::-1], jnp.zeros((1, 4))])
    for config in (SampleConfig(top_k=2), SampleConfig(top_p=0.8), SampleConfig(min_p=0.5)):
        together = truncate(rows, config)
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(together[i], truncate(row[None], config)[0])


@pytest.mark.parametrize("tensor", [2, 4])
def test_draw_with_the_vocabulary_split(tensor):
    """Neither 2 nor 4 divides its two blocks as they lie: 150 and 75 tokens a device."""
    key_B = jax.random.split(jax.random.key(3), 64)
    logits_BV = jnp.tile(jnp.array(LOGITS), (64, 1))
    expected, mass_B = draw(key_B, logits_BV)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=tensor))):
        found = jax.jit(lambda *x: draw(*x))(key_B, logits_BV)  # not one that was traced without
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_allclose(found[1], mass_B, rtol=1e-6)
    assert len(set(expected.tolist())) > 20


def test_draw_knows_the_mass_of_what_is_allowed():
    """With a last block that is not full, and tokens that are forbidden, a whole block of them."""
    logits_BV = jnp.array(np.random.default_rng(1).normal(0, 3, (5, 3 * BLOCK + 7)), jnp.float32)
    logits_BV = logits_BV.at[:2, BLOCK : 2 * BLOCK].set(-jnp.inf).at[3, ::2].set(-jnp.inf)
    token_B, mass_B = draw(jax.random.split(jax.random.key(0), 5), logits_BV)
    exact = np.log(np.exp(np.asarray(logits_BV, np.float64)).sum(1))
    np.testing.assert_allclose(mass_B, exact, rtol=1e-6)
    expected = log_prob(logits_BV, token_B)
    np.testing.assert_allclose(log_prob(logits_BV, token_B, mass_B), expected, atol=2e-6)


def test_log_prob_hand_computed():
    logits, token = np.array([[1.0, 2.0, 3.0]], np.float32), np.array([1])
    np.testing.assert_allclose(log_prob(logits, token), -1.407606, atol=1e-6)
    np.testing.assert_allclose(log_prob(logits / 0.7, token), -1.688690, atol=1e-6)
    four = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    np.testing.assert_allclose(log_prob(four, token), -1.203973, atol=1e-6)
    allowed = truncate(four, SampleConfig(top_p=0.8))
    np.testing.assert_allclose(log_prob(allowed, token), -0.980829, atol=1e-6)


def test_forbid_leaves_the_rest_as_it_is():
    logits_BV = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
    allowed_BV = forbid(logits_BV, SampleConfig(forbidden=((1, 2), (3, 4))))
    np.testing.assert_allclose(
        jax.nn.softmax(allowed_BV)[0], [0.5 / 0.625, 0, 0.125 / 0.625, 0], rtol=1e-6
    )
