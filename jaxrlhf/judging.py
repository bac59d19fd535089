"""A run's rewards: reward models on the mesh and Python functions on the host, summed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import RewardConfig
from jaxrlhf.data.formats import Prompt, stack_columns
from jaxrlhf.networks import Loader
from jaxrlhf.rewards.combine import combine
from jaxrlhf.rewards.functions import Reward, call, load_rewards
from jaxrlhf.rewards.text import decode_rollout, repeat
from jaxrlhf.scorers import Scorer, load_scorer
from jaxrlhf.sharding import put_rows
from jaxrlhf.types import Array, Rollout


class Judgement(NamedTuple):
    """What a rollout is worth. Rows without a reward are NaN and not valid."""

    reward_B: Array
    valid_B: Array
    parts: dict[str, Array | np.ndarray]
    """The unweighted scores [B] of each source, by name."""


@dataclass(frozen=True)
class Judge:
    """The reward sources of a run, ready to be asked."""

    sources: tuple[Reward, ...]
    scorers: tuple[Scorer | None, ...]
    """The reward models of each source that is made of them."""
    tokenizer: Any
    mesh: Any

    def __call__(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Judgement:
        """Score every row. Arrays stay on their devices where all sources are reward models.

        Args:
          rollout: B = Q·G rows.
          prompts: the Q prompts.
        """
        scores = [
            self._function(source, rollout, prompts) if scorer is None else scorer(rollout)
            for source, scorer in zip(self.sources, self.scorers, strict=True)
        ]
        parts = dict(zip([source.name for source in self.sources], scores, strict=True))
        weights = [source.weight for source in self.sources]
        if all(isinstance(x, jax.Array) for x in scores):
            weighted = [w * jnp.asarray(x) for w, x in zip(weights, scores, strict=True)]
            reward_B = jnp.stack(weighted).sum(0)
            return Judgement(reward_B, jnp.isfinite(reward_B), parts)
        host = combine([np.asarray(x) for x in scores], weights)
        reward_B, valid_B = put_rows(host, self.mesh)
        return Judgement(reward_B, valid_B, parts)

    def _function(self, source: Reward, rollout: Rollout, prompts: Sequence[Prompt]) -> np.ndarray:
        token_BT, mask_BT = jax.device_get((rollout.token_BT, rollout.mask_BT))
        n = len(token_BT) // len(prompts)
        texts = repeat([prompt.text for prompt in prompts], n)
        completions = decode_rollout(self.tokenizer, token_BT, mask_BT, texts)
        columns = {name: repeat(x, n) for name, x in stack_columns(prompts).items()}
        assert source.function is not None
        return call(source.name, source.function, texts, completions, columns)


def make_judge(
    configs: Sequence[RewardConfig], loader: Loader, tokenizer: Any, vocab: int, field: str
) -> Judge:
    """The judge that a list of reward configs describes.

    Raises:
      InputError: none given, one that cannot be had, or a reward model with another vocabulary.
    """
    sources = load_rewards(configs, field)
    scorers = [
        load_scorer(config, loader, tokenizer, vocab, f"{field}[{index}]")
        if config.model or config.ensemble
        else None
        for index, config in enumerate(configs)
    ]
    return Judge(sources, tuple(scorers), tokenizer, loader.mesh)
