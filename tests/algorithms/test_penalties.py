"""Penalties on a score, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from responses import rollout

from jaxrlhf.algorithms.on_policy import overlong_penalty, score_penalty
from jaxrlhf.config.algorithms import OnPolicyConfig


def test_overlong_penalty_hand_computed():
    """At most 6 tokens after a prompt of 2 columns, the last 4 of which cost."""
    for prompt in (0, 2):
        mask = jnp.arange(6) < jnp.arange(7)[:, None]
        mask = jnp.pad(mask, ((0, 0), (prompt, 0))).astype(jnp.float32)
        penalty = overlong_penalty(mask, 4)
        np.testing.assert_allclose(penalty, [0, 0, 0, 0.25, 0.5, 0.75, 1], rtol=1e-6)
        assert penalty.dtype == jnp.float32
    np.testing.assert_allclose(overlong_penalty(mask, 1), [0] * 6 + [1])


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [0] * 6),
        ({"missing_eos_penalty": 0.7}, [0, 0, 0.7, 0, 0, 0]),
        ({"overlong_buffer": 2}, [1, 0.5, 1, 0, 0.5, 0.5]),
        ({"missing_eos_penalty": 0.7, "overlong_buffer": 2}, [1, 0.5, 1.7, 0, 0.5, 0.5]),
    ],
)
def test_score_penalty(changes, wanted):
    """Lengths 3, 2, 3, 1, 2, 2 of at most 3; row 2 was cut off."""
    penalty = score_penalty(OnPolicyConfig(**changes), rollout())
    np.testing.assert_allclose(penalty, wanted, rtol=1e-6)
    assert penalty.dtype == jnp.float32
