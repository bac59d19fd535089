"""Completions of prompts, and of several the best by a reward: policies that need no training.

Best-of-n keeps the sample with the highest reward: KL(π‖π_ref) ≤ log n − (n − 1)/n nats
(``best_of_n_kl``). Resampling keeps one with probability ∝ exp(r/β): with many samples, a draw from
the optimum π* of the KL-regularised objective itself (``importance_resample``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.algorithms import importance_resample
from jaxrlhf.config import MeshConfig, RewardConfig, SampleConfig, check_sample, check_seed
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Params, Rollout
from jaxrlhf.data.formats import Prompt
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.tokens import check_ids, encode_prompt, pad_rows
from jaxrlhf.mesh.sharding import DECODE, make_mesh, put_rows, row_shards
from jaxrlhf.models.ends import read_ends
from jaxrlhf.models.load import Loader, load_model, scores_texts
from jaxrlhf.models.stop_strings import stop_table
from jaxrlhf.models.transformer import Model
from jaxrlhf.rewards.judge import make_judge
from jaxrlhf.steps.sample import sample

CHOICE = 0x7FFFFFFD
"""Stream of the draws among completions, beside those of their rows."""

AT_ONCE = 64
"""Completions that a device decodes at once, unless ``SampleConfig.slots`` says another number."""

Keep = Literal["all", "best", "resample"]


class Completed(NamedTuple):
    """A completion, and its reward if there is one to ask."""

    text: str
    reward: float | None


def complete(
    path: str,
    prompts: Sequence[str],
    config: SampleConfig,
    reward: RewardConfig | None = None,
    keep: Keep = "all",
    beta: float = 1.0,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> list[list[Completed]]:
    """Complete prompts, as plain text.

    Args:
      path: smollm2, a Hugging Face folder, a .gguf file, or the output folder of a run.
      config: ``n`` samples a prompt; they end as those of the model do (``read_ends``), and by what
        it adds.
      reward: what judges the completions.
      keep: all of a prompt's samples, the one with the highest reward, or one drawn ∝ exp(r/β).
      beta: β of that draw, reward units a nat.

    Raises:
      InputError: a number out of its range, a reward model in place of a policy, a prompt without
        a token, one that is too long, ``keep`` without a reward, or a prompt none of whose
        completions got one.
    """
    check_sample(config)
    check_seed(seed)
    if keep != "all" and reward is None:
        raise InputError(f"keep={keep}: needs a reward: give a function or a reward model")
    if keep != "all" and config.n < 2:
        raise InputError(f"keep={keep}: n={config.n} leaves nothing to choose from: raise n")
    # Not "beta <= 0", which NaN passes.
    if not beta > 0:
        raise InputError(f"beta={beta:g}: must be above 0")
    if keep != "resample" and beta != 1:
        raise InputError(f"beta={beta:g}: keep={keep} does not read it: leave it out")
    if scores_texts(path):
        raise InputError(f"{path}: a reward model, which completes nothing: give a policy")
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    key, n = jax.random.key(seed), config.n
    sources = [Prompt(text, {}, f"prompt {i + 1}") for i, text in enumerate(prompts)]
    with jax.set_mesh(mesh):
        model, params, tokenizer = load_model(path, mesh)
        ends = read_ends(path, tokenizer, model.decoder.vocab)
        config = replace(config, slots=config.slots or AT_ONCE * row_shards(DECODE))
        rollout = _draw(model, params, tokenizer, sources, ends.settle(config), key, mesh)
        host = jax.device_get(rollout)
        text_B = decode_rollout(tokenizer, host.token_BT, host.mask_BT, [""] * len(host.token_BT))
        if reward is None:
            return _split((Completed(text, None) for text in text_B), n)
        judge = make_judge((reward,), Loader(mesh), tokenizer, model.decoder.vocab, "reward")
        reward_B = np.asarray(judge(rollout, sources).reward_B, np.float32)
    rows = _split(map(Completed, text_B, reward_B.tolist()), n)
    if keep == "all":
        return rows
    kept_Q = choose(reward_B.reshape(-1, n), keep, beta, jax.random.fold_in(key, CHOICE))
    return [[row[i]] for row, i in zip(rows, kept_Q, strict=True)]


def _draw(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: SampleConfig,
    key: jax.Array,
    mesh: Mesh,
) -> Rollout:
    """``config.n`` samples of each prompt."""
    places = [prompt.where for prompt in prompts]
    ids = [encode_prompt(tokenizer, prompt.text, prompt.where) for prompt in prompts]
    for row, place in zip(ids, places, strict=True):
        check_ids(row, model.decoder.vocab, place)
    width, context = max(map(len, ids)), model.decoder.context
    if width + config.max_new_tokens > context:
        tokens = width + config.max_new_tokens
        raise InputError(f"{tokens} tokens, and the model's context is {context}: ask for fewer")
    arrays = put_rows(pad_rows(ids, width, config.pad, places, left=True), mesh)
    stops = stop_table(tokenizer, config.stop_strings, model.decoder.vocab)
    draw = jax.jit(sample, static_argnums=(0, 5))
    return draw(model, params, *arrays, key, config, stops=stops)


def choose(
    reward_QN: np.ndarray, keep: Literal["best", "resample"], beta: float, key: jax.Array
) -> np.ndarray:
    """The sample of each prompt that is kept, [Q]; NaN is an unknown reward, which none wins by."""
    lost_Q = ~np.isfinite(reward_QN).any(1)
    if lost_Q.any():
        raise InputError(f"prompt {np.argmax(lost_Q) + 1}: no completion got a reward")
    if keep == "best":
        return np.nanargmax(reward_QN, axis=1)
    return np.asarray(importance_resample(key, jnp.asarray(reward_QN), beta, 1))[:, 0]


def _split(rows: Iterable[Completed], n: int) -> list[list[Completed]]:
    """Prompt-major rows, a list a prompt."""
    items = list(rows)
    return [items[i : i + n] for i in range(0, len(items), n)]
