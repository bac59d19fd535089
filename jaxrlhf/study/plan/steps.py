"""The programs of a run as a plan sees them: what each is called with, and how often."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.config import Config, DAPOConfig, is_on_policy, on_policy
from jaxrlhf.mesh.sharding import at_hand, few_rows_layout
from jaxrlhf.run.ahead import arguments, on_rows, shapes
from jaxrlhf.run.setup import Run
from jaxrlhf.steps.score import reward, token_scores
from jaxrlhf.study.plan.batch import batch_of
from jaxrlhf.study.plan.memory import fetched


class Call(NamedTuple):
    """A jitted program of a run, ready to be traced."""

    program: Any
    args: tuple[Any, ...]
    calls: int
    """Times an iteration, at most; 0 for what stands outside of it, as evaluation does."""
    responses: int = 0
    """Rows that it samples; 0 if it does not sample."""
    fetched: float = 0.0
    """Bytes on each device of the parameters that come from host memory for it."""


def calls_of(run: Run) -> dict[str, Call]:
    """Every program that the run carries out, in the order of an iteration."""
    if not is_on_policy(run.config):
        return _offline(run)
    key = jax.eval_shape(lambda: jax.random.key(0))
    config = run.config
    given = dict(arguments(run, jax.ShapeDtypeStruct(key.shape, key.dtype)))
    settings, samples = on_policy(config), config.data.batch_size * config.sample.n
    rounds = settings.rounds if isinstance(settings, DAPOConfig) else 1
    updates = settings.epochs * settings.minibatches
    often = {"sample": rounds, "greedy": rounds, "warmup": 0}
    often |= dict.fromkeys(("take", "critic_update", "update"), updates)
    drawn = {"sample": samples, "greedy": config.data.batch_size}
    assert run.reference is not None
    away = {"reference": fetched(run.reference.params)}
    out = {
        name: Call(
            run.programs[name],
            args,
            often.get(name, 1),
            drawn.get(name, 0),
            away.get(name, 0.0),
        )
        for name, args in given.items()
    }
    rewards = _reward_models(run, given["reference"][1:], rounds)
    return {"sample": out.pop("sample"), **rewards, **out, **_evaluation(run, given)}


def _offline(run: Run) -> dict[str, Call]:
    """Learning from rows: the reference on a batch, and the update."""
    out, batch = {}, batch_of(run)
    if run.reference is not None:
        params = run.reference.params
        program, args = run.programs["reference"], (shapes(at_hand(params)), batch)
        out["reference"] = Call(program, args, 1, fetched=fetched(params))
        batch = on_rows(run, jax.eval_shape(program, *args))
    args = (shapes(run.states["policy"]), batch, shapes(run.frozen["policy"]))
    return {**out, "update": Call(run.programs["update"], args, 1)}


def _reward_models(run: Run, texts: tuple[Any, ...], rounds: int) -> dict[str, Call]:
    """The reward models, each on the whole rollout."""
    assert run.judge is not None
    out = {}
    members = [x for scorer in run.judge.scorers if scorer for x in scorer.members]
    for index, member in enumerate(members):
        network, process = member.network, member.process
        program = jax.jit(partial(reward if process is None else token_scores, network.model))
        args = (shapes(at_hand(network.params)), *texts, shapes(network.lora))
        away = fetched(network.params)
        out[f"reward {index}"] = Call(program, args, rounds, fetched=away)
    return out


def _evaluation(run: Run, given: dict[str, tuple[Any, ...]]) -> dict[str, Call]:
    """What held-out rows are measured with, if there are any."""
    config = run.config
    if not config.data.eval:
        return {}
    shards = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    rows = -(-config.eval.batch_size // shards) * shards
    width = (rows, config.data.max_prompt_tokens)
    prompts = jax.ShapeDtypeStruct(width, jnp.int32, sharding=few_rows_layout(run.mesh, rows))
    policy, base, *_, key = given["sample"]
    draw = (policy, base, prompts, prompts, key)
    rollout = on_rows(run, jax.eval_shape(run.programs["eval_sample"], *draw))
    texts = (rollout.token_BT, rollout.attention_mask_BT)
    score = (given["reference"][0], *texts)
    assert run.reference is not None
    away = fetched(run.reference.params)
    return {
        "eval_sample": Call(run.programs["eval_sample"], draw, 0, rows * config.eval.n),
        "eval_reference": Call(run.programs["eval_reference"], score, 0, fetched=away),
    }


def decode_trips(config: Config, responses: int, mean_length: float | None) -> int:
    """Iterations of the decode loop, which ends when every row has; one token is drawn before it.

    Without ``mean_length`` the worst case. With it, rows are taken to end independently, each
    token with the same chance: of B lengths with mean m the longest has the mean
    Σ_t 1 − (1 − (1 − 1/m)^t)^B, cut at max_new_tokens.
    """
    most = config.sample.max_new_tokens
    if mean_length is None:
        return most - 1
    going = 1 - 1 / max(mean_length, 1.0)
    longest = sum(1 - (1 - going**t) ** responses for t in range(most))
    return round(longest) - 1
