"""The sources of reward that a config lists, ready to be asked."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.config import GateConfig, LengthConfig, RewardConfig, kind_of, name_of, reward_problems
from jaxrlhf.errors import InputError
from jaxrlhf.rewards import local, service, verifiers
from jaxrlhf.rewards.asked import Source
from jaxrlhf.rewards.isolation import Isolated


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
    """The sources of reward that a config names, in its order.

    Raises:
      InputError: none at all, one whose fields do not go together, or one that cannot be had.
    """
    if not configs:
        raise InputError(f"{field}: none given; add one, such as [{{function: sentiment}}]")
    for problem in reward_problems(field, configs):
        raise InputError(problem)
    names = [name_of(config) for config in configs]
    rewards = []
    for index, config in enumerate(configs):
        again = names[:index].count(names[index])
        name = f"{names[index]}#{again + 1}" if again else names[index]
        try:
            ask = _source(config)
        except InputError as error:
            raise InputError(f"{field}.{index}: {error}") from error
        truth = answer = None
        if config.verifier:
            verifier = verifiers.make(config.verifier, config.answer, config.pattern)
            truth, answer = verifier.truth, verifier.answer
        rewards.append(Reward(name, config.weight, config.gate, ask, config.length, truth, answer))
    return tuple(rewards)


def check_truths(rewards: Sequence[Reward], rows: Sequence[Any]) -> None:
    """Refuse rows that a verifier could not judge, before a run.

    Args:
      rows: Prompts, of which the columns and the place are read.

    Raises:
      InputError: a row without a usable truth; the message names its place.
    """
    for reward in rewards:
        for row in rows if reward.truth else ():
            try:
                reward.truth(row.columns)  # type: ignore[misc]
            except ValueError as error:
                raise InputError(
                    f"{row.where}: verifier {reward.name}: {error}: mend or drop the row"
                ) from error


def _source(config: RewardConfig) -> Source | None:
    if config.service is not None:
        return service.make(config.service)
    if kind_of(config) not in ("function", "verifier"):
        return None
    return Isolated(config) if config.isolate else local.make(config)
