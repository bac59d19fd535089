"""A run's rewards: reward models on the mesh, all else on the host, summed behind their gates."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import RewardConfig
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, Rollout
from jaxrlhf.data.formats import Prompt, stack_columns
from jaxrlhf.data.text import decode_rollout, repeat
from jaxrlhf.mesh.processes import assemble, own_share
from jaxrlhf.mesh.sharding import fetch, put_rows
from jaxrlhf.models.load import Loader
from jaxrlhf.rewards.combine import Reward, combine, fold, load_rewards
from jaxrlhf.rewards.functions import Asked, Scored, Source
from jaxrlhf.rewards.models import Scorer, load_scorer


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
    max_excluded: float = 1.0
    """Share of the rows that may go without a reward."""

    def __call__(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Judgement:
        """Score the Q·G rows of Q prompts; on the devices alone where no source is on the host.

        Raises:
          InputError: more than ``max_excluded`` of the rows have no reward.
        """
        asked = None
        parts: dict[str, Any] = {}
        problems: dict[str, str] = {}
        for source, scorer in zip(self.sources, self.scorers, strict=True):
            if scorer is not None:
                parts[source.name] = scorer(rollout)
            elif source.length is not None:
                start, end = source.length.start, source.length.end
                parts[source.name] = _length(rollout.mask_BT, start, end)
            else:
                assert source.ask is not None
                # Decoded once, and not at all where no source reads text.
                asked = asked or self._asked(rollout, prompts)
                parts[source.name], problems[source.name] = ask_together(
                    source.ask, asked, len(prompts)
                )
        judgement = Judgement(*self._combined(list(parts.values())), parts)
        if self.max_excluded < 1:
            self._refuse_too_few(judgement, problems)
        return judgement

    def _combined(self, scores: Sequence[Any]) -> tuple[Array, Array]:
        weights = [source.weight for source in self.sources]
        gates = [source.gate for source in self.sources]
        # Summed on the host, in float64, as soon as one source is there.
        if not all(isinstance(x, jax.Array) for x in scores):
            return put_rows(combine(fetch(scores), weights, gates), self.mesh)
        reward_B = fold(scores, weights, gates, jnp)
        known_B = jnp.isfinite(reward_B)
        return jnp.where(known_B, reward_B, jnp.nan), known_B

    def _refuse_too_few(self, judgement: Judgement, problems: Mapping[str, str]) -> None:
        valid_B, parts = fetch((judgement.valid_B, judgement.parts))
        lost, rows = int((~valid_B).sum()), len(valid_B)
        if lost <= self.max_excluded * rows:
            return
        said = []
        for name, score_B in parts.items():
            if without := int((~np.isfinite(score_B)).sum()):
                why = f", the last because: {problems[name]}" if problems.get(name) else ""
                said.append(f"{name} has none for {without}{why}")
        raise InputError(
            f"rewards: {lost} of {rows} completions got none, and max_excluded="
            f"{self.max_excluded:g} of them may: {'; '.join(said) or 'their sum overflows'}: mend "
            "the source, or raise max_excluded"
        )

    def _asked(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Asked:
        """The rollout as text, with the other columns of its prompts."""
        token_BT, mask_BT, ended_B = fetch((rollout.token_BT, rollout.mask_BT, rollout.ended_B))
        n = len(token_BT) // len(prompts)
        texts = repeat([prompt.text for prompt in prompts], n)
        completions = decode_rollout(self.tokenizer, token_BT, mask_BT, texts)
        columns = {name: repeat(x, n) for name, x in stack_columns(prompts).items()}
        return Asked(texts, completions, columns, ended_B.tolist())


def make_judge(
    configs: Sequence[RewardConfig],
    loader: Loader,
    tokenizer: Any,
    vocab: int,
    field: str,
    max_excluded: float = 1.0,
    sources: tuple[Reward, ...] | None = None,
) -> Judge:
    """The judge that a list of reward configs describes; an InputError where one cannot be had.

    Args:
      sources: ``load_rewards(configs, field)``, where that is done.
    """
    sources = sources or load_rewards(configs, field)
    scorers = [
        load_scorer(config, loader, tokenizer, vocab, f"{field}[{index}]")
        if config.model or config.ensemble
        else None
        for index, config in enumerate(configs)
    ]
    return Judge(sources, tuple(scorers), tokenizer, loader.mesh, max_excluded)


def ask_together(source: Source, asked: Asked, prompts: int) -> Scored:
    """What a source on the host says of all rows, each asked about by one process alone.

    A process asks about a stretch of the prompts, all completions of a prompt together. Why a row
    has no score is known to the process that has asked.

    Args:
      asked: all rows, the same on every process.
      prompts: how many prompts they belong to; the rows of one lie together.
    """
    share, each = own_share(prompts), len(asked) // prompts
    rows = slice(share.start * each, share.stop * each)
    own = asked.rows(rows)
    # With fewer prompts than processes, one of them may have nothing to ask about.
    score_R, problem = source(own) if len(own) else Scored(np.zeros(0))
    return Scored(assemble(score_R, rows, len(asked)), problem)


def measures(judgement: Judgement) -> dict[str, float]:
    """What a run logs of a judgement.

    ``reward/NAME``, the mean score of each source, unweighted, over the rows that have it (NaN if
    none has), and ``excluded/NAME``, the share of the rows that do not; ``reward/excluded``, the
    share of the rows without a reward.
    """
    valid_B, parts = fetch((judgement.valid_B, judgement.parts))
    metrics = {"reward/excluded": 1 - float(np.mean(valid_B))}
    for name, score_B in parts.items():
        score_B = np.asarray(score_B, np.float64)
        known_B = np.isfinite(score_B)
        metrics[f"reward/{name}"] = float(score_B[known_B].mean()) if known_B.any() else math.nan
        metrics[f"excluded/{name}"] = 1 - float(known_B.mean())
    return metrics


def length_penalty(mask_BT: Array, start: int, end: int) -> Array:
    """−clip((n − start)/(end − start), 0, 1) of responses of n tokens.

    0 up to ``start`` tokens, falling linearly to −1 at ``end``; that of DAPO (arXiv:2503.14476,
    equation 13) has ``end`` at the longest response that can be sampled.

    Args:
      mask_BT: [B, T], 1 on the response's tokens, stop token included.
      start, end: tokens, start < end.

    Returns:
      float32 [B], from −1 to 0, reward units.
    """
    chex.assert_rank(mask_BT, 2)
    count_B = (mask_BT != 0).sum(1).astype(jnp.float32)
    return -jnp.clip((count_B - start) / (end - start), 0, 1)


_length: Callable[..., Array] = jax.jit(length_penalty, static_argnums=(1, 2))
