"""Reward models that judge what a policy has sampled: one, or several together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.algorithms import aggregate_steps, ensemble_score
from jaxrlhf.config import ProcessRewardModelConfig, RewardConfig, is_reward_model
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, Params, Rollout
from jaxrlhf.data.text import mark_step_ends
from jaxrlhf.mesh.sharding import at_hand, fetch, on_host, put_rows
from jaxrlhf.models.load import Loader, Network, offloaded
from jaxrlhf.models.transformer import Model
from jaxrlhf.steps.packed import PackedRows, in_pieces, keeps_apart
from jaxrlhf.steps.score import last_token, token_scores


@dataclass(frozen=True)
class Member:
    """A reward model, ready to be asked."""

    folder: str
    network: Network
    process: ProcessRewardModelConfig | None
    """How a process reward model's steps are found and become one reward; None for others."""


@dataclass(frozen=True)
class Scorer:
    """One source of reward that is made of reward models."""

    members: tuple[Member, ...]
    tokenizer: Any
    mesh: Mesh
    combine: Callable[[Array], Array]
    """Scores [M, B] of the members → [B]."""

    def __call__(self, rollout: Rollout) -> Array:
        """The score of each row, [B], reward units; NaN where there is none.

        Raises:
          InputError: rows longer than a member's context.
        """
        score_MB = jnp.stack([self._ask(member, rollout) for member in self.members])
        return self.combine(score_MB) if len(self.members) > 1 else score_MB[0]

    def _ask(self, member: Member, rollout: Rollout) -> Array:
        network, process = member.network, member.process
        width, context = rollout.token_BT.shape[1], network.model.decoder.context
        if width > context:
            raise InputError(
                f"reward model {member.folder}: rows of {width} tokens, and its context is "
                f"{context}: lower the token limits of data and sample"
            )
        texts = (rollout.token_BT, rollout.attention_mask_BT)
        rows = (network.model, at_hand(network.params), *texts)
        if process is None:
            score_B = _reward(*rows, network.lora)
        else:
            # Steps end where the separator does, which is found in the text, on the host.
            token_BT, mask_BT = fetch((rollout.token_BT, rollout.mask_BT))
            end_BT = mark_step_ends(token_BT, mask_BT, self.tokenizer, process.separator)
            end_BT = put_rows(end_BT, self.mesh)
            score_B = _aggregate(_token_scores(*rows, network.lora), end_BT, process.aggregate)
        # Offloaded weights: their copy on the device goes before the next member's comes.
        if any(map(on_host, jax.tree.leaves(network.params))):
            jax.block_until_ready(score_B)
        return score_B


def load_scorer(
    config: RewardConfig, loader: Loader, tokenizer: Any, vocab: int | None, field: str
) -> Scorer:
    """The reward model, or the ensemble of them, that a reward config names.

    Members that are adapters over one set of weights share it: ``loader`` reads it once.

    Args:
      vocab: tokens of the policy's vocabulary, which a member must share; None if there is none.
      field: the config's dotted name, for errors.

    Raises:
      InputError: a folder that holds no reward model, or one with another vocabulary; an ensemble
        of process reward models and others.
    """
    name = "ensemble" if config.ensemble else "model"
    members = []
    for folder in config.ensemble or (config.model,):
        trained = loader.config_of(folder)
        if not is_reward_model(trained):
            raise InputError(
                f"{field}.{name}={folder}: a run of {trained.algorithm.name}: give the folder "
                "of a reward-model run"
            )
        network = loader.frozen(loader.trained(folder))
        if config.offload:
            network = offloaded(network, loader.mesh, f"{field}.offload")
        theirs = network.model.decoder.vocab
        # Rollouts are judged as tokens: the same numbers must mean the same text.
        if theirs != (vocab or theirs):
            raise InputError(
                f"{field}.{name}={folder}: its vocabulary has {theirs} tokens, the "
                f"policy's {vocab}: train it on the policy's tokenizer"
            )
        kind = trained.algorithm
        process = kind if isinstance(kind, ProcessRewardModelConfig) else None
        members.append(Member(folder, network, process))
        if (members[0].process is None) != (process is None):
            raise InputError(
                f"{field}.{name}={folder}: a run of {kind.name}, and its scores cannot be combined "
                f"with those of {config.ensemble[0]}: process reward models score in "
                "probabilities, the others have a scale of their own: give members of one kind"
            )
    combine = jax.jit(partial(ensemble_score, combine=config.combine, k=config.k))
    return Scorer(tuple(members), tokenizer, loader.mesh, combine)


def packed_scores(
    model: Model, params: Params, token_BT: Array, attention_mask_BT: Array, lora: Params | None
) -> Array:
    """``token_scores``, [B, T], 0 on padding, of packed rows: a piece at a time."""

    def scores(rows: PackedRows) -> Array:
        token_RT, mask_RT, segment_RT, *_ = rows
        return token_scores(model, params, token_RT, mask_RT, lora, segment_RT)

    return in_pieces(scores, token_BT, attention_mask_BT, apart=keeps_apart(model))


def packed_reward(
    model: Model, params: Params, token_BT: Array, attention_mask_BT: Array, lora: Params | None
) -> Array:
    """``reward``, [B], likewise."""
    score_BT = packed_scores(model, params, token_BT, attention_mask_BT, lora)
    return jnp.take_along_axis(score_BT, last_token(attention_mask_BT)[:, None], axis=1)[:, 0]


_reward: Callable[..., Array] = jax.jit(packed_reward, static_argnums=0)
_token_scores: Callable[..., Array] = jax.jit(packed_scores, static_argnums=0)
_aggregate: Callable[..., Array] = jax.jit(aggregate_steps, static_argnums=2)
