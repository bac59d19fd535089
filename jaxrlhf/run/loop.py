"""From prompts to a judged rollout: one round of sampling, or as many as a signal takes.

The two loops: learning from what the policy samples, and learning from rows.

Each iteration is a handful of pure jitted functions over TrainStates (``run.programs``); what is
left here is their order, and the host's chores.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.algorithms import KL_CONTROLLERS
from jaxrlhf.config import Config, DAPOConfig, is_on_policy, on_policy
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.types import AnyBatch, Array, Params, Rollout
from jaxrlhf.data.batches import order
from jaxrlhf.data.formats import Prompt
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.tokens import prompt_arrays
from jaxrlhf.mesh.processes import fetch, pace
from jaxrlhf.mesh.sharding import at_hand, make_mesh, put_rows
from jaxrlhf.mesh.watchdog import guarded
from jaxrlhf.rewards.judge import Judgement, measures
from jaxrlhf.run.ahead import compiled_ahead
from jaxrlhf.run.feed import batches, example, packing_metrics
from jaxrlhf.run.held_out import Evaluation, evaluate, measure_normalisation, over_prompts
from jaxrlhf.run.programs import minibatch_rows
from jaxrlhf.run.record import combine, known
from jaxrlhf.run.session import Session, lock
from jaxrlhf.run.setup import Run, fill, place, setup, start_of
from jaxrlhf.run.stopping import compare, exchange, has_ended, is_over
from jaxrlhf.steps.iteration import States, cut, prepare, update_on


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


SHOWN = 4
"""Completions of each iteration that go to samples.jsonl."""


def train(
    config: Config, mesh: Mesh | None = None, feed: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Carry out a run, or go on with it, and return its summary.

    Args:
      config: the run.
      mesh: where to, if not on all devices as ``config.mesh`` says.
      feed: called after every phase of an iteration, as a sign that the run goes on.

    Raises:
      InputError: config, data, weights or output folder cannot be used.
      FloatingPointError: too many updates in a row had a gradient that is not finite.
    """
    began = time.perf_counter()
    mesh = mesh or make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = setup(config, mesh, abstract=True)
        with compiled_ahead(run):
            run = fill(run)
            with lock(config.output), Session(run, began, feed) as session, guarded():
                session.lap("setup")
                if summary := session.finished():
                    return summary
                session.example(example(run))
                learn = learn_on_policy if is_on_policy(config) else learn_from_rows
                learn(run, session)
                return summarise(run, session)


def learn_on_policy(run: Run, session: Session) -> None:
    """Sample, judge, compare with the reference, estimate values, learn; and again."""
    algorithm = on_policy(run.config)
    controller = KL_CONTROLLERS[algorithm.kl_controller]
    if algorithm.kl_controller == "fixed":
        session.host["kl_coef"] = algorithm.kl_coef
    session.host.setdefault("kl_coef", algorithm.kl_coef)
    for step in session.steps():
        began = time.perf_counter()
        session.states, metrics, rollout, judgement = iterate(run, session, step)
        metrics = known(jax.device_get(metrics))
        rows = int(rollout.token_BT.shape[0])
        session.host["kl_coef"] = controller(
            session.host["kl_coef"],
            float(metrics["kl"]),
            algorithm.kl_target,
            rows,
            algorithm.kl_horizon,
        )
        seconds = time.perf_counter() - began
        tokens = float(metrics["length"]) * rows
        metrics |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
        session.host["tokens"] = session.host.get("tokens", 0.0) + tokens
        session.record(step + 1, metrics, shown(run, rollout, judgement))
        evaluate_before(run, session, partial(start_of, run))  # not first: a step is seen at once
        evaluate_between(run, session, step + 1)


def iterate(
    run: Run, session: Session, step: int
) -> tuple[States, dict[str, Any], Rollout, Judgement]:
    """One iteration of policy learning: from prompts to the next states."""
    programs, states, settings = run.programs, session.states, on_policy(run.config)
    rollout, judgement, baseline_B, metrics = collect(run, session, step)
    assert run.reference is not None
    if settings.old_logp == "rescore":
        rows = (rollout.token_BT, rollout.attention_mask_BT)
        logp_BT = programs["rescore"](states["policy"].params, run.frozen["policy"], *rows)
        rollout = replace(rollout, logp_BT=logp_BT * rollout.mask_BT)
    coefficients = {"kl_coef": np.float32(session.host["kl_coef"])}
    batch, measured = prepare(
        programs,
        run.algorithm.needs,
        states,
        run.frozen,
        at_hand(run.reference.params),
        rollout,
        (judgement.reward_B, judgement.valid_B),
        coefficients,
        baseline_B,
    )
    session.lap("score", batch)

    states, learnt = learn(run, states, batch, step)
    session.lap("update", learnt)
    judged = measures(judgement)
    return states, {**metrics, **measured, **judged, **learnt, **coefficients}, rollout, judgement


def learn(run: Run, states: States, batch: AnyBatch, step: int) -> tuple[States, dict[str, Any]]:
    """epochs × minibatches updates on one rollout; stops early once KL(old‖new) is too large."""
    programs, settings = run.programs, on_policy(run.config)
    seen = []
    warming = step < run.config.critic.warmup
    rows = jax.tree.leaves(batch)[0].shape[0]
    for epoch in range(settings.epochs):
        for row_M in minibatch_rows(run.config, rows, step, epoch):
            part = cut(programs, batch, row_M)
            states, metrics = update_on(programs, states, run.frozen, part, warming)
            seen.append(pace(metrics))
            if settings.target_kl and _apart(metrics) > settings.target_kl:
                return states, combine(jax.device_get(seen)) | {"updates": len(seen)}
    return states, combine(jax.device_get(seen)) | {"updates": len(seen)}


def _apart(metrics: dict[str, Any]) -> float:
    """KL(old‖new), nats a token, of an update's metrics; 0 while only the critic learns."""
    return float(metrics["approx_kl"] / metrics["weight"]) if "approx_kl" in metrics else 0.0


def shown(run: Run, rollout: Rollout, judgement: Judgement) -> list[dict[str, Any]]:
    """A few completions of an iteration, with their rewards."""
    rows = (rollout.token_BT, rollout.attention_mask_BT, rollout.mask_BT, judgement.reward_B)
    token_BT, attention_BT, mask_BT, reward_B = (x[:SHOWN] for x in fetch(rows))
    blank = [""] * len(token_BT)
    prompts = decode_rollout(run.tokenizer, token_BT, attention_BT * (mask_BT == 0), blank)
    completions = decode_rollout(run.tokenizer, token_BT, mask_BT, blank)
    return [
        {"prompt": prompt, "completion": completion, "reward": float(reward)}
        for prompt, completion, reward in zip(prompts, completions, reward_B, strict=True)
    ]


def learn_from_rows(run: Run, session: Session) -> None:
    """Learn from the rows of a file: one optimizer step an iteration."""
    batch_of = batches(run)
    first = session.states["policy"].params if session.start == 0 else None
    evaluate_before(run, session, lambda: start_of(run) if first is None else first)
    for step in session.steps():
        began = time.perf_counter()
        rows = batch_of(step)
        session.states["policy"], metrics = run.programs["update"](
            session.states["policy"], place(run, rows), run.frozen["policy"]
        )
        session.lap("update", metrics)
        metrics = jax.device_get(metrics) | packing_metrics(rows)
        metrics["seconds"] = time.perf_counter() - began
        session.record(step + 1, metrics, [])
        evaluate_between(run, session, step + 1)


def evaluate_before(run: Run, session: Session, start: Callable[[], Params]) -> None:
    """Measure the start of the run, once; a resumed run remembers it."""
    if "before" not in session.host and (found := evaluate(run, start())):
        session.host["before"] = found.metrics
        session.host["gold_before"] = None if found.gold is None else found.gold.tolist()
        session.evaluated(0, found)
        if run.config.eval.patience and session.start == 0:  # the states are those of the start
            session.states = _compare(session, 0, found)
    session.lap("evaluate")


def evaluate_between(run: Run, session: Session, done: int) -> None:
    """Measure again every ``eval.every`` iterations; with patience at the last one too."""
    every, patience = run.config.eval.every, run.config.eval.patience
    last = done == run.config.steps
    if not (patience if last else every and done % every == 0):
        return
    found = evaluate(run, session.states["policy"].params)
    assert found is not None
    session.evaluated(done, found)
    if patience:
        session.states = _compare(session, done, found)
        if last or is_over(session.host, patience):
            session.states = exchange(session.states, session.host, True)
            best = session.host["best"]
            session.show.note(f"ends at step {done} with the parameters of step {best['step']}")
    session.lap("evaluate")


def _compare(session: Session, step: int, found: Evaluation) -> States:
    return compare(session.states, session.host, step, found.metrics, found.reliability)


def summarise(run: Run, session: Session) -> dict[str, Any]:
    """Measure the end of the run, and write summary.json and report.html.

    The last checkpoint comes first: whatever fails here, or is killed, is done again by the next
    launch, which trains nothing. ``normalisation`` is added to that checkpoint, where all who load
    the run find it.
    """
    summary: dict[str, Any] = {"algorithm": run.config.algorithm.name}
    if run.normalise_rows is not None:
        if "normalisation" not in session.host:
            measured = measure_normalisation(run, session.states["policy"].params)
            session.amend(normalisation=measured)
        summary["normalisation"] = session.host["normalisation"]
    steps = max(run.config.steps, session.start)
    best = session.host["best"] if has_ended(session.host) else None
    found: Evaluation | None
    if best is not None:  # measured already
        found, steps = Evaluation(best["metrics"], reliability=best.get("curve")), best["last"]
    elif found := evaluate(run, session.states["policy"].params):
        session.evaluated(steps, found)
    session.lap("evaluate")
    summary["steps"] = steps
    if best is not None:
        summary["best_step"] = best["step"]
    if found is not None:
        before, after = session.host["before"], found.metrics
        for name in after:
            summary |= {f"{name}_before": before.get(name), f"{name}_after": after[name]}
        if found.gold is not None:
            change = found.gold - np.array(session.host["gold_before"], np.float64)
            rise = over_prompts(change, run.config.eval.n)
            summary["gold_rise"], summary["gold_rise_ci"] = rise
        if found.reliability is not None:
            summary["reliability"] = found.reliability
        if "kl_nats" in after:
            summary["kl_nats"] = after["kl_nats"]
    summary |= session.skipped() | session.totals()
    session.recorder.summary(summary)
    session.report()
    return summary
