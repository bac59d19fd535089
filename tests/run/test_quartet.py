"""Four functions to write loops of: gradients add up, losses are sums by hand, states come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import DecoderConfig, OptimConfig, SampleConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import TrainState
from jaxrlhf.models.transformer import Model
from jaxrlhf.run import quartet
from jaxrlhf.steps.update import make_optimizer

MODEL = Model(DecoderConfig(vocab=16, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16))
TX = make_optimizer(OptimConfig(learning_rate=1e-2))


@pytest.fixture(scope="module")
def state():
    return TrainState.create(MODEL.init(jax.random.key(0)), TX)


def datum(ids, **inputs):
    return {"model_input": ids[:-1], "loss_fn_inputs": {"target_tokens": ids[1:], **inputs}}


DATA = [
    datum([3, 4, 5, 6], logprobs=[-2.0, -1.0, -3.0], advantages=[0.0, 1.5, -0.5]),
    datum([7, 8, 9], logprobs=[-2.5, -2.0], advantages=[2.0, 1.0], weights=[1.0, 0.5]),
]


def test_gradients_of_several_calls_are_those_of_one(state):
    ppo = {"loss_fn": "ppo", "clip_high": 0.1}
    whole, out = quartet.forward_backward(MODEL, state, quartet.batch_of(DATA, 6), **ppo)
    grads, total = None, 0.0
    for row in DATA:
        part = quartet.batch_of([row], 6)
        grads, some = quartet.forward_backward(MODEL, state, part, **ppo, grads=grads)
        total += float(some["loss"])
    assert total == pytest.approx(float(out["loss"]), abs=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grads, whole)
    after, metrics = quartet.optim_step(state, grads, TX)
    assert (int(after.step), float(metrics["skipped"])) == (1, 0.0)
    assert int(state.step) == 0  # the old one is still there


def test_losses_by_hand(state):
    batch = quartet.batch_of(DATA, 6)
    _, out = quartet.forward_backward(MODEL, state, batch, "cross_entropy")
    logp_BT = np.asarray(out["logp_BT"], np.float64)
    weight = [[1, 1, 1], [1, 0.5, 0]]
    old, advantage = [[-2, -1, -3], [-2.5, -2, 0]], np.array([[0, 1.5, -0.5], [2, 1, 0]])
    logp = logp_BT[:, 1:4]
    assert out["loss"] == pytest.approx(-(weight * logp).sum(), rel=1e-5)
    ratio = np.exp(logp - old)
    expected = {
        "importance_sampling": -(weight * ratio * advantage).sum(),
        "ppo": (weight * np.maximum(-ratio * advantage, -ratio.clip(0.8, 1.1) * advantage)).sum(),
    }
    for name, loss in expected.items():
        more = {"clip_high": 0.1} if name == "ppo" else {}
        _, out = quartet.forward_backward(MODEL, state, batch, name, **more)
        assert out["loss"] == pytest.approx(loss, rel=1e-5), name


def test_a_loop_learns_what_it_is_paid_for(state):
    """Sample, pay for a token, add gradients up, step: as loops for this interface are written."""
    prompt_QP = jnp.full((8, 2), 3)
    config = SampleConfig(max_new_tokens=4, n=2)
    counts = []
    for step in range(12):
        key = jax.random.fold_in(jax.random.key(1), step)
        rollout = quartet.sample(MODEL, state, prompt_QP, jnp.ones((8, 2)), key, config)
        token_BT, logp_BT = np.asarray(rollout.token_BT), np.asarray(rollout.logp_BT)
        count_B = (token_BT[:, 2:] == 7).sum(1)
        counts.append(count_B.mean())
        advantage_B = count_B - count_B.mean()
        data = [
            datum(
                ids.tolist(),
                logprobs=logp[1:].tolist(),
                advantages=[0.0] + [float(a)] * 4,
            )
            for ids, logp, a in zip(token_BT, logp_BT, advantage_B, strict=True)
        ]
        grads = None
        for half in (data[:8], data[8:]):
            batch = quartet.batch_of(half, 6)
            grads, _ = quartet.forward_backward(
                MODEL, state, batch, "importance_sampling", grads=grads
            )
        state, _ = quartet.optim_step(state, grads, TX)
    assert np.mean(counts[-3:]) > np.mean(counts[:3]) + 1


def test_a_state_comes_back_bit_for_bit(state, tmp_path):
    grads = jax.tree.map(jnp.ones_like, state.params)
    after, _ = quartet.optim_step(state, grads, TX)
    folder = quartet.save_state(after, str(tmp_path / "loop"))
    found = quartet.load_state(folder, state)
    jax.tree.map(np.testing.assert_array_equal, found, after)
    bad, metrics = quartet.optim_step(after, jax.tree.map(lambda x: x * jnp.nan, grads), TX)
    assert float(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, bad.params, after.params)


@pytest.mark.parametrize(
    ("row", "width", "message"),
    [
        ({"model_input": [3, 4], "loss_fn_inputs": {"target_tokens": [5, 6]}}, 6, "moved by one"),
        (datum([3, 4, 5]), 2, "3 tokens, and width=2: widen it"),
        (datum([3, 4, 5], weights=[1.0]), 6, r"data\[0\].weights: 1 of them for 2 tokens"),
    ],
)
def test_data_that_is_none(row, width, message):
    with pytest.raises(InputError, match=message):
        quartet.batch_of([row], width)


def test_an_unknown_loss(state):
    with pytest.raises(InputError, match=r"loss_fn=dro: unknown \(choose one of cross_entropy"):
        quartet.forward_backward(MODEL, state, quartet.batch_of(DATA, 6), "dro")
