"""Rollout sampling: prompts in, responses and their log-probs out, in one jitted loop.

Below it, how a token is drawn from logits: truncation, and an exact draw that costs little and
shards well.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.config import SampleConfig, check_sample
from jaxrlhf.core.types import Array, Params, Rollout, StopTable
from jaxrlhf.mesh.sharding import DECODE, constrain, row_shards, vocab_shards
from jaxrlhf.models.decode import Prompts, Weights, empty_cache, lay_out, read_prompts, step
from jaxrlhf.models.transformer import Model


def sample(
    model: Model,
    params: Params,
    prompt_QP: Array,
    prompt_mask_QP: Array,
    key: Array,
    sample_config: SampleConfig,
    lora: Params | None = None,
    value: bool = False,
    row_B: Array | None = None,
    stops: StopTable | None = None,
    weights: Weights | None = None,
) -> Rollout:
    """Draw ``sample_config.n`` responses to each prompt from the policy.

    The draw of row b's t-th response token uses ``fold_in(fold_in(key, b), t)``: it depends on
    neither the mesh nor the padding nor the other rows. The loop ends as soon as every row has met
    a stop token. Jit it with ``model`` and ``sample_config`` static.

    Args:
      prompt_QP: int32 [Q, P], **left-padded** prompts.
      prompt_mask_QP: [Q, P], 1 on real tokens.
      key: a key of this call alone, say ``fold_in(key(seed), step)``.
      sample_config: static; ``temperature`` 0 is greedy, and then ``logp_BT`` is that of T = 1.
      lora: adapters, or None for the weights as they are.
      value: also return V of each state, from the head in ``params``.
      row_B: int32 [B], what stands for b in the keys, so that the draws do not depend on how many
        rows are in one call; None: 0, 1, … B − 1.
      stops: ``stop_table(tokenizer, sample_config.stop_strings, vocab)``; None without strings.
      weights: ``lay_out(model, params, lora)``, where that is done: a second copy of the weights.

    Returns:
      Rollout of B = Q·n rows, prompt-major; T = P + max_new_tokens columns. Log-probs in nats.

    Raises:
      InputError: at trace time, if a setting is out of its range.
      ValueError: then too, if prompt and response would not fit the context, or strings are to end
        a response and ``stops`` is missing.
    """
    chex.assert_rank([prompt_QP, prompt_mask_QP], 2)
    chex.assert_equal_shape([prompt_QP, prompt_mask_QP])
    check_sample(sample_config)
    width, context = prompt_QP.shape[1] + sample_config.max_new_tokens, model.decoder.context
    if width > context:
        given = f"{prompt_QP.shape[1]} prompt + {sample_config.max_new_tokens} new tokens"
        raise ValueError(f"sample: {given} exceed context={context}")
    if sample_config.stop_strings and stops is None:
        raise ValueError("sample: sample_config.stop_strings are sought by a table: give stops")
    # Gathered once, or every decoded token would gather every layer again.
    weights = lay_out(model, params, lora) if weights is None else weights
    hidden_BD, read = _read(model, params, prompt_QP, prompt_mask_QP, sample_config.n, lora)
    row_B = jnp.arange(len(hidden_BD)) if row_B is None else row_B
    chex.assert_equal_shape_prefix([row_B, hidden_BD], 1)
    # A key a row, then one a token: draws depend on neither mesh nor batch width.
    key_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)
    end = _decode(model, weights, hidden_BD, read, key_B, sample_config, value, stops)
    return _rollout(end, prompt_QP, prompt_mask_QP, sample_config.n)


def _read(
    model: Model,
    params: Params,
    prompt_QP: Array,
    prompt_mask_QP: Array,
    n: int,
    lora: Params | None,
) -> tuple[Array, Prompts]:
    """Hidden state [B, D] of each row's last prompt token, and the prompts' keys and values."""
    # Each prompt once; where prompts do not divide over the devices, once for each of its rows.
    once = prompt_QP.shape[0] % row_shards(DECODE) == 0
    before, after = (1, n) if once else (n, 1)
    prompt, mask = (jnp.repeat(x, before, axis=0) for x in (prompt_QP, prompt_mask_QP))
    hidden, prompts = read_prompts(model, params, prompt, mask, lora)
    last_BD = jnp.repeat(hidden, after, axis=0)
    return constrain(last_BD, ("batch", "activation"), DECODE), prompts


def _decode(
    model: Model,
    weights: Weights,
    hidden_BD: Array,
    prompts: Prompts,
    key_B: Array,
    config: SampleConfig,
    value: bool,
    stops: StopTable | None,
) -> dict[str, Any]:
    """Draw, run the policy on what was drawn, draw, … until all rows have ended; [B, N] columns."""
    rows, new = hidden_BD.shape[0], config.max_new_tokens

    def choose(carry: dict[str, Any]) -> dict[str, Any]:
        """Draw the t-th token of every row that has not ended, from the last hidden state."""
        t, live_B = carry["t"], ~carry["done_B"]
        logits_BV = constrain(
            model.logits(weights.outer, carry["hidden_BD"]), ("batch", "vocab"), DECODE
        )
        token_B, logp_B, sample_logp_B = _token(logits_BV, key_B, t, config)
        columns = {
            "token_BN": jnp.where(live_B, token_B, config.pad),
            "mask_BN": live_B.astype(jnp.float32),
            "logp_BN": jnp.where(live_B, logp_B, 0.0),
            "sample_logp_BN": jnp.where(live_B, sample_logp_B, 0.0),
        }
        if value:
            value_B = model.scalar(weights.outer, carry["hidden_BD"])
            columns["value_BN"] = jnp.where(live_B, value_B, 0.0)
        written = {name: carry[name].at[:, t].set(column) for name, column in columns.items()}
        # The stop token itself is live: it is in the mask, and stopping is learnt.
        ended_B, written["read_B"] = _ends(config, stops, token_B, carry["read_B"])
        done_B = carry["done_B"] | (live_B & ended_B)
        return {**carry, **written, "t": t + 1, "done_B": done_B}

    def extend(carry: dict[str, Any]) -> dict[str, Any]:
        """Run the policy on the token just drawn, then draw the next."""
        # The cache has the tokens before the one just drawn.
        t = carry["t"] - 1
        token_B = jax.lax.dynamic_index_in_dim(carry["token_BN"], t, 1, keepdims=False)
        hidden_BD, cache = step(model, weights, prompts, carry["cache"], token_B, t)
        return choose({**carry, "hidden_BD": hidden_BD, "cache": cache})

    floats = ["mask_BN", "logp_BN", "sample_logp_BN"] + ["value_BN"] * value
    start = {
        "t": jnp.zeros((), jnp.int32),
        "done_B": jnp.zeros(rows, bool),
        "hidden_BD": hidden_BD,
        # The last token drawn is never looked at.
        "cache": empty_cache(model, rows, max(new - 1, 1)),
        "token_BN": jnp.full((rows, new), config.pad, jnp.int32),
        **{name: jnp.zeros((rows, new), jnp.float32) for name in floats},
        "read_B": None if stops is None else jnp.zeros(rows, jnp.int32),
    }
    # The first token comes from the prompt's last hidden state, so the loop begins with a token.
    return jax.lax.while_loop(
        lambda carry: (carry["t"] < new) & ~carry["done_B"].all(), extend, choose(start)
    )


def _ends(
    config: SampleConfig, stops: StopTable | None, token_B: Array, read_B: Array | None
) -> tuple[Array, Array | None]:
    """Whether a token ends its row, and how much of the stop strings the row has read with it."""
    ended_B = (token_B[:, None] == jnp.array(config.stop, jnp.int32)).any(1)
    if stops is None:
        return ended_B, None
    read_B = jnp.asarray(stops.next_SC)[read_B, jnp.asarray(stops.class_V)[token_B]]
    return ended_B | (read_B == stops.next_SC.shape[0] - 1), read_B


def _token(
    logits_BV: Array, key_B: Array, t: Array, config: SampleConfig
) -> tuple[Array, Array, Array]:
    """The drawn token, its log-prob at the temperature, and that under the truncated draw."""
    if config.temperature == 0.0:
        token_B = jnp.argmax(forbid(logits_BV, config), axis=1).astype(jnp.int32)
        return token_B, log_prob(logits_BV, token_B), jnp.zeros(token_B.shape)
    # logp: full vocabulary at T, what ``score`` returns; sample_logp: what was drawn from.
    logits_BV = logits_BV / config.temperature
    allowed_BV = truncate(forbid(logits_BV, config), config)
    token_B = draw(jax.vmap(lambda k: jax.random.fold_in(k, t))(key_B), allowed_BV)
    return token_B, log_prob(logits_BV, token_B), log_prob(allowed_BV, token_B)


def log_prob(logits_BV: Array, token_B: Array) -> Array:
    """log softmax(logits)[token], float32 [B], without a second [B, V] array."""
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=1)


def _rollout(end: dict[str, Any], prompt_QP: Array, prompt_mask_QP: Array, n: int) -> Rollout:
    """Prompt columns in front of what the loop wrote."""
    prompt = jnp.repeat(prompt_QP, n, axis=0).astype(jnp.int32)
    prompt_mask = jnp.repeat(prompt_mask_QP, n, axis=0).astype(jnp.int32)
    nothing = jnp.zeros(prompt.shape, jnp.float32)

    def after_prompt(x: Array) -> Array:
        return jnp.concatenate([nothing, x], axis=1)

    new_mask = end["mask_BN"].astype(jnp.int32)
    return Rollout(
        token_BT=jnp.concatenate([prompt, end["token_BN"]], axis=1),
        attention_mask_BT=jnp.concatenate([prompt_mask, new_mask], axis=1),
        mask_BT=after_prompt(end["mask_BN"]),
        logp_BT=after_prompt(end["logp_BN"]),
        sample_logp_BT=after_prompt(end["sample_logp_BN"]),
        ended_B=end["done_B"],
        value_BT=after_prompt(end["value_BN"]) if "value_BN" in end else None,
        n=n,
    )


BLOCK = 256
"""Tokens that share one Gumbel variable at the first level of a draw."""


def draw(key_B: Array, logits_BV: Array) -> Array:
    """One token a row with Pr(v) ∝ exp(logits_v), by the Gumbel-max trick on two levels.

    argmax_j [logsumexp(block j) + Gumbel_j] is an exact draw of a block of 256 tokens, and
    argmax_v [logits_v + Gumbel_v] within it an exact draw of a token, at V/256 + 256 Gumbels a row
    instead of V. A token with logit −inf is never drawn, and logits that differ by rounding give
    the same token unless two candidates tie to that rounding (unlike an inverse CDF).

    Under a mesh the blocks are split over ``tensor``, −inf ones added until they divide, which
    changes no draw; a device sends the mass of its blocks, and of the block drawn its tokens.

    Args:
      key_B: one PRNG key a row.
      logits_BV: float32 [B, V], unnormalised; −inf forbids a token.

    Returns:
      int32 [B].
    """
    chex.assert_rank(logits_BV, 2)
    width = logits_BV.shape[1]
    blocks = -(-width // BLOCK)
    more = -(-blocks // vocab_shards()) * vocab_shards()
    padding = ((0, 0), (0, more * BLOCK - width))
    padded = jnp.pad(logits_BV.astype(jnp.float32), padding, constant_values=-jnp.inf)
    padded = constrain(padded, ("batch", "vocab"), DECODE)
    block_BJV = padded.reshape(-1, more, BLOCK)
    mass_BJ = jax.nn.logsumexp(block_BJV, axis=2)[:, :blocks]
    mass_BJ = constrain(mass_BJ, ("batch", None), DECODE)

    def choose(key: Array, mass: Array) -> tuple[Array, Array]:
        outer, inner = jax.random.split(key)
        return jnp.argmax(mass + jax.random.gumbel(outer, (blocks,))), inner

    block_B, inner_B = jax.vmap(choose)(key_B, mass_BJ)
    chosen_BV = jnp.take_along_axis(block_BJV, block_B[:, None, None], axis=1)[:, 0]
    chosen_BV = constrain(chosen_BV, ("batch", None), DECODE)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (BLOCK,)))(inner_B)
    token_B = jnp.argmax(chosen_BV + noise_BV, axis=1)
    return (block_B * BLOCK + token_B).astype(jnp.int32)


def forbid(logits_BV: Array, config: SampleConfig) -> Array:
    """−inf on ``config.forbidden``, ids that no text shows; logits [B, V] untouched without."""
    chex.assert_rank(logits_BV, 2)
    if not config.forbidden:
        return logits_BV
    id_V = jnp.arange(logits_BV.shape[1])
    ranges = jnp.array(config.forbidden)
    none_V = ((id_V >= ranges[:, :1]) & (id_V < ranges[:, 1:])).any(0)
    return jnp.where(none_V, -jnp.inf, logits_BV)


def truncate(logits_BV: Array, config: SampleConfig) -> Array:
    """Forbid (−inf) what top-k, top-p and min-p leave out, in this order; logits [B, V].

    - ``top_k``: only the k likeliest tokens stay (ties with the k-th stay too).
    - ``top_p`` (arXiv:1904.09751): a token stays if the tokens likelier than it hold less than
      ``top_p`` of what is left; at least one always does.
    - ``min_p`` (arXiv:2407.01082): a token stays if it is at least ``min_p`` times as likely as
      the likeliest.

    Logits are already divided by the temperature. Without truncation they come back untouched.
    """
    chex.assert_rank(logits_BV, 2)
    if 0 < config.top_k < logits_BV.shape[1]:
        kth_B1 = jax.lax.top_k(logits_BV, config.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if config.top_p < 1.0:
        sorted_BV = -jnp.sort(-logits_BV, axis=1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=1)
        before_BV = jnp.pad(jnp.cumsum(probability_BV, axis=1)[:, :-1], ((0, 0), (1, 0)))
        kept_BV = jnp.where(before_BV < config.top_p, sorted_BV, jnp.inf)
        kept_BV = kept_BV.at[:, 0].set(sorted_BV[:, 0])
        logits_BV = jnp.where(logits_BV >= kept_BV.min(1, keepdims=True), logits_BV, -jnp.inf)
    if config.min_p > 0.0:
        floor_B1 = logits_BV.max(1, keepdims=True) + jnp.log(config.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return logits_BV
