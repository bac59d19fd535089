"""The sources of reward that a config lists, and their scores summed behind gates."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.config import GateConfig, LengthConfig, RewardConfig, name_of, reward_problems
from jaxrlhf.core.errors import InputError
from jaxrlhf.rewards import service, verifiers
from jaxrlhf.rewards.functions import Source
from jaxrlhf.rewards.isolation import host_source


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
        rewards.append(Reward(name, config.weight, config.gate, ask, config.length, truth, answer))
    return tuple(rewards)


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
) -> tuple[np.ndarray, np.ndarray]:
    """reward_b = Σ_i weight_i · score_ib over the sources that are no gates, where all gates open.

    Gates are asked in their order. The first whose score is missing leaves the row without a
    reward; the first whose score is below ``at_least`` gives it ``otherwise``, whatever the other
    sources say. A row that passes all of them needs every score of the sum.

    Args:
      scores: arrays [B] of any numeric type, in reward units; NaN where a score is missing.
      weights: one for each of them; those of gates are not read.
      gates: what makes each of them a gate, None where it is part of the sum.

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
    lengths = {len(parts), len(weights), len(gates)}
    if len(lengths) > 1 or any(p.ndim != 1 or p.shape != parts[0].shape for p in parts):
        shapes = [p.shape for p in parts]
        raise ValueError(f"scores of shapes {shapes} with {len(weights)} weights do not combine")
    # A sum beyond float32 becomes infinite, and so no reward, without a warning.
    with np.errstate(over="ignore", invalid="ignore"):
        reward_B = fold(parts, weights, gates, np).astype(np.float32)
    valid_B = np.isfinite(reward_B)
    return np.where(valid_B, reward_B, np.float32(np.nan)), valid_B


def fold(
    scores: Sequence[Any],
    weights: Sequence[float],
    gates: Sequence[GateConfig | None],
    xp: Any,
) -> Any:
    """The gated sum of ``combine``, of numpy's or jax's arrays; ``xp`` is the one or the other."""
    sources = list(zip(scores, weights, gates, strict=True))
    reward_B = xp.stack([w * score_B for score_B, w, gate in sources if gate is None]).sum(0)
    # From the last gate to the first: what is written last, the first gate's word, stands.
    for score_B, _, gate in reversed(sources):
        if gate is not None:
            reward_B = xp.where(score_B >= gate.at_least, reward_B, gate.otherwise)
            reward_B = xp.where(xp.isfinite(score_B), reward_B, xp.nan)
    return reward_B
