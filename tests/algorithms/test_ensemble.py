import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import ensemble_score

SCORE = jnp.array([[1.0, 5, 0], [3, 5, jnp.nan]])


@pytest.mark.parametrize(
    ("combine", "k", "wanted"),
    [("mean", 1, [2, 5]), ("min", 1, [1, 5]), ("lcb", 1, [1, 5]), ("lcb", 0.5, [1.5, 5])],
)
def test_ensemble_score_hand_computed(combine, k, wanted):
    np.testing.assert_allclose(ensemble_score(SCORE, combine, k), [*wanted, np.nan])


def test_ensemble_score_unknown():
    with pytest.raises(ValueError, match="combine='max': choose mean, min or lcb"):
        ensemble_score(SCORE, "max")
