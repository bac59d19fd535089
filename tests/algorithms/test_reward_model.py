import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import pairwise_reward_loss, reward_model
from jaxrlhf.config import RewardModelConfig
from jaxrlhf.core.types import PreferenceBatch


def pairs(margin, weight):
    count = len(weight)
    return PreferenceBatch(
        token_BCT=jnp.zeros((count, 2, 1), jnp.int32),
        attention_mask_BCT=jnp.ones((count, 2, 1), jnp.int32),
        margin_B=jnp.array(margin, jnp.float32),
        weight_B=jnp.array(weight, jnp.float32),
    )


def test_pairwise_reward_loss_hand_computed():
    loss = pairwise_reward_loss(jnp.array([1, 0]), jnp.array([0, 1]))
    np.testing.assert_allclose(loss.mean(), 0.8132617, rtol=1e-6)
    np.testing.assert_allclose(loss, [0.3132617, 1.3132617], rtol=1e-6)
    loss = pairwise_reward_loss(jnp.array([1.0]), jnp.array([0.0]), 0.5)
    np.testing.assert_allclose(loss, [0.4740770], rtol=1e-6)


def test_pairwise_reward_loss_extreme_scores_are_finite():
    def loss(chosen):
        return pairwise_reward_loss(chosen, jnp.zeros(2)).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.array([-1e4, 1e4]))
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [-1, 0])


def test_reward_model_loss_and_metrics():
    score = jnp.array([[1.0, 0], [0, 1], [2, 2], [jnp.nan, jnp.inf]])
    batch = pairs([0, 0, 0, jnp.nan], [1 / 3, 1 / 3, 1 / 3, 0])
    loss = reward_model(RewardModelConfig()).loss
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(score, batch)
    np.testing.assert_allclose(value, (2 * 0.8132617 + np.log(2)) / 3, rtol=1e-6)
    wanted = {"accuracy": 0.5, "margin": 0, "chosen": 1, "rejected": 1, "weight": 1}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted)
    assert (gradient[:3, 0] < 0).all()
    np.testing.assert_allclose(gradient[:, 0], -gradient[:, 1])
    np.testing.assert_array_equal(gradient[3], 0)


def test_reward_model_margin():
    loss, metrics = reward_model(RewardModelConfig()).loss(jnp.array([[1.0, 0]]), pairs([0.5], [1]))
    np.testing.assert_allclose(loss, 0.4740770, rtol=1e-6)
    assert metrics["margin"] == 1


def test_reward_model_centre():
    score, batch = jnp.array([[1.0, 2]]), pairs([0], [1])
    plain, _ = reward_model(RewardModelConfig()).loss(score, batch)
    centred, _ = reward_model(RewardModelConfig(centre_coef=0.1)).loss(score, batch)
    np.testing.assert_allclose(centred - plain, 0.9, rtol=1e-5)


def test_reward_model_label_smoothing():
    """A pair that is wrong with probability ε is the other pair, with the same margin."""
    loss = reward_model(RewardModelConfig(label_smoothing=0.25)).loss
    value, _ = loss(jnp.array([[1.0, 0]]), pairs([0.5], [1]))
    np.testing.assert_allclose(value, 0.75 * 0.4740770 + 0.25 * 1.7014133, rtol=1e-6)
    gradient = jax.grad(lambda s: loss(s, pairs([0], [1]))[0])(jnp.array([[np.log(3.0), 0]]))
    np.testing.assert_allclose(gradient, 0, atol=1e-7)  # σ(log 3) = 0.75: what it learns to say


def test_reward_model_score_l2():
    score, batch = jnp.array([[3.0, -1]]), pairs([0], [1])
    plain, _ = reward_model(RewardModelConfig()).loss(score, batch)
    small, _ = reward_model(RewardModelConfig(score_l2=0.1)).loss(score, batch)
    np.testing.assert_allclose(small - plain, 0.5, rtol=1e-5)


def test_reward_model_microbatches_add_up():
    score = jax.random.normal(jax.random.key(0), (6, 2))
    batch = pairs([0.1] * 6, [1 / 6] * 6)
    loss = reward_model(RewardModelConfig(centre_coef=0.01)).loss
    parts = [
        loss(score[r], jax.tree.map(lambda x, r=r: x[r], batch)) for r in (slice(2), slice(2, 6))
    ]
    jax.tree.map(
        lambda whole, *part: np.testing.assert_allclose(sum(part), whole, rtol=1e-5, atol=1e-6),
        loss(score, batch),
        *parts,
    )
