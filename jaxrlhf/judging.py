"""A run's rewards: reward models on the mesh and Python functions on the host, summed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import RewardConfig
from jaxrlhf.data.formats import Prompt, stack_columns
from jaxrlhf.errors import InputError
from jaxrlhf.networks import Loader, Network
from jaxrlhf.rewards.combine import combine
from jaxrlhf.rewards.functions import Reward, call, load_rewards
from jaxrlhf.rewards.text import decode_rollout, repeat
from jaxrlhf.sharding import put_rows
from jaxrlhf.steps.scoring import reward
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
    networks: tuple[Network | None, ...]
    """The reward model of each source that is one."""
    tokenizer: Any
    mesh: Any

    def __call__(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Judgement:
        """Score every row. Arrays stay on their devices where all sources are reward models.

        Args:
          rollout: B = Q·G rows.
          prompts: the Q prompts.
        """
        scores = [
            self._function(source, rollout, prompts) if network is None else run(network, rollout)
            for source, network in zip(self.sources, self.networks, strict=True)
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
    networks = []
    for index, config in enumerate(configs):
        network = loader.trained(config.model) if config.model else None
        if network is not None and network.model.decoder.vocab != vocab:
            raise InputError(
                f"{field}[{index}].model={config.model}: its vocabulary has "
                f"{network.model.decoder.vocab} tokens, the policy's {vocab}: train it on the "
                "policy's tokenizer"
            )
        networks.append(network)
    return Judge(sources, tuple(networks), tokenizer, loader.mesh)


def run(network: Network, rollout: Rollout) -> Array:
    """The reward model's score of each row, [B]."""
    return _reward(
        network.model, network.params, rollout.token_BT, rollout.attention_mask_BT, network.lora
    )


_reward: Callable[..., Array] = jax.jit(reward, static_argnums=0)
