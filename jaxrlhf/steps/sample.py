"""Rollout sampling: prompts in, responses and their log-probs out, in one jitted loop."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxrlhf.config import SampleConfig, check_sample
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, Params, Rollout, StopTable
from jaxrlhf.mesh.sharding import DECODE, constrain, platform, row_shards
from jaxrlhf.models.cache import empty_cache, grow
from jaxrlhf.models.decode import Prompts, Weights, kind_of, lay_out, read_prompts, step
from jaxrlhf.models.replay import unknown, where_known
from jaxrlhf.models.rope import angle_tables
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.draw import choose, columns_of
from jaxrlhf.steps.slots import decode_in_slots

TOKENS_READ = 4096
"""Tokens of prompts that keep a GPU or TPU busy, and are read at once."""

CACHED = 512
"""Tokens of prompts that a CPU reads at once: what a layer makes of them stays in its caches."""

LONG = 1024
"""New tokens from which on decoding has two loops, the first over caches of half the length. More
loops read less yet, and each is a program to compile."""

MANY = 8192
"""New tokens of all rows from which on it has two on a CPU, whose memory is slow beside it."""


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
    a stop token. With ``sample_config.slots`` fewer rows are decoded at once, and one that ends
    makes room for the next. Jit it with ``model`` and ``sample_config`` static.

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
      InputError: at trace time, if a setting is out of its range, or asks what the model lacks.
      ValueError: then too, if prompt and response would not fit the context, or strings are to end
        a response and ``stops`` is missing, or ``slots`` do not divide over the devices.
    """
    chex.assert_rank([prompt_QP, prompt_mask_QP], 2)
    chex.assert_equal_shape([prompt_QP, prompt_mask_QP])
    check_sample(sample_config)
    new, context = sample_config.max_new_tokens, model.decoder.context
    if (width := prompt_QP.shape[1]) + new > context:
        raise ValueError(f"sample: {width} prompt + {new} new tokens exceed context={context}")
    if sample_config.stop_strings and stops is None:
        raise ValueError("sample: sample_config.stop_strings are sought by a table: give stops")
    if sample_config.slots % (shards := row_shards(DECODE)):
        raise ValueError(f"sample: slots={sample_config.slots} % devices of rows={shards} is not 0")
    # Gathered once, or every decoded token would gather every layer again.
    weights = lay_out(model, params, lora) if weights is None else weights
    hidden_BD, read = _read(model, params, prompt_QP, prompt_mask_QP, sample_config, lora)
    row_B = jnp.arange(len(hidden_BD)) if row_B is None else row_B
    chex.assert_equal_shape_prefix([row_B, hidden_BD], 1)
    # A key a row, then one a token: draws depend on neither mesh nor batch width.
    key_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)
    decode = decode_in_slots if 0 < sample_config.slots < len(hidden_BD) else _decode
    end = decode(model, weights, hidden_BD, read, key_B, sample_config, value, stops)
    return _rollout(end, prompt_QP, prompt_mask_QP, read.expert_QPM, sample_config.n)


def replays(model: Model, config: SampleConfig) -> bool:
    """Whether scoring and updating are to take the sampler's experts again; see ``models.replay``.

    Raises:
      InputError: it is asked for of a model that has none.
    """
    if config.router_replay and not model.routes:
        raise InputError(
            "sample.router_replay=true: the model is no mixture of experts, and has no router: "
            "leave it out"
        )
    if config.router_replay is None:
        return model.routes and model.dtype == "bfloat16"
    return config.router_replay


def _read(
    model: Model,
    params: Params,
    prompt_QP: Array,
    prompt_mask_QP: Array,
    config: SampleConfig,
    lora: Params | None,
) -> tuple[Array, Prompts]:
    """Hidden state [B, D] of each row's last prompt token, and the prompts' keys and values."""
    shards, n = row_shards(DECODE), config.n
    # Each prompt once; where prompts do not divide over the devices, as often as makes them divide.
    again = next(k for k in range(1, n + 1) if n % k == 0 and len(prompt_QP) * k % shards == 0)
    prompt, mask = (jnp.repeat(x, again, axis=0) for x in (prompt_QP, prompt_mask_QP))
    pieces = _pieces(len(prompt) // shards, prompt.shape[1], config.slots // shards)
    kind = kind_of(model, config)
    record = bool(config.router_replay) and replays(model, config)
    hidden, prompts = read_prompts(model, params, prompt, mask, lora, pieces, kind, record)
    last_BD = jnp.repeat(hidden, n // again, axis=0)
    return constrain(last_BD, ("batch", "activation"), DECODE), prompts


def _pieces(prompts: int, width: int, slots: int) -> int:
    """Pieces that a device reads its prompts in: what is read at once also takes memory."""
    on_cpu, at_once = platform() == "cpu", slots or prompts
    if not on_cpu:
        at_once = min(at_once, max(TOKENS_READ // width, 1))
    counts = [n for n in range(1, prompts + 1) if prompts % n == 0]
    fewest = next(n for n in counts if prompts // n <= at_once)
    # A CPU gains by more, as long as none is small.
    return max([fewest, *(n for n in counts if on_cpu and prompts // n * width >= CACHED)])


def stages_of(rows: int, new: int) -> tuple[int, ...]:
    """The tokens that there are after each loop of decoding."""
    many = platform() == "cpu" and rows * new >= MANY
    return (new // 2, new) if new >= (2 if many else LONG) else (new,)


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
    rows = hidden_BD.shape[0]
    stages = stages_of(rows, config.max_new_tokens)
    table = angle_tables(prompts.mask_QP.shape[1] + config.max_new_tokens, model.decoder)

    def drawn(carry: dict[str, Any]) -> dict[str, Any]:
        """Draw the t-th token of every row that has not ended, from the last hidden state."""
        t, live_B = carry["t"], ~carry["done_B"]
        before = carry["hidden_BD"], key_B, t, carry["read_B"]
        found = choose(model, weights, *before, config, value, stops)
        columns = {
            name: jnp.where(live_B, x, config.pad if name == "token_BN" else 0)
            for name, x in columns_of(found).items()
        }
        written = {name: carry[name].at[:, t].set(column) for name, column in columns.items()}
        done_B = carry["done_B"] | (live_B & found.ended_B)
        return {**carry, **written, "t": t + 1, "done_B": done_B, "read_B": found.read_B}

    def extend(carry: dict[str, Any]) -> dict[str, Any]:
        """Run the policy on the token just drawn, then draw the next."""
        # The cache has the tokens before the one just drawn.
        t = carry["t"] - 1
        token_B = jax.lax.dynamic_index_in_dim(carry["token_BN"], t, 1, keepdims=False)
        last_BD, cache, expert_BM = step(model, weights, prompts, carry["cache"], token_B, t, table)
        more: dict[str, Any] = {"hidden_BD": last_BD, "cache": cache}
        if "expert_BNM" in carry:
            more["expert_BNM"] = _recorded(carry, expert_BM, t)
        return drawn({**carry, **more})

    start = {
        "t": jnp.zeros((), jnp.int32),
        "done_B": jnp.zeros(rows, bool),
        "hidden_BD": hidden_BD,
        # The last token drawn is never looked at.
        "cache": empty_cache(model.decoder, kind_of(model, config), rows, stages[0] - 1),
        **_blank(model, config, rows, value),
        "read_B": None if stops is None else jnp.zeros(rows, jnp.int32),
    }

    def loop(carry: dict[str, Any], most: int) -> dict[str, Any]:
        return jax.lax.while_loop(
            lambda carry: (carry["t"] < most) & ~carry["done_B"].all(), extend, carry
        )

    # The first token comes from the prompt's last hidden state, so the loop begins with a token.
    carry = drawn(start)
    # A step reads all of its caches: as long as responses are short, so are they.
    for most in stages:
        carry = loop({**carry, "cache": grow(model.decoder, carry["cache"], most - 1)}, most)
    return carry


def _blank(model: Model, config: SampleConfig, rows: int, value: bool) -> dict[str, Array]:
    """The columns before a token is drawn."""
    shape = rows, config.max_new_tokens
    floats = ["mask_BN", "logp_BN", "sample_logp_BN"] + ["value_BN"] * value
    columns = {name: jnp.zeros(shape, jnp.float32) for name in floats}
    columns["token_BN"] = jnp.full(shape, config.pad, jnp.int32)
    if config.router_replay:
        expert_BNM = unknown(model.decoder, shape)
        columns["expert_BNM"] = constrain(expert_BNM, ("batch", None, None), DECODE)
    return columns


def _recorded(carry: dict[str, Any], expert_BM: Any, t: Array) -> Array:
    """The experts so far, with those of the t-th tokens of the rows that go on."""
    expert_BM = where_known(~carry["done_B"], expert_BM)
    return jax.lax.dynamic_update_index_in_dim(carry["expert_BNM"], expert_BM, t, axis=1)


def _rollout(
    end: dict[str, Any], prompt_QP: Array, prompt_mask_QP: Array, expert_QPM: Array | None, n: int
) -> Rollout:
    """Prompt columns in front of what the loop wrote."""
    prompt = jnp.repeat(prompt_QP, n, axis=0).astype(jnp.int32)
    prompt_mask = jnp.repeat(prompt_mask_QP, n, axis=0).astype(jnp.int32)
    nothing = jnp.zeros(prompt.shape, jnp.float32)

    def after_prompt(x: Array) -> Array:
        return jnp.concatenate([nothing, x], axis=1)

    expert_BTM = None
    if expert_QPM is not None:  # a prompt may have been read more than once
        expert_BPM = jnp.repeat(expert_QPM, len(prompt) // len(expert_QPM), axis=0)
        expert_BTM = jnp.concatenate([expert_BPM, end["expert_BNM"]], axis=1)
    new_mask = end["mask_BN"].astype(jnp.int32)
    return Rollout(
        token_BT=jnp.concatenate([prompt, end["token_BN"]], axis=1),
        attention_mask_BT=jnp.concatenate([prompt_mask, new_mask], axis=1),
        mask_BT=after_prompt(end["mask_BN"]),
        logp_BT=after_prompt(end["logp_BN"]),
        sample_logp_BT=after_prompt(end["sample_logp_BN"]),
        ended_B=end["done_B"],
        value_BT=after_prompt(end["value_BN"]) if "value_BN" in end else None,
        expert_BTM=expert_BTM,
        n=n,
    )
