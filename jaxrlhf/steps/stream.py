"""A response a token at a time, for who reads along: the same tokens as ``sample`` draws."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import SampleConfig, check_sample
from jaxrlhf.core.types import Array, Params, StopTable
from jaxrlhf.models.cache import Layer, empty_cache
from jaxrlhf.models.decode import Prompts, Weights, kind_of, lay_out_soon, read_prompts, step
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.draw import Drawn, choose

WIDTH = 64
"""Prompts are padded to so many tokens, or twice, four times … as many: few programs."""


class State(NamedTuple):
    """A response so far."""

    prompts: Prompts
    cache: tuple[Layer, ...]
    token_B: Array
    """The last token, [1]."""
    t: Array
    """int32, how many there are."""
    read_B: Array | None
    """As ``Drawn.read_B``."""


def stream(
    model: Model,
    params: Params,
    prompt: list[int],
    key: Array,
    config: SampleConfig,
    stops: StopTable | None = None,
    weights: Weights | None = None,
) -> Iterator[int]:
    """The tokens of one response, each as soon as it is drawn, the one that ends it among them.

    They are the tokens that ``sample`` draws for this prompt alone with the same arguments.

    Args:
      prompt: its tokens, at least one.
      key, config, stops, weights: as ``sample``'s; ``config.n`` and ``config.slots`` are not read.

    Raises:
      InputError: a setting is out of its range.
      ValueError: prompt and response would not fit the context.
    """
    check_sample(config)
    context, new = model.decoder.context, config.max_new_tokens
    if not prompt or len(prompt) + new > context:
        raise ValueError(f"stream: {len(prompt)} prompt + {new} new tokens, context={context}")
    width = WIDTH
    while width < len(prompt):
        width *= 2
    width = min(width, context - new)
    row_1P = np.full((1, width), config.pad, np.int32)
    row_1P[0, width - len(prompt) :] = prompt
    mask_1P = (np.arange(width) >= width - len(prompt)).astype(np.int32)[None]
    weights = lay_out_soon(model, params) if weights is None else weights
    # As the only row of a call of ``sample``.
    key_B = jax.random.fold_in(key, 0)[None]
    found, state = _first(model, params, weights, row_1P, mask_1P, key_B, config, stops)
    yield int(found.token_B[0])
    for _ in range(new - 1):
        if found.ended_B[0]:
            return
        found, state = _next(model, weights, state, key_B, config, stops)
        yield int(found.token_B[0])


@partial(jax.jit, static_argnums=(0, 6))
def _first(
    model: Model,
    params: Params,
    weights: Weights,
    prompt_1P: Array,
    mask_1P: Array,
    key_B: Array,
    config: SampleConfig,
    stops: StopTable | None,
) -> tuple[Drawn, State]:
    """Read the prompt and draw the first token."""
    kind = kind_of(model, config)
    hidden_BD, prompts = read_prompts(model, params, prompt_1P, mask_1P, kind=kind)
    read_B = None if stops is None else jnp.zeros(1, jnp.int32)
    cache = empty_cache(model.decoder, kind, 1, config.max_new_tokens - 1)
    t = jnp.zeros((), jnp.int32)
    found = choose(model, weights, hidden_BD, key_B, t, read_B, config, False, stops)
    return found, State(prompts, cache, found.token_B, t + 1, found.read_B)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _next(
    model: Model,
    weights: Weights,
    state: State,
    key_B: Array,
    config: SampleConfig,
    stops: StopTable | None,
) -> tuple[Drawn, State]:
    """Run the policy on the last token and draw the next."""
    prompts, t = state.prompts, state.t
    hidden_BD, cache, _ = step(model, weights, prompts, state.cache, state.token_B, t - 1)
    found = choose(model, weights, hidden_BD, key_B, t, state.read_B, config, False, stops)
    return found, State(prompts, cache, found.token_B, t + 1, found.read_B)
