"""One compiled iteration is the steps by hand; what it cannot do it refuses."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import algorithms
from jaxrlhf.config import (
    DAPOConfig,
    DecoderConfig,
    GRPOConfig,
    LoraConfig,
    OptimConfig,
    PPOConfig,
    ReMaxConfig,
    SampleConfig,
)
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Batch, TrainState
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps import iteration as module
from jaxrlhf.steps.iteration import _updates, make_iteration
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.score import score
from jaxrlhf.steps.update import make_optimizer, make_update, policy_loss

DECODER = DecoderConfig(vocab=16, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16)
MODEL = Model(DECODER)
DRAW = SampleConfig(max_new_tokens=6, n=2, stop=(1,))
PROMPT_QP = jnp.array([[0, 5], [3, 4], [2, 2], [0, 9]])
MASK_QP = (PROMPT_QP != 0).astype(jnp.int32)


def wants(rollout, token):
    """How often a token was written; a row without any has no reward."""
    count_B = ((rollout.token_BT == token) * rollout.mask_BT).sum(1)
    return jnp.where(count_B > 0, count_B, jnp.nan)


def start(model=MODEL):
    params = model.init(jax.random.key(0), head=True)
    return params, make_optimizer(OptimConfig(learning_rate=1e-2))


def test_the_example_of_the_docstring():
    done = doctest.testmod(module)
    assert done.attempted > 5
    assert done.failed == 0


def test_it_is_the_steps_by_hand():
    """PPO with a value head; rows without a reward."""
    params, tx = start()
    config = PPOConfig(epochs=1, kl_coef=0.3)
    iteration = make_iteration(MODEL, tx, wants, config=config, sample_config=DRAW, donate=False)
    state, key = TrainState.create(params, tx), jax.random.key(3)
    found, metrics, rollout = iteration(state, params, PROMPT_QP, MASK_QP, key, 7)

    algorithm = algorithms.ppo(config)
    loss = policy_loss(MODEL, algorithm, value_coef=config.value_coef)
    update = make_update(tx, loss, donate=False)

    @jax.jit
    def by_hand(state):
        drawn = sample(MODEL, params, PROMPT_QP, MASK_QP, key, DRAW, value=True)
        ref_logp_BT = score(MODEL, params, drawn.token_BT, drawn.attention_mask_BT)
        reward_B = wants(drawn, 7)
        known = reward_B, ~jnp.isnan(reward_B)
        batch, measured = algorithm.targets(drawn, ref_logp_BT, *known, {"kl_coef": 0.3})
        return *update(state, batch), measured, drawn

    expected, learnt, measured, drawn = by_hand(state)
    np.testing.assert_array_equal(rollout.token_BT, drawn.token_BT)
    assert 0 < measured["valid"] < 1
    assert int(found.step) == 1
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found.params, expected.params
    )
    assert metrics["score"] == pytest.approx(float(measured["score"]))
    for name in ("loss", "value_loss", "grad_norm"):
        assert metrics[name] == pytest.approx(float(learnt[name]), abs=1e-5), name


def test_minibatches_see_every_row_once():
    rows = 8
    ones_BT = jnp.ones((rows, 3))
    batch = Batch(*(ones_BT,) * 3, ones_BT, jnp.arange(rows)[:, None] * ones_BT, ones_BT)
    config = GRPOConfig(minibatches=2, epochs=3, aggregation="sequence")

    def update(state, part, frozen):
        assert frozen == "reference"
        seen = part.advantage_BT[:, 0].astype(int)
        return state.at[seen].add(1), {
            "weight": part.weight_BT.sum(), "first": seen[0] * 1.0, "row_max": seen.max(),
        }  # fmt: skip

    count = jnp.zeros(rows, int)
    count, metrics = _updates(config, update, count, batch, "reference", jax.random.key(0))
    assert count.tolist() == [3] * rows
    assert metrics["weight"] == pytest.approx(1)  # each minibatch has weights of its own
    assert metrics["row_max"] == rows - 1
    assert metrics["first"] != 0  # in an order that is drawn
    with pytest.raises(ValueError, match="8 rows % minibatches=3: must be 0"):
        _updates(GRPOConfig(minibatches=3), update, count, batch, None, jax.random.key(0))


def test_adapters_a_greedy_baseline_and_a_sampler_of_ones_own():
    """Traced: what is asked of whom, and that it fits together."""
    model = Model(DECODER, lora=LoraConfig(rank=2))
    params, tx = start()
    asked = []

    def sampler(*given, **named):
        asked.append((given[5].n, given[5].temperature))
        return sample(*given, **named)

    iteration = make_iteration(
        model, tx, wants, config=ReMaxConfig(), sample_config=DRAW, sampler=sampler
    )
    state = TrainState.create({"lora": model.init_lora(jax.random.key(2))}, tx)
    reference = {name: x for name, x in params.items() if name != "head"}
    given = state, reference, PROMPT_QP, MASK_QP, jax.random.key(1), 7
    after, metrics, rollout = jax.eval_shape(iteration, *given)
    assert asked == [(2, 1.0), (1, 0.0)]  # the samples, and what they are compared with
    assert after == jax.eval_shape(lambda: state)
    assert rollout.token_BT.shape == (8, 8)
    assert {"score", "loss", "skipped"} <= set(metrics)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DAPOConfig(), "rounds=4: one compiled iteration cannot: rounds=1"),
        (PPOConfig(target_kl=0.1), "target_kl=0.1: one compiled iteration cannot"),
        (GRPOConfig(normalise="each"), "normalise=each: .* normalise='sum'"),
        (GRPOConfig(), "n=1: grpo compares samples: give at least 2"),
    ],
)
def test_what_cannot_be_is_refused(config, message):
    one = SampleConfig(n=1)
    with pytest.raises(InputError, match=message):
        make_iteration(MODEL, optax.sgd(1.0), wants, config=config, sample_config=one)


def test_greedy_samples_are_refused():
    greedy = SampleConfig(temperature=0.0)
    with pytest.raises(InputError, match="temperature=0: greedy: give more than 0"):
        make_iteration(MODEL, optax.sgd(1.0), wants, sample_config=greedy)
