"""Two rows of log-probs whose losses other libraries agree on."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest


@pytest.fixture
def rows():
    advantage_B = jnp.array([1.0, -1])
    return SimpleNamespace(
        logp=jnp.array([[-1.0, -2, -3], [-0.5, -0.5, -9]]),
        old=jnp.array([[-1.1, -1.5, -3], [-0.5, -0.9, -1]]),
        ref=jnp.array([[-1.2, -2, -2.5], [-0.4, -0.6, -1]]),
        advantage=jnp.broadcast_to(advantage_B[:, None], (2, 3)),
        mask=jnp.array([[1.0, 1, 1], [1, 1, 0]]),
    )
