"""Tokens one after the other are those of a sample."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import SampleConfig
from jaxrlhf.core.types import StopTable
from jaxrlhf.models.decode import lay_out
from jaxrlhf.steps import stream as streaming
from jaxrlhf.steps.sample import sample
from jaxrlhf.steps.stream import stream

PROMPT = [7, 11, 5]
CONFIG = SampleConfig(max_new_tokens=12, n=1, stop=tuple(range(3, 40)), forbidden=((0, 3),))


def sampled(model, params, key, config, stops=None):
    prompt = jnp.array([PROMPT], jnp.int32)
    rollout = sample(model, params, prompt, prompt * 0 + 1, key, config, stops=stops)
    return rollout.token_BT[0, 3:][rollout.mask_BT[0, 3:] == 1].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_yields_the_tokens_of_a_sample(temperature, model, params):
    config = replace(CONFIG, temperature=temperature)
    lengths = set()
    for seed in range(6):
        key = jax.random.key(seed)
        found = list(stream(model, params, PROMPT, key, config, weights=lay_out(model, params)))
        assert found == sampled(model, params, key, config)
        lengths.add(len(found))
    assert temperature == 0 or len(lengths) > 1  # some ended


def test_stream_ends_with_a_stop_string(model, params):
    """Any token of the upper half of the vocabulary and then one of the lower."""
    key, vocab = jax.random.key(1), model.decoder.vocab
    kind_V = (np.arange(vocab) < vocab // 2).astype(np.int32)
    stops = StopTable(kind_V, np.array([[1, 0], [1, 2], [2, 2]], np.int32))
    config = replace(CONFIG, stop=(), stop_strings=("ab",))
    found = list(stream(model, params, PROMPT, key, config, stops))
    assert found == sampled(model, params, key, config, stops)
    assert len(found) < CONFIG.max_new_tokens


def test_stream_refuses_what_does_not_fit(model, params):
    config = replace(CONFIG, max_new_tokens=model.decoder.context)
    with pytest.raises(ValueError, match="context"):
        next(stream(model, params, PROMPT, jax.random.key(0), config))
    with pytest.raises(ValueError, match="0 prompt"):
        next(stream(model, params, [], jax.random.key(0), CONFIG))


def test_stream_compiles_once_for_prompts_of_like_length(model, params):
    weights = lay_out(model, params)
    sizes = []
    for prompt in ([3, 4], list(range(3, 12))):
        list(stream(model, params, prompt, jax.random.key(0), CONFIG, weights=weights))
        sizes.append((streaming._first._cache_size(), streaming._next._cache_size()))
    assert sizes[0] == sizes[1]
