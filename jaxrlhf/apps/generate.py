"""Answers to prompts, and of several the best by a reward: policies that need no training.

Best-of-n keeps the sample with the highest reward: KL(π‖π_ref) ≤ log n − (n − 1)/n nats
(``best_of_n_kl``). Resampling keeps one with probability ∝ exp(r/β): with many samples, a draw from
the optimum π* of the KL-regularised objective itself (``importance_resample``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.algorithms import importance_resample
from jaxrlhf.config import MeshConfig, RewardConfig, SampleConfig, check_sample, check_seed
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.shown import one_line
from jaxrlhf.core.types import Params, Rollout, StopTable
from jaxrlhf.data.chat import PLAIN, ChatSettings, Writer, chat_settings
from jaxrlhf.data.formats import Prompt
from jaxrlhf.data.rows import Row, columns_of, read_rows, text_of
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.tokens import check_ids, encode_prompt, pad_rows
from jaxrlhf.data.turns import render
from jaxrlhf.mesh.sharding import DECODE, make_mesh, put_rows, row_shards
from jaxrlhf.models.ends import read_ends
from jaxrlhf.models.hub import fetch
from jaxrlhf.models.load import Loader, is_run, load_model, run_config, scores_texts
from jaxrlhf.models.stop_strings import stop_table
from jaxrlhf.models.transformer import Model
from jaxrlhf.rewards.judge import make_judge
from jaxrlhf.steps.sample import sample

CHOICE = 0x7FFFFFFD
"""Stream of the draws among completions, beside those of their rows."""

AT_ONCE = 64
"""Completions that a device decodes at once, unless ``SampleConfig.slots`` says another number."""

ENDED_AT_ONCE = "(it ended at once)"
"""What is shown of an answer without a word."""

Keep = Literal["all", "best", "resample"]


class Completed(NamedTuple):
    """A completion, and its reward if there is one to ask."""

    text: str
    reward: float | None


class Policy(NamedTuple):
    """A model that is asked, with what it takes to ask it."""

    path: str
    model: Model
    params: Params
    tokenizer: Any
    config: SampleConfig
    """How it is asked; responses end as the model's do."""
    settings: ChatSettings

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.settings.template or self.tokenizer.chat_template)

    def prompt_of(self, given: str | Row, where: str, chat: bool) -> Prompt:
        """A text, or a row with one or with messages in its column ``prompt``, as it is asked.

        Args:
          chat: a text is what a user says, if there is a chat template.
        """
        row = given if isinstance(given, Row) else Row({"prompt": given}, where)
        said = text_of(row, "prompt")
        if isinstance(said, str):
            if not (chat and self.chats):
                return Prompt(said, columns_of(row, "prompt"), row.where)
            said = [{"role": "user", "content": said}]
        text, _ = render(Writer(self.tokenizer, row.where, self.settings, row.values), said, ())
        return Prompt(text, columns_of(row, "prompt"), row.where, chat=True, messages=said)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's ids.

        Raises:
          InputError: there are none, the model has not all of them, or they leave no room.
        """
        ids = encode_prompt(self.tokenizer, prompt.text, prompt.where, prompt.chat)
        check_ids(ids, self.model.decoder.vocab, prompt.where)
        tokens, context = len(ids) + self.config.max_new_tokens, self.model.decoder.context
        if tokens > context:
            most = f"{tokens} tokens with the answer, and the model's context is {context}"
            raise InputError(f"{prompt.where}: {most}: ask for fewer")
        return ids

    def stops(self) -> StopTable | None:
        """How the strings that end a response are sought."""
        return stop_table(self.tokenizer, self.config.stop_strings, self.model.decoder.vocab)


def load_policy(path: str, config: SampleConfig, mesh: Mesh) -> Policy:
    """The model of a path, as ``complete`` asks it.

    A run's chats are rendered by its own settings; what a template leaves out of past turns, as
    thoughts, it may leave out here.

    Raises:
      InputError: it is a reward model, or none at all.
    """
    path = fetch(path)
    if scores_texts(path):
        raise InputError(f"{path}: a reward model, which completes nothing: give a policy")
    model, params, tokenizer = load_model(path, mesh)
    settings = chat_settings(run_config(path).data) if is_run(path) else PLAIN
    config = read_ends(path, tokenizer, model.decoder.vocab).settle(config)
    return Policy(path, model, params, tokenizer, config, replace(settings, allow_dropped=True))


def complete(
    path: str,
    prompts: Sequence[str | Row],
    config: SampleConfig,
    reward: RewardConfig | None = None,
    keep: Keep = "all",
    beta: float = 1.0,
    seed: int = 0,
    mesh: Mesh | None = None,
    chat: bool = False,
) -> list[list[Completed]]:
    """Complete prompts.

    Args:
      path: smollm2, a Hugging Face folder, a .gguf file, or the output folder of a run.
      prompts: texts, or rows with a text or messages in their column ``prompt``, whose other
        columns the reward is given.
      config: ``n`` samples a prompt; they end as those of the model do (``read_ends``), and by what
        it adds.
      reward: what judges the completions.
      keep: all of a prompt's samples, the one with the highest reward, or one drawn ∝ exp(r/β).
      beta: β of that draw, reward units a nat.
      chat: a text is what a user says, where the model has a chat template; False: it is continued
        as it is. Messages are always rendered.

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
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    key, n = jax.random.key(seed), config.n
    with jax.set_mesh(mesh):
        config = replace(config, slots=config.slots or AT_ONCE * row_shards(DECODE))
        policy = load_policy(path, config, mesh)
        tokenizer, vocab = policy.tokenizer, policy.model.decoder.vocab
        sources = [policy.prompt_of(x, f"prompt {i}", chat) for i, x in enumerate(prompts, 1)]
        rollout = _draw(policy, sources, key, mesh)
        host = jax.device_get(rollout)
        text_B = decode_rollout(tokenizer, host.token_BT, host.mask_BT, [""] * len(host.token_BT))
        if reward is None:
            return _split((Completed(text, None) for text in text_B), n)
        judge = make_judge((reward,), Loader(mesh), tokenizer, vocab, "reward")
        reward_B = np.asarray(judge(rollout, sources).reward_B, np.float32)
    rows = _split(map(Completed, text_B, reward_B.tolist()), n)
    if keep == "all":
        return rows
    kept_Q = choose(reward_B.reshape(-1, n), keep, beta, jax.random.fold_in(key, CHOICE))
    return [[row[i]] for row, i in zip(rows, kept_Q, strict=True)]


def read_asked(path: str) -> list[str | Row]:
    """The prompts of a file: of .txt its lines but for empty ones, else its rows.

    Raises:
      InputError: it cannot be read, or has none.
    """
    if not path.endswith(".txt"):
        return [*read_rows(path).items]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from None
    rows = [Row({"prompt": x}, f"{path}:{i}") for i, x in enumerate(lines, 1) if x.strip()]
    if not rows:
        raise InputError(f"{path}: no line has a text: give one prompt a line")
    return [*rows]


def _draw(policy: Policy, prompts: Sequence[Prompt], key: jax.Array, mesh: Mesh) -> Rollout:
    """``config.n`` samples of each prompt."""
    ids = [policy.encode(prompt) for prompt in prompts]
    places = [prompt.where for prompt in prompts]
    arrays = put_rows(pad_rows(ids, max(map(len, ids)), policy.config.pad, places, left=True), mesh)
    draw = jax.jit(sample, static_argnums=(0, 5))
    return draw(policy.model, policy.params, *arrays, key, policy.config, stops=policy.stops())


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
