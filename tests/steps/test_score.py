"""Log-probs, entropies, values and rewards: read in the right column, in float32, in pieces."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps import columns as in_columns
from jaxrlhf.steps.score import forward, last_token, reward, score, value

T = 12
TOKEN = jnp.array(np.random.default_rng(0).integers(0, 300, (3, T)), jnp.int32)
MASK = jnp.array([[1] * 12, [0] * 4 + [1] * 8, [1] * 9 + [0] * 3])  # full, left- and right-padded

whole = jax.jit(forward, static_argnames=("model", "entropy", "value", "first"))


class Stub:
    decoder = DecoderConfig(9, 9, 1, 1, 1, 8, 8)  # of its logits nothing is scaled or capped

    """hidden[i] = onehot(i) in every row; logits of position i from a table; the head says i."""

    def __init__(self, table):
        self.table = jnp.array(table, jnp.float32)

    def apply(self, params, token_BT, attention_mask_BT, *_, **__):
        position = jnp.eye(token_BT.shape[1], len(self.table))
        return jnp.broadcast_to(position, (*token_BT.shape, len(self.table))), None

    def projection(self, params):
        return self.table, 0

    def scalar(self, params, hidden):
        return hidden @ jnp.arange(hidden.shape[-1], dtype=jnp.float32)


def naive(model, params, token, mask, temperature=1.0, lora=None):
    """log-probs and entropies from all logits at once, by log_softmax."""
    hidden, _ = model.apply(params, token, mask, lora)
    logp = jax.nn.log_softmax(model.logits(params, hidden) / temperature)[:, :-1]
    known = (mask[:, 1:] * mask[:, :-1]) != 0
    chosen = jnp.take_along_axis(logp, token[:, 1:, None], axis=2)[..., 0]
    spread = -(jnp.exp(logp) * logp).sum(2)
    return tuple(jnp.pad(jnp.where(known, x, 0), ((0, 0), (1, 0))) for x in (chosen, spread))


def padded_both_ways(row):
    """A row of 7 tokens, padded left and padded right to 12: tokens and masks."""
    pad = jnp.full((1, 5), 123)
    token = jnp.vstack([jnp.hstack([pad, row]), jnp.hstack([row, pad])])
    return token, jnp.array([[0] * 5 + [1] * 7, [1] * 7 + [0] * 5])


def test_forward_reads_the_position_before():
    """Prompt of 3, response of 2: the response is read at positions 2 and 3."""
    table = np.zeros((5, 6))
    table[np.arange(5), np.arange(5)] = np.log(np.arange(5) + 2.0)  # position i likes token i
    token = jnp.array([[9, 9, 9, 2, 3]]) % 6
    out = forward(Stub(table), {}, token, jnp.ones((1, 5), int), value=True, first=3)
    np.testing.assert_array_equal(out.value_BT, [[0, 0, 0, 2, 3]])
    np.testing.assert_allclose(out.logp_BT, [[0, 0, 0, np.log(4 / 9), np.log(5 / 10)]], atol=1e-6)
    np.testing.assert_array_equal(
        value(Stub(table), {}, token, jnp.ones((1, 5), int)), [[0, 0, 1, 2, 3]]
    )


@pytest.mark.parametrize(
    ("mask", "known"),
    [
        ([1, 1, 1, 1, 1], [0, 1, 1, 1, 1]),
        ([0, 0, 1, 1, 1], [0, 0, 0, 1, 1]),
        ([1, 1, 1, 0, 0], [0, 1, 1, 0, 0]),
        ([1, 1, 0, 1, 1], [0, 1, 0, 0, 1]),
    ],
)
def test_forward_is_zero_outside_the_mask(mask, known):
    stub = Stub(np.arange(15).reshape(5, 3) / 10 + 1)
    token, mask = jnp.zeros((1, 5), int), jnp.array([mask])
    out = forward(stub, {}, token, mask, entropy=True, value=True)
    known = np.array([known])
    np.testing.assert_array_equal(out.value_BT, known * [[0, 0, 1, 2, 3]])
    assert ((np.asarray(out.logp_BT) < 0) == known).all()
    assert ((np.asarray(out.entropy_BT) > 0) == known).all()
    np.testing.assert_array_equal(value(stub, {}, token, mask), out.value_BT)


@pytest.mark.parametrize(
    ("temperature", "logp", "entropy"), [(1.0, -1.407606, 0.832396), (0.7, -1.688690, None)]
)
def test_forward_hand_computed(temperature, logp, entropy):
    stub = Stub([[1.0, 2.0, 3.0]] * 3)
    token, mask = jnp.array([[0, 1, 1]]), jnp.array([[1, 1, 0]])
    out = forward(stub, {}, token, mask, temperature, entropy=True)
    np.testing.assert_allclose(out.logp_BT, [[0, logp, 0]], atol=1e-6)
    if entropy:
        np.testing.assert_allclose(out.entropy_BT, [[0, entropy, 0]], atol=1e-6)


def test_forward_without_extras_is_bare(model, params):
    out = whole(model, params, TOKEN, MASK)
    assert out.entropy_BT is None
    assert out.value_BT is None


def test_forward_pieces_equal_the_whole(monkeypatch, model, params, lora):
    """11 columns at once, and 4 at a time with a ragged rest: the same values and gradients."""
    weight = jnp.array(np.random.default_rng(1).standard_normal((3, T)), jnp.float32)

    def run(outputs):
        def total(params):
            logp, entropy = outputs(params)
            return (logp * weight + entropy).sum(), (logp, entropy)

        return jax.jit(jax.grad(total, has_aux=True))(params)

    def at_once(params):
        return naive(model, params, TOKEN, MASK, 0.7, lora)

    def in_pieces(params):
        out = forward(model, params, TOKEN, MASK, 0.7, entropy=True, lora=lora)
        return out.logp_BT, out.entropy_BT

    expected = run(at_once)
    for columns in (100, 4):
        monkeypatch.setattr(in_columns, "LOGITS_A_DEVICE", columns * 3 * 300)
        found = run(in_pieces)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), found, expected)


def test_forward_first_skips_columns_and_changes_none(model, params):
    first = 7
    full = whole(model, params, TOKEN, MASK, entropy=True, value=True)
    part = whole(model, params, TOKEN, MASK, entropy=True, value=True, first=first)
    for x, y in zip(jax.tree.leaves(full), jax.tree.leaves(part), strict=True):
        assert (y[:, :first] == 0).all()
        assert jnp.abs(y[:, first:]).max() > 0.1
        np.testing.assert_allclose(x[:, first:], y[:, first:], atol=1e-6)


def largest_logits(model, params):
    """Most elements of an array with a vocabulary axis in the gradient of forward, lowered."""
    token, mask = jnp.zeros((2, 64), int), jnp.ones((2, 64), int)

    def loss(params):
        out = forward(model, params, token, mask, entropy=True)
        return (out.logp_BT + out.entropy_BT).sum()

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    shapes = {
        tuple(map(int, found.split("x"))) for found in re.findall(r"tensor<([\dx]+)x\w+>", text)
    }
    return max(int(np.prod(shape)) for shape in shapes if 300 in shape)


def test_forward_never_holds_all_logits(monkeypatch, model, params):
    """All logits would be [2, 63, 300], 37800 elements; the embedding table, [300, 32], is 9600."""
    assert largest_logits(model, params) >= 2 * 63 * 300  # in one piece, as it is allowed to be
    monkeypatch.setattr(in_columns, "LOGITS_A_DEVICE", 2 * 300 * 8)
    assert largest_logits(model, params) == 9600


def test_score_and_value_are_projections(model, params, lora):
    out = whole(model, params, TOKEN, MASK, 0.7, value=True, lora=lora, first=4)
    np.testing.assert_array_equal(
        jax.jit(score, static_argnums=(0, 6))(model, params, TOKEN, MASK, 0.7, lora, 4),
        out.logp_BT,
    )
    values = jax.jit(value, static_argnums=0)(model, params, TOKEN, MASK, lora)
    np.testing.assert_allclose(values[:, 4:], out.value_BT[:, 4:], atol=1e-6)


def test_score_padding_changes_nothing(model, params):
    """A row alone, padded left and padded right."""
    row = TOKEN[:1, :7]
    alone = whole(model, params, row, jnp.ones_like(row), entropy=True, value=True)
    both = whole(model, params, *padded_both_ways(row), entropy=True, value=True)
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(both), strict=True):
        np.testing.assert_allclose(y[0], jnp.pad(x[0], (5, 0)), atol=1e-5)
        np.testing.assert_allclose(y[1], jnp.pad(x[0], (0, 5)), atol=1e-5)


def test_forward_bfloat16_logp_is_float32(params, model):
    """The layers compute in bfloat16, the log-softmax of their logits does not."""
    model = Model(model.decoder, dtype="bfloat16")
    out = whole(model, params, TOKEN, MASK, entropy=True, value=True)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}

    @jax.jit
    def rest(params):
        hidden, _ = model.apply(params, TOKEN, MASK)
        return hidden, model.logits(params, hidden)

    hidden, logits = rest(params)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact = np.asarray(logits, np.float64)[:, :-1]
    exact -= np.log(np.exp(exact).sum(2, keepdims=True))
    exact = np.take_along_axis(exact, np.asarray(TOKEN)[:, 1:, None], axis=2)[..., 0]
    known = np.asarray(MASK[:, 1:] * MASK[:, :-1])
    np.testing.assert_allclose(out.logp_BT[:, 1:], exact * known, atol=1e-4)


def test_reward_reads_the_last_real_token():
    """Padding is the end-of-sequence token E, which also ends the turn before."""
    E = 4
    token = jnp.array([[7, 8, E, 9, E, E, E], [E, E, 7, 8, E, 9, E], [7] * 7])
    mask = jnp.array([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1] * 7])
    np.testing.assert_array_equal(last_token(mask), [4, 6, 6])
    np.testing.assert_array_equal(reward(Stub(np.zeros((7, 3))), {}, token, mask), [4, 6, 6])


def test_reward_padding_changes_nothing(model, params, lora):
    rewards = jax.jit(reward, static_argnums=0)
    row = TOKEN[:1, :7]
    alone = rewards(model, params, row, jnp.ones_like(row), lora)
    token, mask = padded_both_ways(row)
    padded = rewards(model, params, token, mask, lora)
    np.testing.assert_allclose(padded, jnp.repeat(alone, 2), atol=1e-5)
    without = rewards(model, params, token, mask)
    assert jnp.abs(without - padded).min() > 1e-3  # the adapters are used


def test_value_needs_a_head(model, params):
    bare = {name: child for name, child in params.items() if name != "head"}
    with pytest.raises(ValueError, match="params hold no 'head'"):
        jax.eval_shape(partial(value, model), bare, TOKEN, MASK)
