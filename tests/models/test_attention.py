"""Attention by hand, in pieces, and with rows split over devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig
from jaxrlhf.models import attention
from jaxrlhf.models.attention import attend_before
from jaxrlhf.sharding import make_mesh

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
