"""``jaxrlhf eval``: what a policy is worth on held-out prompts, beside what it must beat."""

import json
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import Config, EvaluateConfig, MeshConfig, check_evaluate
from jaxrlhf.core.errors import InputError
from jaxrlhf.core.files import check_file, write_atomic, writing
from jaxrlhf.mesh.sharding import make_mesh, tpu_slices
from jaxrlhf.models.load import is_run
from jaxrlhf.rewards.judge import Judge
from jaxrlhf.run.record import plain
from jaxrlhf.study.evaluate.drawing import draw
from jaxrlhf.study.evaluate.entrants import config_of, read_entrants
from jaxrlhf.study.evaluate.figures import best_of_n_curve, compare, completions, describe, solved
from jaxrlhf.study.evaluate.table import table

STREAMS = {"model": 0x7FFFFFF0, "reference": 0x7FFFFFF1, "against": 0x7FFFFFF2}
"""Streams of the draws of each, beside those of training and of the evaluations in a run."""

Extract = Callable[[str], Hashable | None]
"""Completion → its answer, or None."""

__all__ = ["evaluate_model", "table"]


def evaluate_model(
    wish: EvaluateConfig,
    mesh: Mesh | None = None,
    extract: Extract | None = None,
) -> dict[str, Any]:
    """Measure a policy on held-out prompts and write evaluation.json.

    ``wish.n`` completions of each prompt are sampled at T = 1, untruncated, by the model and by
    what it is compared with; a prompt that stands in several rows counts once. Means are over
    prompts, and ``_ci`` is the half width of the 95 % interval of such a mean: Student's, and of
    shares (win rates, pass@k, maj@k, ended) the distance to the farther end of Wilson's.

    Args:
      wish: what to measure.
      mesh: where, if not on all devices as the run's mesh and ``wish`` say.
      extract: completion → its answer, for maj@k; None for a completion without one. If not given,
        what the verifier that judges takes for the answer; without one, the stripped text.

    Returns:
      What evaluation.json holds: ``step``, iterations of the run behind the model (None if it is no
      run); ``rows_skipped``, where the run has ``data.skip_bad_rows``; ``policy`` and ``against``,
      the figures of each (``describe``), the policy's with its KL to the reference; ``win_rate``,
      by each judge; ``pass_at_k`` and ``maj_at_k`` for verifiable tasks; ``best_of_n``, the curve
      of the reference (of the model, if it has none), and ``equal_kl``, what that curve reaches at
      the policy's KL; and the policy's ``completions``.

    Raises:
      InputError: a model, data or reward that cannot be used, or no folder that can be written.
    """
    check_evaluate(wish)
    folder = _folder(wish)
    config = config_of(wish.model)
    path = folder / "evaluation.json"
    if jax.process_index() == 0:
        check_file(path)
    mesh = mesh or make_mesh(_mesh_config(wish, config))
    with jax.set_mesh(mesh):
        found = _measure(wish, config, mesh, extract)
    if jax.process_index() == 0:
        text = json.dumps(plain(found), indent=1, allow_nan=False)
        with writing(path):
            write_atomic(path, text + "\n")
    return found


def _measure(
    wish: EvaluateConfig,
    config: Config,
    mesh: Mesh,
    extract: Extract | None,
) -> dict[str, Any]:
    bench, entrants = read_entrants(wish, config, mesh)
    if note := bench.prompts.note():
        print(note, flush=True)
    judges = tuple(bench.judges)
    best_of = wish.best_of if judges else 0
    stream = jax.random.key(wish.seed)
    keys = {name: jax.random.fold_in(stream, number) for name, number in STREAMS.items()}
    networks = {name: getattr(entrants, name) for name in STREAMS}
    baseline = "model" if entrants.reference is None else "reference"
    compared = baseline if entrants.against is None else "against"
    most = {name: wish.n if name in ("model", compared) else 0 for name in STREAMS}
    most[baseline] = max(most[baseline], best_of)
    drawn = {}
    for name, network in networks.items():
        if network is not None and most[name]:
            print(f"{name}: {most[name]} completions of {len(bench.prompts)} prompts", flush=True)
            other = entrants.reference if name == "model" else None
            drawn[name] = draw(bench, network, most[name], keys[name], other)
    ours = drawn["model"]
    found: dict[str, Any] = {
        "models": entrants.names,
        "step": entrants.model.step,
        "rewards": {n: [source.name for source in j.sources] for n, j in bench.judges.items()},
        "data": wish.data or config.data.eval,
        "prompts": len(bench.prompts),
        "n": wish.n,
        "max_new_tokens": bench.sampling.max_new_tokens,
        "seed": wish.seed,
        "policy": describe(ours, wish.n, judges),
    }
    if config.data.skip_bad_rows:
        found["rows_skipped"] = len(bench.prompts.skipped)
    if compared != "model":
        found["against"] = describe(drawn[compared], wish.n, judges)
        found["win_rate"] = compare(ours, drawn[compared], wish.n, judges)
    rule = rule_of(bench.judges[judges[-1]]) if judges else Rule()
    correct_at = rule.correct_at if wish.correct_at is None else wish.correct_at
    found |= solved(ours, wish.n, judges, correct_at, extract or rule.extract)
    if best_of:
        found |= best_of_n_curve(drawn[baseline], best_of, judges, found["policy"])
    return found | {"completions": completions(ours, wish.n, bench.prompts.items, judges)}


class Rule(NamedTuple):
    """What is right, and what is an answer."""

    correct_at: float | None = None
    extract: Extract = str.strip


def rule_of(judge: Judge) -> Rule:
    """The rule of a judge that is one verifier: its full score is right, and only that.

    A verifier may pay for what is nearly right, which is then no reason to measure nothing.
    """
    if len(judge.sources) != 1 or judge.sources[0].answer is None:
        return Rule()
    (source,) = judge.sources
    full = float(np.float32(source.weight))  # as scores are kept
    return Rule(full if full > 0 else None, source.answer or str.strip)


def _folder(wish: EvaluateConfig) -> Path:
    if not wish.output and not is_run(wish.model):
        raise InputError(
            f"output: missing: {wish.model} is no run's folder: give one for evaluation.json"
        )
    return Path(wish.output or wish.model)


def _mesh_config(wish: EvaluateConfig, config: Config) -> MeshConfig:
    """The run's way to split its parameters, on all the devices there are now."""
    axes = ("fsdp", "tensor", "context")
    given = {name: getattr(wish, name) for name in axes if getattr(wish, name)}
    mesh = replace(config.mesh, **given, slices=tpu_slices(jax.devices()))
    return mesh if -1 in (mesh.fsdp, mesh.tensor, mesh.context) else replace(mesh, data=-1)
