import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import pointwise_reward_loss, pointwise_reward_model
from jaxrlhf.config import PointwiseRewardModelConfig
from jaxrlhf.core.types import PreferenceBatch

SCORE, TARGET = jnp.array([0.0, 2, -1]), jnp.array([0.5, 0, 1])


@pytest.mark.parametrize(
    ("kind", "delta", "wanted"),
    [
        ("mse", 1.0, [0.25, 4, 4]),
        ("huber", 1.0, [0.25, 3, 3]),  # beyond 1: 2·2 − 1
        ("huber", 0.5, [0.25, 1.75, 1.75]),  # 0.5·(2·2 − 0.5)
        ("binary", 1.0, [0.6931472, 2.1269280, 1.3132617]),
    ],
)
def test_pointwise_reward_loss_hand_computed(kind, delta, wanted):
    loss = pointwise_reward_loss(SCORE, TARGET, kind, delta)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert loss.dtype == jnp.float32


def test_pointwise_reward_loss_unknown_kind():
    with pytest.raises(ValueError, match="kind='mae': choose mse, huber or binary"):
        pointwise_reward_loss(SCORE, TARGET, "mae")


@pytest.mark.parametrize(
    ("kind", "loss", "error"), [("mse", 2.125, 1.25), ("binary", 1.4100376, 0.6903985)]
)
def test_pointwise_reward_model_loss_and_metrics(kind, loss, error):
    empty = jnp.zeros((3, 1, 1), jnp.int32)
    batch = PreferenceBatch(
        empty, empty, jnp.zeros(3), jnp.array([0.5, 0.5, 0]), label_B=jnp.array([0.5, 0, jnp.nan])
    )
    run = pointwise_reward_model(PointwiseRewardModelConfig(kind=kind, score_l2=0.1)).loss
    score = jnp.array([[0.0], [2], [jnp.inf]])
    (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(score, batch)
    np.testing.assert_allclose(value, loss + 0.2, rtol=1e-6)
    wanted = {"error": error if kind == "mse" else (0 + 0.8807971) / 2}
    wanted |= {"score": 1, "target": 0.25, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted)
    assert gradient[2] == 0
