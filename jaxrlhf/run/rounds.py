"""How many rounds of sampling make a rollout, and which of their groups are in it: dynamic sampling
(DAPO; arXiv:2503.14476). Of all others it is one round, and all of it."""

from typing import NamedTuple

import jax
import numpy as np

from jaxrlhf.config import DAPOConfig
from jaxrlhf.core.types import Array, Rollout
from jaxrlhf.mesh.sharding import fetch, put_rows
from jaxrlhf.rewards.judge import Judgement, has_signal
from jaxrlhf.run.setup import Run


class Judged(NamedTuple):
    """Responses, and what they are worth."""

    rollout: Rollout
    judgement: Judgement
    baseline_B: Array | None = None
    """What each prompt's greedy response is worth, for algorithms that need it."""
    signal_Q: np.ndarray | None = None
    """bool, whether the rewards of a prompt's samples differ, for dynamic sampling."""


def enough(run: Run, rounds: list[Judged]) -> bool:
    """Whether a rollout can be made of these rounds of sampling.

    One will do, but with dynamic sampling (DAPO; arXiv:2503.14476): there, until data.batch_size
    groups have rewards that differ, or ``rounds`` of them have not been enough.
    """
    settings = run.config.algorithm
    if not rounds:
        return False
    if not isinstance(settings, DAPOConfig):
        return True
    signals = sum(int(part.signal_Q.sum()) for part in rounds if part.signal_Q is not None)
    return signals >= run.config.data.batch_size or len(rounds) >= settings.rounds


def pick_groups(run: Run, rounds: list[Judged]) -> tuple[Judged, dict[str, float]]:
    """The rollout to learn from, out of the rounds of dynamic sampling: the groups with a signal.

    If they are too few, groups without one fill it, and the metric ``groups_kept`` says so.
    """
    if not isinstance(run.config.algorithm, DAPOConfig):
        return rounds[0], {}
    wanted, n = run.config.data.batch_size, run.config.sample.n
    signal_Q = np.concatenate([part.signal_Q for part in rounds if part.signal_Q is not None])
    kept = min(int(signal_Q.sum()), wanted) / wanted
    metrics = {"rounds": float(len(rounds)), "groups_kept": kept}
    most = run.config.algorithm.rounds
    if most == 1:
        return rounds[0], metrics
    # Stable: groups with a signal first, each kind in the order it was sampled.
    picked = np.argsort(~signal_Q, kind="stable")[:wanted]
    row_B = (picked[:, None] * n + np.arange(n)).reshape(-1).astype(np.int32)
    # As many rollouts as there can be, whatever their number: the program is compiled once.
    rollouts = [part.rollout for part in rounds] + [rounds[0].rollout] * (most - len(rounds))
    rollout = run.programs.merge(tuple(rollouts), row_B)
    whole = jax.tree.map(
        lambda *parts: np.concatenate(parts)[row_B], *fetch([part.judgement for part in rounds])
    )
    reward_B, valid_B = put_rows((whole.reward_B, whole.valid_B), run.mesh)
    picked_rows = whole._replace(reward_B=reward_B, valid_B=valid_B)
    return Judged(rollout, picked_rows), metrics


def signal_of(run: Run, judgement: Judgement) -> np.ndarray | None:
    """``has_signal`` where dynamic sampling asks for it: several processes exchange rewards. Of
    rewards that are normalised each, one whose scores differ is enough."""
    settings, n = run.config.algorithm, run.config.sample.n
    if not isinstance(settings, DAPOConfig):
        return None
    if settings.normalise == "sum":
        return has_signal(judgement, n)
    assert run.judge is not None
    weighed = [source.name for source in run.judge.sources if source.weight]
    parts = [judgement._replace(reward_B=judgement.parts[name]) for name in weighed]
    return np.any([has_signal(part, n) for part in parts], axis=0)
