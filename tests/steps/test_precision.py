"""Matrix products of float32 models are asked for in float32, in every step; see ``exact``."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.algorithms.ppo import ppo
from jaxrlhf.config import OptimConfig, PPOConfig, SampleConfig
from jaxrlhf.core.types import TrainState
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.update import make_optimizer, make_update, policy_loss


def products(program, *args):
    """What each product of a lowered program says: its line, its operands' types."""
    text = program.lower(*args).as_text()
    found = re.findall(r"stablehlo\.dot_general.*: \((.*)\) ->.*", text)
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(found) == len(lines) > 5
    return list(zip(lines, found, strict=True))


def update(model, params, lora, batch):
    tx = make_optimizer(OptimConfig())
    state = jax.eval_shape(lambda: TrainState.create({"lora": lora, "head": params["head"]}, tx))
    loss = policy_loss(model, ppo(PPOConfig(entropy_coef=0.01)), value_coef=0.3)
    return products(make_update(tx, loss, microbatches=2), state, batch, params)


def rollout(model, params, lora, batch):
    config = SampleConfig(max_new_tokens=8, n=1, stop=(1,))
    run = jax.jit(partial(sample, model, sample_config=config, value=True))
    prompt = jnp.ones((2, 6), jnp.int32)
    return products(run, params, prompt, prompt, jax.random.key(0))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("step", [update, rollout])
def test_products_of_float32_are_in_float32(step, remat, model, params, lora, batch):
    for line, _ in step(replace(model, remat=remat), params, lora, batch):
        assert "precision = [HIGHEST, HIGHEST]" in line


@pytest.mark.parametrize("step", [update, rollout])
def test_products_of_bfloat16_are_left_alone(step, model, params, lora, batch):
    """All but the scalar head's, which is in float32."""
    found = step(replace(model, dtype="bfloat16"), params, lora, batch)
    exact = [types for line, types in found if "HIGHEST" in line]
    assert len(found) - len(exact) > 5
    assert not any("bf16" in types for types in exact)
