import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import aggregate_steps, process_reward_loss, process_reward_model
from jaxrlhf.config import ProcessRewardModelConfig
from jaxrlhf.core.types import PreferenceBatch

NAN = jnp.nan
SCORE = jnp.array([[NAN, 0.0, NAN, 2.0], [1.0, NAN, -1.0, NAN], [NAN, NAN, NAN, NAN]])
LABEL = jnp.array([[NAN, 0.5, NAN, 1.0], [1.0, NAN, 0.0, NAN], [NAN, NAN, NAN, NAN]])
STEP = jnp.array([[0, 1.0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
P2, P1 = 0.8807971, 0.7310586  # σ(2), σ(1)


def test_process_reward_loss_hand_computed():
    loss = process_reward_loss(SCORE, LABEL, STEP)
    np.testing.assert_allclose(loss, [(0.6931472 + 0.1269280) / 2, 0.3132617, 0], rtol=1e-6)
    gradient = jax.grad(lambda s: process_reward_loss(s, LABEL, STEP).sum())(SCORE)
    wanted = [[0, 0, 0, (P2 - 1) / 2], [(P1 - 1) / 2, 0, (1 - P1) / 2, 0], [0] * 4]
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("min", [0.5, 1 - P1]), ("product", [0.5 * P2, P1 * (1 - P1)]), ("last", [P2, 1 - P1])],
)
def test_aggregate_steps_hand_computed(how, wanted):
    np.testing.assert_allclose(aggregate_steps(SCORE, STEP, how), [*wanted, NAN], rtol=1e-6)


def test_aggregate_steps_unknown():
    with pytest.raises(ValueError, match="how='max': choose min, product or last"):
        aggregate_steps(SCORE, STEP, "max")


def test_process_reward_model_loss_and_metrics():
    empty = jnp.zeros((3, 1, 4), jnp.int32)
    batch = PreferenceBatch(
        empty,
        empty,
        jnp.zeros(3),
        jnp.array([0.5, 0.5, 0]),
        step_mask_BCT=STEP[:, None],
        label_BCT=LABEL[:, None],
    )
    loss = process_reward_model(ProcessRewardModelConfig(score_l2=0.1)).loss
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(SCORE[:, None], batch)
    plain = ((0.6931472 + 0.1269280) / 2 + 0.3132617) / 2
    np.testing.assert_allclose(value, plain + 0.1 * (2 + 1) / 2, rtol=1e-6)
    wanted = {"accuracy": 1, "reward": (0.5 + 1 - P1) / 2, "steps": 2, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted)
    assert np.isfinite(gradient).all()
