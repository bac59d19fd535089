"""Attention equals its formula by hand: whole, in pieces, on meshes, and a token at a time; a piece
holds no more scores than it may."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models import attention
from jaxrlhf.models.attention import attend_before, attend_next
from jaxrlhf.models.cache import Stored

B, T, N, K, H = 2, 13, 4, 2, 8  # an odd length: no number of pieces or devices divides it
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE, GRADIENT = (
    RNG.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N)
)
MASK = np.ones((B, T), np.int32)
MASK[0, :3] = MASK[1, 9:] = 0  # padded on the left, on the right
SINK = np.array([0.5, -1, 2, 0], np.float32)
SEGMENT = jnp.array([[0] * 3 + [1] * 4 + [2] * 6, [1] * 2 + [2] * 7 + [0] * 4])


def by_hand(query, key, value, seen, sink=None):
    """One query at a time, in float64, over the keys ``seen(b, t)``; 0 where no real token asks."""
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        if MASK[b, t]:
            at, k = seen(b, t), n // (N // K)
            score = key[b, at, k].astype(np.float64) @ query[b, t, n] / np.sqrt(H)
            weight = np.exp(score - score.max())
            rest = 0 if sink is None else np.exp(sink[n] - score.max())
            out[b, t, n] = weight @ value[b, at, k] / (weight.sum() + rest)
    return out


def most_scores(function, *given, keys):
    """Of all arrays in the program whose last axis is that of the keys, the size of the largest."""
    fresh = jax.jit(lambda *given: function(*given))  # else the trace of another number
    text = fresh.lower(*given).as_text()
    shapes = [tuple(map(int, x.split("x"))) for x in re.findall(r"tensor<([\dx]+)xf32>", text)]
    return max(math.prod(shape) for shape in shapes if shape[-1] == keys)


def with_gradients(segment):
    """What real tokens get, and the gradients of its product with GRADIENT."""

    def f(query, key, value):
        out = attend_before(query, key, value, jnp.array(MASK), segment)
        out = jnp.where(MASK[..., None, None] != 0, out, 0)
        return (out * GRADIENT).sum(), out

    grad = jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))
    return jax.device_get(grad(QUERY, KEY, VALUE))


@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["rows", "segments"])
def test_attend_before_by_hand(segment):
    def seen(b, t):
        own = np.ones(T, bool) if segment is None else np.asarray(segment[b] == segment[b, t])
        return np.flatnonzero(own & (MASK[b] != 0) & (np.arange(T) <= t))

    found = with_gradients(segment)[1]
    np.testing.assert_allclose(found, by_hand(QUERY, KEY, VALUE, seen), atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 3])
def test_sinks_by_hand(pieces, monkeypatch):
    """A score of each head's own, which no value belongs to."""
    monkeypatch.setattr(attention, "SCORES_A_DEVICE", math.ceil(B * N * T * T / pieces))

    def seen(b, t):
        return np.flatnonzero((MASK[b] != 0) & (np.arange(T) <= t))

    found = jax.jit(partial(attend_before, sink_N=SINK))(QUERY, KEY, VALUE, MASK)
    found = np.where(MASK[..., None, None] != 0, found, 0)
    np.testing.assert_allclose(found, by_hand(QUERY, KEY, VALUE, seen, SINK), atol=1e-5)


@pytest.mark.parametrize("sizes", [None, (1, 1, 1, 8), (1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("pieces", [1, 3])
def test_attend_before_in_pieces_and_on_meshes(sizes, pieces, monkeypatch):
    expected = with_gradients(SEGMENT)
    mesh = make_mesh(MeshConfig(*sizes)) if sizes else make_mesh(MeshConfig(), jax.devices()[:1])
    allowed = math.ceil(B * N * T * T / mesh.size / pieces)
    monkeypatch.setattr(attention, "SCORES_A_DEVICE", allowed)
    with jax.set_mesh(mesh):
        found = with_gradients(SEGMENT)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), found, expected)


@pytest.mark.parametrize(
    ("samples", "at", "sink"), [(1, 0, None), (1, 5, None), (3, 0, SINK), (3, 5, None)]
)
def test_attend_next_by_hand(samples, at, sink):
    """Prompts of unequal length, shared by their samples; slots after ``at`` hold garbage."""
    rng = np.random.default_rng(1)
    rows, slots, width = B * samples, 7, T

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    query, prompt = draw(rows, N, H), (draw(B, K, width, H), draw(B, K, width, H))
    since = draw(rows, K, slots, H), draw(rows, K, slots, H)
    for x in since:
        x[:, :, at + 1 :] *= 1e3
    kept = [tuple(Stored(x, None) for x in layer) for layer in (prompt, since)]
    found = jax.jit(partial(attend_next, sink_N=sink))(query, kept[0], MASK, kept[1], at)
    for b, n in np.ndindex(rows, N):
        q, k = b // samples, n // (N // K)
        real = MASK[q] != 0
        keys, values = (
            np.concatenate([x[q, k, real], y[b, k, : at + 1]]).astype(np.float64)
            for x, y in zip(prompt, since, strict=True)
        )
        score = keys @ query[b, n] / np.sqrt(H)
        weight = np.exp(score - score.max())
        total = weight.sum() + (0 if sink is None else np.exp(sink[n] - score.max()))
        np.testing.assert_allclose(found[b, n], weight @ values / total, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_no_more_scores_than_there_may_be(pieces, monkeypatch):
    longest = -(-T // min(pieces, T))
    monkeypatch.setattr(attention, "SCORES_A_DEVICE", math.ceil(B * N * T * T / pieces))
    assert most_scores(attend_before, QUERY, KEY, VALUE, MASK, keys=T) == B * N * T * longest
