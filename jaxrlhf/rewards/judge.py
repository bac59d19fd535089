"""A run's rewards: the sources that a config lists, asked, and their scores summed behind gates.

Reward models are asked on the mesh, all else on the host. A row without a reward is NaN, never 0. A
source that does not apply to a row leaves its reward to the others; one that fails leaves it none.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import GateConfig, LengthConfig, RewardConfig, name_of, reward_problems
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import Array, Rollout
from jaxrlhf.data.formats import Prompt, stack_columns
from jaxrlhf.data.text import decode_rollout, repeat
from jaxrlhf.mesh.processes import all_or_none, assemble, own_share
from jaxrlhf.mesh.sharding import fetch, put_rows, row_layout
from jaxrlhf.mesh.signals import listening
from jaxrlhf.models.load import Loader
from jaxrlhf.rewards import service, verifiers
from jaxrlhf.rewards.functions import Asked, FunctionError, Scored, Source
from jaxrlhf.rewards.isolation import host_source
from jaxrlhf.rewards.models import Scorer, load_scorer
from jaxrlhf.rewards.signature import RENAME, Signature, missing


@dataclass(frozen=True)
class Reward:
    """One source of a run's reward."""

    name: str
    """The function's, verifier's or service's as configured, or the path of the model; numbered
    where several have the same."""
    weight: float
    gate: GateConfig | None
    """What makes it a gate; None where it is part of the sum."""
    ask: Source | None
    """None where the source is computed from the rollout's arrays: a reward model or a length."""
    length: LengthConfig | None = None
    truth: Callable[[Mapping[str, Any]], Any] | None = None
    """Raises ValueError for a row (its columns) that a verifier could not judge."""
    answer: Callable[[str], Hashable | None] | None = None
    """A verifier's: completion → what it answers."""
    special: bool = False
    """Whether the completions that it is given have their special tokens."""
    needs: tuple[str, ...] = ()
    """The columns of the data without which a function cannot be called."""
    ids: bool = False
    """Whether a function asks for token ids."""


def keeps_special_tokens(config: RewardConfig) -> bool:
    """Whether the completions that a source is given still have their special tokens."""
    return bool(config.verifier) if config.special_tokens is None else config.special_tokens


def load_rewards(configs: Sequence[RewardConfig], field: str = "rewards") -> tuple[Reward, ...]:
    """The sources of reward that a config names, in its order; an InputError if one cannot be had,
    or there is none."""
    if not configs:
        raise InputError(f"{field}: none given; add one, such as [{{function: sentiment}}]")
    for problem in reward_problems(field, configs):
        raise InputError(problem)
    names = [name_of(config) for config in configs]
    rewards = []
    for index, config in enumerate(configs):
        again = names[:index].count(names[index])
        name = f"{names[index]}#{again + 1}" if again else names[index]
        ask = truth = answer = None
        try:
            if config.service is not None:
                ask = service.make(config.service)
            elif config.function or config.verifier:
                ask = host_source(config)
        except InputError as error:
            raise InputError(f"{field}.{index}: {error}") from error
        # Truths are read in this process even where answers are judged in others: before a run.
        if config.verifier:
            verifier = verifiers.make(config.verifier, config.answer, config.pattern)
            truth, answer = verifier.truth, verifier.answer
        special = keeps_special_tokens(config)
        needs, ids = getattr(ask, "needs", ()), getattr(ask, "ids", False)
        given = (config.weight, config.gate, ask, config.length, truth, answer, special)
        rewards.append(Reward(name, *given, needs, ids))
    return tuple(rewards)


def check_columns(rewards: Sequence[Reward], there: Sequence[str]) -> None:
    """Refuse a function that asks for a column which is not among those of the data.

    Raises:
      InputError: it names the argument, and lists what there is.
    """
    for reward in rewards:
        if lacking := missing(Signature(needs=reward.needs), there):
            raise FunctionError(reward.name, lacking, RENAME)


def check_truths(rewards: Sequence[Reward], rows: Sequence[Any]) -> None:
    """Refuse Prompts that a verifier could not judge: an InputError that names the place."""
    for reward in rewards:
        for row in rows if reward.truth else ():
            try:
                reward.truth(row.columns)  # type: ignore[misc]
            except ValueError as error:
                raise InputError(
                    f"{row.where}: verifier {reward.name}: {error}: mend or drop the row"
                ) from error


def combine(
    scores: Sequence[np.ndarray],
    weights: Sequence[float],
    gates: Sequence[GateConfig | None] | None = None,
    applies: Sequence[np.ndarray | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """reward_b = Σ_i weight_i · score_ib over the sources that are no gates and apply to row b,
    where all gates open.

    Gates are asked in their order, and passed over where they do not apply. The first whose score
    is missing leaves the row without a reward; the first whose score is below ``at_least`` gives it
    ``otherwise``, whatever the other sources say. A row that passes all of them needs every score
    of the sum that applies to it, and at least one.

    Args:
      scores: arrays [B] of any numeric type, in reward units; NaN where a score is missing.
      weights: one for each of them; those of gates are not read.
      gates: what makes each of them a gate, None where it is part of the sum.
      applies: bool [B] for each of them, False where its score is not read; None: everywhere.

    Returns:
      reward_B float32, NaN on rows without a reward; valid_B bool, False on those rows.

    Raises:
      InputError: no scores at all.
      ValueError: lengths that differ.
    """
    if not scores:
        raise InputError("rewards: none given; add one, such as [{function: sentiment}]")
    parts = [np.asarray(score_B, np.float64) for score_B in scores]
    gates = gates or [None] * len(parts)
    applies = applies or [None] * len(parts)
    lengths = {len(parts), len(weights), len(gates), len(applies)}
    if len(lengths) > 1 or any(p.ndim != 1 or p.shape != parts[0].shape for p in parts):
        shapes = [p.shape for p in parts]
        raise ValueError(f"scores of shapes {shapes} with {len(weights)} weights do not combine")
    # A sum beyond float32 becomes infinite, and so no reward, without a warning.
    with np.errstate(over="ignore", invalid="ignore"):
        reward_B = fold(parts, weights, gates, np, applies).astype(np.float32)
    valid_B = np.isfinite(reward_B)
    return np.where(valid_B, reward_B, np.float32(np.nan)), valid_B


def fold(
    scores: Sequence[Any],
    weights: Sequence[float],
    gates: Sequence[GateConfig | None],
    xp: Any,
    applies: Sequence[Any] | None = None,
) -> Any:
    """The gated sum of ``combine``, of numpy's or jax's arrays; ``xp`` is the one or the other."""
    applies = applies or [None] * len(scores)
    sources = list(zip(scores, weights, gates, applies, strict=True))
    summed = [(w * score_B, at_B) for score_B, w, gate, at_B in sources if gate is None]
    # where, not a product: a score that does not apply is NaN.
    read = [x_B if at_B is None else xp.where(at_B, x_B, 0) for x_B, at_B in summed]
    reward_B = xp.stack(read).sum(0)
    if all(at_B is not None for _, at_B in summed):
        reward_B = xp.where(xp.stack([at_B for _, at_B in summed]).any(0), reward_B, xp.nan)
    # From the last gate to the first: what is written last, the first gate's word, stands.
    for score_B, _, gate, at_B in reversed(sources):
        if gate is not None:
            gated_B = xp.where(score_B >= gate.at_least, reward_B, gate.otherwise)
            gated_B = xp.where(xp.isfinite(score_B), gated_B, xp.nan)
            reward_B = gated_B if at_B is None else xp.where(at_B, gated_B, reward_B)
    return reward_B


class Judgement(NamedTuple):
    """What a rollout is worth. Rows without a reward are NaN and not valid."""

    reward_B: Array
    valid_B: Array
    parts: dict[str, Array | np.ndarray]
    """The unweighted scores [B] of each source, by name."""
    applies: dict[str, np.ndarray] | None = None
    """bool [B], False where a source does not apply, of those on the host; the others always do."""


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
    columns: tuple[str, ...] = ()
    """Columns of the data, which are given also where no row of a batch has them."""

    def __call__(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Judgement:
        """Score the Q·G rows of Q prompts; on the devices alone where no source is on the host.

        Raises:
          InputError: more than ``max_excluded`` of the rows have no reward.
        """
        asked: dict[bool, Asked] = {}
        parts: dict[str, Any] = {}
        applies: dict[str, np.ndarray] = {}
        problems: dict[str, str] = {}
        for source, scorer in zip(self.sources, self.scorers, strict=True):
            if scorer is not None:
                parts[source.name] = scorer(rollout)
            elif source.length is not None:
                start, end = source.length.start, source.length.end
                parts[source.name] = _length(rollout.mask_BT, start, end)
            else:
                assert source.ask is not None
                # Decoded once in each way, and not at all where no source reads text.
                if source.special not in asked:
                    asked[source.special] = self._asked(rollout, prompts, source.special)
                scored = ask_together(source.ask, asked[source.special], len(prompts))
                parts[source.name], problems[source.name] = scored.score_B, scored.problem
                applies[source.name] = scored.applies()
        judgement = Judgement(*self._combined(parts, applies), parts, applies)
        if self.max_excluded < 1:
            self._refuse_too_few(judgement, problems)
        return judgement

    def _combined(
        self, parts: Mapping[str, Any], applies: Mapping[str, np.ndarray]
    ) -> tuple[Array, Array]:
        scores = list(parts.values())
        weights = [source.weight for source in self.sources]
        gates = [source.gate for source in self.sources]
        # Summed on the host, in float64, as soon as one source is there.
        if applies:
            where = [applies.get(name) for name in parts]
            return put_rows(combine(fetch(scores), weights, gates, where), self.mesh)
        reward_B = fold(scores, weights, gates, jnp)
        known_B = jnp.isfinite(reward_B)
        return jnp.where(known_B, reward_B, jnp.nan), known_B

    def scores(self, judgement: Judgement) -> tuple[Array, np.ndarray]:
        """The unweighted scores of all sources, [B, S] float32, NaN where one does not apply or
        failed, and their weights [S]: rows as they lie on the devices."""
        parts = list(judgement.parts.values())
        weight_S = np.array([source.weight for source in self.sources], np.float32)
        if all(isinstance(x, jax.Array) for x in parts):
            return jax.jit(_columns, out_shardings=row_layout(self.mesh))(parts), weight_S
        with np.errstate(over="ignore"):  # beyond float32: infinite, and so not known
            score_BS = np.stack(fetch(parts), axis=1).astype(np.float32)
        return put_rows(score_BS, self.mesh), weight_S

    def _refuse_too_few(self, judgement: Judgement, problems: Mapping[str, str]) -> None:
        valid_B, parts = fetch((judgement.valid_B, judgement.parts))
        lost, rows = int((~valid_B).sum()), len(valid_B)
        if lost <= self.max_excluded * rows:
            return
        said = []
        nothing_B = ~valid_B
        for source, (name, score_B) in zip(self.sources, parts.items(), strict=True):
            at_B = _at(judgement, name)
            nothing_B &= ~at_B | (source.gate is not None)
            if without := int((at_B & ~np.isfinite(score_B)).sum()):
                why = f", the last because: {problems[name]}" if problems.get(name) else ""
                said.append(f"{name} has none for {without}{why}")
        if nothing_B.any():
            said.append(f"to {nothing_B.sum()} no source of the sum applies")
        raise InputError(
            f"rewards: {lost} of {rows} completions got none, and max_excluded="
            f"{self.max_excluded:g} of them may: {'; '.join(said) or 'their sum overflows'}: mend "
            "the source, or raise max_excluded"
        )

    def _asked(self, rollout: Rollout, prompts: Sequence[Prompt], special: bool) -> Asked:
        """The rollout as text, with the other columns of its prompts."""
        token_BT, mask_BT, ended_B = fetch((rollout.token_BT, rollout.mask_BT, rollout.ended_B))
        n = len(token_BT) // len(prompts)
        texts = repeat([prompt.text for prompt in prompts], n)
        ended = ended_B if special else None
        completions = decode_rollout(self.tokenizer, token_BT, mask_BT, texts, ended)
        blank: dict[str, list[Any]] = {name: [None] * len(prompts) for name in self.columns}
        columns = {name: repeat(x, n) for name, x in (blank | stack_columns(prompts)).items()}
        ids = None
        if any(source.ids for source in self.sources):
            ids = [row[kept != 0].tolist() for row, kept in zip(token_BT, mask_BT, strict=True)]
        return Asked(texts, completions, columns, ended_B.tolist(), chats_of(prompts, n), ids)


def chats_of(prompts: Sequence[Prompt], n: int) -> list[Any]:
    """The messages of the prompts, each ``n`` times, for ``Asked``; empty where all are text."""
    if all(prompt.messages is None for prompt in prompts):
        return []
    return repeat([prompt.messages for prompt in prompts], n)


def _columns(parts: list[Array]) -> Array:
    return jnp.stack([x.astype(jnp.float32) for x in parts], axis=1)


def make_judge(
    configs: Sequence[RewardConfig],
    loader: Loader,
    tokenizer: Any,
    vocab: int,
    field: str,
    max_excluded: float = 1.0,
    sources: tuple[Reward, ...] | None = None,
    columns: Sequence[str] = (),
) -> Judge:
    """The judge that a list of reward configs describes; an InputError where one cannot be had.

    Args:
      sources: ``load_rewards(configs, field)``, where that is done.
      columns: those of the data.
    """
    sources = sources or load_rewards(configs, field)
    scorers = [
        load_scorer(config, loader, tokenizer, vocab, f"{field}[{index}]")
        if config.model or config.ensemble
        else None
        for index, config in enumerate(configs)
    ]
    return Judge(sources, tuple(scorers), tokenizer, loader.mesh, max_excluded, tuple(columns))


def ask_together(source: Source, asked: Asked, prompts: int) -> Scored:
    """What a source on the host says of all rows, each asked about by one process alone.

    A process asks about a stretch of the prompts, all completions of a prompt together. Why a row
    has no score is known to the process that has asked. A signal ends the wait, on all of them.

    Args:
      asked: all rows, the same on every process.
      prompts: how many prompts they belong to; the rows of one lie together.
    """
    share, each = own_share(prompts), len(asked) // prompts
    rows = slice(share.start * each, share.stop * each)
    own = asked.rows(rows)

    def ask() -> Scored:
        # With fewer prompts than processes, one of them may have nothing to ask about.
        if not len(own):
            return Scored(np.zeros(0))
        with listening():
            return source(own)

    scored = all_or_none(ask)
    score_B = assemble(scored.score_B, rows, len(asked))
    applies_B = assemble(scored.applies().astype(np.float64), rows, len(asked)) != 0
    return Scored(score_B, scored.problem, applies_B)


def measures(judgement: Judgement) -> dict[str, float]:
    """What a run logs of a judgement.

    ``reward/excluded``, the share of the rows without a reward, and of each source:
    ``applies/NAME``, the share of the rows that it applies to; ``excluded/NAME``, the share of
    *those* that it gave no score (0 if it applies to none); ``reward/NAME``, the mean score,
    unweighted, of the rows that have one (NaN if none has).
    """
    valid_B, parts = fetch((judgement.valid_B, judgement.parts))
    metrics = {"reward/excluded": 1 - float(np.mean(valid_B))}
    for name, score_B in parts.items():
        score_B, at_B = np.asarray(score_B, np.float64), _at(judgement, name)
        known_B = at_B & np.isfinite(score_B)
        count = max(int(at_B.sum()), 1)
        metrics[f"reward/{name}"] = float(score_B[known_B].mean()) if known_B.any() else math.nan
        metrics[f"applies/{name}"] = float(at_B.mean())
        metrics[f"excluded/{name}"] = float((at_B & ~known_B).sum()) / count
    return metrics


def _at(judgement: Judgement, name: str) -> np.ndarray:
    """bool [B], the rows that a source applies to."""
    everywhere_B = np.ones(len(judgement.valid_B), bool)
    return (judgement.applies or {}).get(name, everywhere_B)


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


def has_signal(judgement: Judgement, group: int) -> np.ndarray:
    """bool [Q]: at least two known rewards of the group differ."""
    reward_QG, known_QG = (
        x_B.reshape(-1, group) for x_B in fetch((judgement.reward_B, judgement.valid_B))
    )
    # An unknown reward says nothing either way.
    known_QG = known_QG & np.isfinite(reward_QG)
    highest_Q = np.where(known_QG, reward_QG, -np.inf).max(1)
    lowest_Q = np.where(known_QG, reward_QG, np.inf).min(1)
    return highest_Q > lowest_Q
