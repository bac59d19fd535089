"""The two loops: learning from what the policy samples, and learning from rows.

``iterate`` is the algorithm as the papers have it. Each step of it is a call of a pure jitted
function (``run.programs``) on the training states; the rest is the host's chores.
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
from jaxrlhf.config import Config, DAPOConfig, GKDConfig, OnPolicyConfig, is_on_policy, on_policy
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.remote import scratch
from jaxrlhf.core.stats import over_prompts
from jaxrlhf.core.types import AnyBatch, Array, Params, Rollout, States
from jaxrlhf.data.batches import answers_of, minibatch_rows, order, samples_at
from jaxrlhf.data.formats import Prompt
from jaxrlhf.data.text import decode_rollout
from jaxrlhf.data.tokens import prompt_arrays
from jaxrlhf.mesh.processes import pace
from jaxrlhf.mesh.sharding import at_hand, constrain, fetch, make_mesh, put_rows
from jaxrlhf.mesh.signals import Signals
from jaxrlhf.mesh.watchdog import guarded
from jaxrlhf.rewards.judge import Judgement, measures
from jaxrlhf.run.ahead import compiled_ahead
from jaxrlhf.run.feed import batches, example, last_turn, packing_metrics, place
from jaxrlhf.run.fingerprint import check_alike, told
from jaxrlhf.run.held_out import Evaluation, evaluate, measure_normalisation
from jaxrlhf.run.mirror import mirrored
from jaxrlhf.run.notices import announced
from jaxrlhf.run.programs import OnPolicyPrograms, on_schedule
from jaxrlhf.run.record import known
from jaxrlhf.run.rounds import Judged, enough, pick_groups, signal_of
from jaxrlhf.run.session import Session, lock
from jaxrlhf.run.setup import Run, beneath, fill, setup, start_of
from jaxrlhf.run.stopping import compare, exchange, has_ended, is_over
from jaxrlhf.steps.update import combine_updates

SHOWN = 4
"""Completions of each iteration that go to samples.jsonl."""


def train(
    config: Config,
    mesh: Mesh | None = None,
    feed: Callable[[str], None] | None = None,
    leave: int | None = None,
    may_change: bool = True,
) -> dict[str, Any]:
    """Carry out a run, or go on with it, and return its summary.

    Args:
      config: the run.
      mesh: where to, if not on all devices as ``config.mesh`` says.
      feed: called after every phase of an iteration, as a sign that the run goes on; with a name
        for the next where that may take long.
      leave: exit status for a SIGTERM or Ctrl-C that cannot wait for this function to return, where
        the process is this run's alone; None: it is not.
      may_change: go on with a run whose settings were others, where they may change (``changes``).

    Raises:
      SystemExit: with status 0: SIGTERM or Ctrl-C came, and what was done is saved.
      InputError: config, data, weights or output folder cannot be used.
      FloatingPointError: too many updates in a row had a gradient that is not finite.
    """
    began = time.perf_counter()
    if feed is not None:
        feed("setting up")
    mesh = mesh or make_mesh(config.mesh)
    with (
        Signals(leave) as signals,
        jax.set_mesh(mesh),
        announced(config, mesh) as show,
        mirrored(config.output) as mirror,
    ):
        check_alike(told(config))
        # Shapes first: programs are compiled while the weights are still being read.
        run = setup(config, mesh, abstract=True)
        with compiled_ahead(run):
            show.phase("reading the weights")
            run = fill(run)
            with (
                lock(scratch(config.output)),
                Session(run, began, feed, signals, show, may_change, mirror) as session,
                guarded(),
            ):
                session.lap("setup")
                if summary := session.finished():
                    return summary
                session.example(example(run))
                learn = learn_on_policy if is_on_policy(config) else learn_from_rows
                learn(run, session)
                return summarise(run, session)


def learn_on_policy(run: Run, session: Session) -> None:
    """Iterate, adapt β, log, evaluate; and again."""
    settings = run.config.algorithm
    assert isinstance(settings, OnPolicyConfig)
    controller = KL_CONTROLLERS[settings.kl_controller]
    turn = distil if settings.has_teacher else iterate
    # A fixed β is the config's, on resume too; an adaptive one goes on as it was saved.
    if settings.kl_controller == "fixed":
        session.host["kl_coef"] = settings.kl_coef
    session.host.setdefault("kl_coef", settings.kl_coef)
    if session.unmeasured:
        evaluate_before(run, session, partial(start_of, run))
        evaluate_between(run, session, session.start)
    for step in session.steps():
        began = time.perf_counter()
        session.states, metrics, rollout, judgement = turn(run, session, step)
        metrics = known(jax.device_get(metrics))
        rows = int(rollout.token_BT.shape[0])
        if settings.kl_controller != "fixed":
            kl, coefficient = float(metrics["kl"]), session.host["kl_coef"]
            how = settings.kl_target, rows, settings.kl_horizon
            session.host["kl_coef"] = controller(coefficient, kl, *how)
        seconds = time.perf_counter() - began
        tokens = float(metrics["length"]) * rows
        metrics |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
        passes = metrics["updates"] / settings.minibatches
        warming = step < run.config.critic.warmup
        metrics |= session.meter.metrics(session.host["seconds"], seconds, passes, warming)
        session.host["tokens"] = session.host.get("tokens", 0.0) + tokens
        session.record(step + 1, metrics, shown(run, rollout, judgement))
        # Not before the first step, so that a user sees one at once.
        evaluate_before(run, session, partial(start_of, run))
        evaluate_between(run, session, step + 1)


class Scored(NamedTuple):
    """Responses with log π_old, log π_ref, and V where it is learnt."""

    rollout: Rollout
    ref_logp_BT: Array
    value_BT: Array | None


def iterate(
    run: Run, session: Session, step: int
) -> tuple[States, dict[str, Any], Rollout, Judgement]:
    """One iteration of policy learning: from prompts to the next states."""
    programs: OnPolicyPrograms = run.programs
    settings, states, frozen = run.config.algorithm, session.states, run.frozen
    assert isinstance(settings, OnPolicyConfig)
    assert run.judge is not None
    assert run.reference is not None
    policy, base = states["policy"].params, frozen["policy"]

    # y ~ π_θ(·|x) and r(x, y): once, or until enough groups have a signal (DAPO).
    rounds: list[Judged] = []
    scored: Scored | None = None
    while not enough(run, rounds):
        draw, prompts, arrays = draw_prompts(run, session, step)
        # A copy of π_θ as decoding reads it, which is gone before the rewards need memory.
        decoding = programs.lay_out(policy, base)
        rollout = programs.sample(policy, base, decoding, *arrays)
        greedy = None
        if "greedy" in run.algorithm.needs:
            greedy = programs.greedy(policy, base, decoding, *arrays)
        del decoding
        session.lap("sample", rollout, greedy)
        session.meter.sampled(rollout, greedy)
        # Not waited for: devices score what was sampled while the host asks for its rewards.
        scored = score(run, states, rollout) if scores_at_once(run.config) else None
        judgement = run.judge(rollout, prompts)
        refuse_worthless(judgement, draw)
        baseline_B = None if greedy is None else judge_greedy(run, greedy, prompts, draw)
        session.lap("reward", judgement.reward_B)
        rounds.append(Judged(rollout, judgement, baseline_B, signal_of(run, judgement)))
    (rollout, judgement, baseline_B, _), metrics = pick_groups(run, rounds)
    del rounds  # DAPO's other rollouts need not outlive the choice
    # log π_old(y_t|s_t), log π_ref(y_t|s_t), V(s_t)
    scored = scored or score(run, states, rollout)
    # KL in the reward; advantages over what was expected: V, or the greedy response's reward; or
    # of each source's scores (GDPO).
    expected: list[Any] = [x for x in (baseline_B, scored.value_BT) if x is not None]
    if "scores" in run.algorithm.needs:
        expected += run.judge.scores(judgement)
    coefficients = {"kl_coef": np.float32(session.host["kl_coef"])}
    rewards = judgement.reward_B, judgement.valid_B
    batch, measured = programs.targets(
        scored.rollout, scored.ref_logp_BT, *rewards, coefficients, *expected
    )
    session.lap("score", batch)
    session.meter.learns(batch)

    # θ ← θ − α·∇loss, epochs × minibatches times; the old states are donated.
    session.begin_update()
    states, learnt = update(run, states, batch, step)
    session.lap("update", learnt)
    metrics = {**metrics, **measured, **measures(judgement), **learnt, **coefficients}
    return states, metrics, rollout, judgement


def distil(run: Run, session: Session, step: int) -> tuple[States, dict[str, Any], Rollout, None]:
    """One iteration of distillation: from prompts to the next states."""
    programs: OnPolicyPrograms = run.programs
    settings, config, states = run.config.algorithm, run.config, session.states
    assert isinstance(settings, GKDConfig)
    policy, base = states["policy"].params, run.frozen["policy"]
    sampled = samples_at(settings.lmbda, config.seed, step)
    if sampled:  # y ~ π_θ(·|x)
        _, _, arrays = draw_prompts(run, session, step)
        decoding = programs.lay_out(policy, base)
        rollout = programs.sample(policy, base, decoding, *arrays)
        del decoding
        session.meter.sampled(rollout)
    else:  # y of the data
        chosen = order(len(run.train_rows.items), config.data.batch_size, config.seed, step)
        rows = [run.train_rows.items[i] for i in chosen]
        width, new = config.data.max_prompt_tokens, config.sample.max_new_tokens
        rollout = put_rows(answers_of(rows, width, new, config.sample.pad), run.mesh)
    session.lap("sample", rollout)
    batch, measured = programs.targets(rollout)
    session.lap("score", batch)
    session.meter.learns(batch)

    # θ ← θ − α·∇D(π_teacher‖π_θ), of whole distributions: the teacher reads the texts with the
    # student, in the update.
    session.begin_update()
    states, learnt = update(run, states, batch, step)
    session.lap("update", learnt)
    if not sampled:  # what is said of draws has no meaning
        measured = {name: measured[name] for name in ("length", "ended")}
    return states, {**measured, **learnt, "on_policy": float(sampled)}, rollout, None


def scores_at_once(config: Config) -> bool:
    """Whether responses are scored before their rewards are known: not where groups are chosen by
    them (DAPO), nor if the reference's weights would be on the devices beside a reward model's."""
    return not isinstance(config.algorithm, DAPOConfig) and not config.reference.offload


def score(run: Run, states: States, rollout: Rollout) -> Scored:
    """What the networks say of responses; nothing waits for it."""
    programs: OnPolicyPrograms = run.programs
    assert run.reference is not None
    texts = (rollout.token_BT, rollout.attention_mask_BT)
    # log π_old: the sampler's, or scored again as the update will.
    if on_policy(run.config).old_logp == "rescore":
        given = states["policy"].params, run.frozen["policy"], *texts, rollout.expert_BTM
        logp_BT = programs.rescore(*given)
        rollout = replace(rollout, logp_BT=logp_BT * rollout.mask_BT)
    ref_logp_BT = programs.reference(at_hand(run.reference.params), *texts)
    # V: by a critic of its own, or the sampler's, where it shares the policy's trunk.
    value_BT = rollout.value_BT
    if "critic" in states:
        value_BT = programs.value(states["critic"].params, run.frozen["critic"], *texts)
    return Scored(rollout, ref_logp_BT, value_BT)


def update(run: Run, states: States, batch: AnyBatch, step: int) -> tuple[States, dict[str, Any]]:
    """epochs × minibatches updates on one rollout; stops early once KL(old‖new) is too large."""
    programs: OnPolicyPrograms = run.programs
    settings, frozen, under = run.config.algorithm, run.frozen, beneath(run)
    assert isinstance(settings, OnPolicyConfig)
    states, seen = on_schedule(run.config, states, step), []
    warming = step < run.config.critic.warmup
    count = jax.tree.leaves(batch)[0].shape[0]
    passes = (
        row_M
        for epoch in range(settings.epochs)
        for row_M in minibatch_rows(count, settings.minibatches, run.config.seed, step, epoch)
    )
    for row_M in passes:
        part = batch if len(row_M) == count else programs.take(batch, row_M)
        metrics: dict[str, Any] = {}
        if programs.critic_update is not None:
            critic = programs.critic_update(states["critic"], part, frozen["critic"])
            states["critic"] = critic[0]
            metrics = {f"critic/{name}": x for name, x in critic[1].items()}
        # While the critic warms up, the policy stays as it is.
        learn = programs.warmup if warming else programs.update
        if learn is not None:
            states["policy"], learnt = learn(states["policy"], part, under)
            metrics |= learnt
        seen.append(pace(metrics))
        if settings.target_kl and _apart(metrics) > settings.target_kl:
            break
    return states, combine_updates(seen) | {"updates": len(seen)}


def _apart(metrics: dict[str, Any]) -> float:
    """KL(old‖new), nats a token, of an update's metrics; 0 while only the critic learns."""
    return float(metrics["approx_kl"] / metrics["weight"]) if "approx_kl" in metrics else 0.0


def draw_prompts(run: Run, session: Session, step: int) -> tuple[int, list[Prompt], tuple]:
    """The prompts of the next round: which slice of the data, its rows, the sampler's arguments.

    With dynamic sampling slices are counted by the rounds so far, else by the steps. The draws of
    a slice follow from the seed and its number, so that nothing else has to be saved.
    """
    config, draw = run.config, step
    if isinstance(config.algorithm, DAPOConfig):
        draw = session.host.get("draws", 0)
        session.host["draws"] = draw + 1
    key = jax.random.fold_in(jax.random.key(config.seed), draw)
    chosen = order(len(run.train_rows.items), config.data.batch_size, config.seed, draw)
    encoded = [run.train_rows.items[i] for i in chosen]
    arrays = prompt_arrays(encoded, config.data.max_prompt_tokens, config.sample.pad)
    prompts: list[Prompt] = [row.source for row in encoded]  # type: ignore[misc]
    return draw, prompts, (*put_rows(arrays, run.mesh), key)


def refuse_worthless(judgement: Judgement, draw: int) -> None:
    """Stop where nothing can be learnt.

    Raises:
      InputError: not one completion got a reward.
    """
    if not bool(judgement.valid_B.any()):
        raise InputError(f"rewards: draw {draw + 1} got no usable reward for any completion")


def judge_greedy(run: Run, greedy: Rollout, prompts: list[Prompt], draw: int) -> Array:
    """baseline_B: the reward of each prompt's greedy response, for all of its samples (ReMax).

    Raises:
      InputError: not one of them got a reward.
    """
    assert run.judge is not None
    reward_Q = fetch(run.judge(greedy, prompts).reward_B)
    if not np.isfinite(reward_Q).any():
        raise InputError(f"rewards: draw {draw + 1} got none for any greedy response")
    return run.programs.baseline(greedy, put_rows(reward_Q, run.mesh))


def shown(run: Run, rollout: Rollout, judgement: Judgement | None) -> list[dict[str, Any]]:
    """A few completions of an iteration, with their rewards, if they have been judged."""
    rows = (rollout.token_BT, rollout.attention_mask_BT, rollout.mask_BT)
    given = rows if judgement is None else (*rows, judgement.reward_B)
    token_BT, attention_BT, mask_BT, *rewards = fetch(_first_rows(given))
    blank = [""] * len(token_BT)
    given_BT = attention_BT * (mask_BT == 0)
    prompts = decode_rollout(run.tokenizer, token_BT, given_BT, blank)
    completions = decode_rollout(run.tokenizer, token_BT, mask_BT, blank)
    turns = [last_turn(run, x[m != 0].tolist()) for x, m in zip(token_BT, given_BT, strict=True)]
    out: list[dict[str, Any]] = [
        {"prompt": prompt, **turn, "completion": completion}
        for prompt, turn, completion in zip(prompts, turns, completions, strict=True)
    ]
    for reward_B in rewards:
        for row, reward in zip(out, reward_B, strict=True):
            row["reward"] = float(reward)
    return out


@jax.jit
def _first_rows(rows: Any) -> Any:
    """The rows that are shown, whole on every device, so that a host fetches no others."""
    return jax.tree.map(lambda x: constrain(x[:SHOWN], (None,) * x.ndim), rows)


def learn_from_rows(run: Run, session: Session) -> None:
    """Learn from the rows of a file: one optimizer step an iteration."""
    batch_of = batches(run)
    # The first update donates these arrays; a resumed run makes its start anew, if it must.
    first = session.states["policy"].params if session.start == 0 else None
    evaluate_before(run, session, lambda: start_of(run) if first is None else first)
    if session.unmeasured:
        evaluate_between(run, session, session.start)
    for step in session.steps():
        began = time.perf_counter()
        rows = batch_of(step)
        session.meter.learns(rows)
        session.begin_update()
        session.states = on_schedule(run.config, session.states, step)
        session.states["policy"], metrics = run.programs.update(
            session.states["policy"], place(run, rows), run.frozen["policy"]
        )
        session.lap("update", metrics)
        metrics = jax.device_get(metrics) | packing_metrics(rows)
        metrics["seconds"] = time.perf_counter() - began
        metrics |= session.meter.metrics(session.host["seconds"], metrics["seconds"])
        session.record(step + 1, metrics, [])
        evaluate_between(run, session, step + 1)


def evaluate_before(run: Run, session: Session, start: Callable[[], Params]) -> None:
    """Measure the start of the run, once; a resumed run remembers it."""
    session.begin_evaluation()
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
    session.begin_evaluation()
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
    session.begin_evaluation()
    if run.normalise_rows is not None:
        if "normalisation" not in session.host:
            measured = measure_normalisation(run, session.states["policy"].params)
            session.amend(normalisation=measured)
        summary["normalisation"] = session.host["normalisation"]
    # A run that is asked for fewer steps than it has done has done them all the same.
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
    session.say_end(summary)
    return summary
