"""From prompts to a judged rollout: one round of sampling, or as many as a signal takes."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.config import DAPOConfig, on_policy
from jaxrlhf.data.batches import order
from jaxrlhf.data.formats import Prompt
from jaxrlhf.data.tokens import prompt_arrays
from jaxrlhf.errors import InputError
from jaxrlhf.judging import Judgement
from jaxrlhf.processes import fetch
from jaxrlhf.session import Session
from jaxrlhf.setup import Run
from jaxrlhf.sharding import put_rows
from jaxrlhf.types import Array, Rollout


class Collected(NamedTuple):
    """A rollout and what it is worth."""

    rollout: Rollout
    judgement: Judgement
    baseline_B: Array | None
    """What each prompt's greedy response is worth, for algorithms that need it."""
    metrics: dict[str, float]


def collect(run: Run, session: Session, step: int) -> Collected:
    """The rollout that iteration ``step`` learns from.

    With dynamic sampling (DAPO; arXiv:2503.14476) prompts are drawn in rounds, each with the next
    slice of the data, until data.batch_size groups have rewards that differ; if ``rounds`` of them
    are not enough, groups without a signal fill the rollout, and ``groups_kept`` says so.
    """
    settings = on_policy(run.config)
    if not isinstance(settings, DAPOConfig):
        return one_round(run, session, step)
    wanted, group = run.config.data.batch_size, run.config.sample.n
    parts: list[Collected] = []
    signal: list[bool] = []
    while sum(signal) < wanted and len(parts) < settings.rounds:
        draw = session.host.get("draws", 0)
        parts.append(one_round(run, session, draw))
        session.host["draws"] = draw + 1
        signal += has_signal(parts[-1].judgement, group).tolist()
    picked = np.argsort(~np.array(signal), kind="stable")[:wanted]  # groups with a signal first
    row_B = (picked[:, None] * group + np.arange(group)).reshape(-1).astype(np.int32)
    metrics = {"rounds": float(len(parts)), "groups_kept": min(sum(signal), wanted) / wanted}
    if len(parts) == 1:
        return parts[0]._replace(metrics=metrics)
    rollout = run.programs["merge"](tuple(part.rollout for part in parts), row_B)
    return Collected(rollout, _merge(parts, row_B, run.mesh), None, metrics)


def one_round(run: Run, session: Session, draw: int) -> Collected:
    """Sample the prompts of one slice of the data, and judge the responses.

    Args:
      draw: which slice, and which stream of draws.

    Raises:
      InputError: not one completion got a reward.
    """
    config, programs = run.config, run.programs
    policy, base = session.states["policy"].params, run.frozen["policy"]
    key = jax.random.fold_in(jax.random.key(config.seed), draw)
    rows = [
        run.train_rows.items[i]
        for i in order(len(run.train_rows), config.data.batch_size, config.seed, draw)
    ]
    prompts: list[Prompt] = [row.source for row in rows]  # type: ignore[misc]
    arrays = prompt_arrays(rows, config.data.max_prompt_tokens, config.sample.pad)
    given = (policy, base, *put_rows(arrays, run.mesh), key)
    rollout = programs["sample"](*given)
    session.lap("sample", rollout)
    assert run.judge is not None
    judgement = run.judge(rollout, prompts)
    if not bool(judgement.valid_B.any()):
        raise InputError(f"rewards: draw {draw + 1} got no usable reward for any completion")
    baseline_B = None
    if "greedy" in run.algorithm.needs:
        greedy = programs["greedy"](*given)
        reward_Q = fetch(run.judge(greedy, prompts).reward_B)
        if not np.isfinite(reward_Q).any():
            raise InputError(f"rewards: draw {draw + 1} got none for any greedy response")
        baseline_B = programs["baseline"](greedy, put_rows(reward_Q, run.mesh))
    session.lap("reward", judgement.reward_B)
    return Collected(rollout, judgement, baseline_B, {})


def has_signal(judgement: Judgement, group: int) -> np.ndarray:
    """bool [Q]: at least two known rewards of the group differ."""
    reward_QG, known_QG = (
        x_B.reshape(-1, group) for x_B in fetch((judgement.reward_B, judgement.valid_B))
    )
    highest_Q = np.where(known_QG, reward_QG, -np.inf).max(1)
    lowest_Q = np.where(known_QG, reward_QG, np.inf).min(1)
    return highest_Q > lowest_Q


def _merge(parts: list[Collected], row_B: np.ndarray, mesh: Any) -> Judgement:
    """Rows out of several judgements, on the mesh."""

    def take(*arrays: Any) -> np.ndarray:
        return np.concatenate(fetch(arrays))[row_B]

    judgements = [part.judgement for part in parts]
    reward_B, valid_B = put_rows(
        (take(*(j.reward_B for j in judgements)), take(*(j.valid_B for j in judgements))), mesh
    )
    names = judgements[0].parts
    return Judgement(
        reward_B, valid_B, {name: take(*(j.parts[name] for j in judgements)) for name in names}
    )
