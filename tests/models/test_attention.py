"""Attention by hand, in pieces, and with rows split over devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig
from jaxrlhf.mesh.sharding import make_mesh
from jaxrlhf.models import attention
from jaxrlhf.models.attention import attend_before, attend_cached

B, T, N, K, H = 2, 13, 4, 2, 8  # an odd length: no number of pieces or devices divides it
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE, GRADIENT = (
    RNG.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N)
)
MASK = np.ones((B, T), np.int32)
MASK[0, :3] = MASK[1, 9:] = 0  # padded on the left, on the right
SEGMENT = jnp.array([[0] * 3 + [1] * 4 + [2] * 6, [1] * 2 + [2] * 7 + [0] * 4])


def by_hand(segment):
    """One query at a time, in float64; 0 where no real token asks."""
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = [
            s
            for s in range(t + 1)
            if MASK[b, s] and (segment is None or segment[b, s] == segment[b, t])
        ]
        if MASK[b, t]:
            k = n // (N // K)
            score = KEY[b, seen, k].astype(np.float64) @ QUERY[b, t, n] / np.sqrt(H)
            weight = np.exp(score - score.max())
            out[b, t, n] = weight @ VALUE[b, seen, k] / weight.sum()
    return out


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
    np.testing.assert_allclose(with_gradients(segment)[1], by_hand(segment), atol=1e-5)


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


@pytest.mark.parametrize("pieces", [1, 3])
def test_attend_before_holds_no_more_scores_than_it_may(pieces, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_A_DEVICE", math.ceil(B * N * T * T / pieces))
    fresh = jax.jit(lambda *given: attend_before(*given))  # else the trace of another number
    text = fresh.lower(QUERY, KEY, VALUE, MASK).as_text()
    shapes = [tuple(map(int, x.split("x"))) for x in re.findall(r"tensor<([\dx]+)xf32>", text)]
    scores = [math.prod(shape) for shape in shapes if shape[-1] == T]
    assert max(scores) == B * N * T * -(-T // pieces)


SLOTS = 17
INDEX = np.array([2, 4])  # rows of which 2 and 4 slots are taken already


def with_cache():
    """The T tokens of each row in slots from INDEX on, before them real ones, after them none."""
    slot_BT = INDEX[:, None] + np.arange(T)
    rng = np.random.default_rng(1)
    keys, values = (rng.standard_normal((B, SLOTS, K, H)).astype(np.float32) for _ in range(2))
    mask_BS = np.zeros((B, SLOTS), np.int32)
    for b in range(B):
        keys[b, slot_BT[b]], values[b, slot_BT[b]] = KEY[b], VALUE[b]
        mask_BS[b, : INDEX[b]] = 1
        mask_BS[b, slot_BT[b]] = MASK[b]
    found = jax.jit(lambda *given: attend_cached(*given))(QUERY, keys, values, slot_BT, mask_BS)
    return np.where(MASK[..., None, None] != 0, found, 0), keys, values, mask_BS


@pytest.mark.parametrize("sizes", [None, (2, 1, 2, 1), (1, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_attend_cached_by_hand(sizes, pieces, monkeypatch):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    if sizes:
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    allowed = math.ceil(B * N * T * SLOTS / mesh.size / pieces)
    monkeypatch.setattr(attention, "SCORES_A_DEVICE", allowed)
    with jax.set_mesh(mesh):
        found, keys, values, mask_BS = with_cache()
    for b, t, n in np.ndindex(B, T, N):
        if MASK[b, t]:
            seen = np.flatnonzero(mask_BS[b, : INDEX[b] + t + 1])
            k = n // (N // K)
            score = keys[b, seen, k].astype(np.float64) @ QUERY[b, t, n] / np.sqrt(H)
            weight = np.exp(score - score.max())
            expected = weight @ values[b, seen, k] / weight.sum()
            np.testing.assert_allclose(found[b, t, n], expected, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_attend_cached_holds_no_more_scores_than_it_may(pieces, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_A_DEVICE", math.ceil(B * N * T * SLOTS / pieces))
    keys = jnp.zeros((B, SLOTS, K, H))
    given = (QUERY, keys, keys, jnp.zeros((B, T), jnp.int32), jnp.ones((B, SLOTS), jnp.int32))
    text = jax.jit(lambda *given: attend_cached(*given)).lower(*given).as_text()
    shapes = [tuple(map(int, x.split("x"))) for x in re.findall(r"tensor<([\dx]+)xf32>", text)]
    scores = [math.prod(shape) for shape in shapes if shape[-1] == SLOTS]
    assert max(scores) == B * N * SLOTS * -(-T // min(pieces, T))
