"""One iteration of policy learning: what its programs hand to each other, and all of it in one jit.

``programs`` are functions by name, with the arguments that ``programs.on_policy_programs`` gives
them: those of a run (``setup(config).programs``), or a researcher's own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core.types import AnyBatch, Array, Params, Rollout, TrainState
from jaxrlhf.steps.losses import Metrics

Programs = Mapping[str, Callable[..., Any]]
States = dict[str, TrainState]
"""What is trained: ``policy``, and ``critic`` if it is a network of its own."""


class Iterated(NamedTuple):
    """What an iteration leaves."""

    states: States
    metrics: Metrics
    """Of the rollout, a number each; of the updates, [U] each, in their order."""
    rollout: Rollout
    reward_B: Array


def make_iteration(
    programs: Programs, reward: Callable[[Any, Rollout], Array], needs: frozenset[str]
) -> Callable[..., Iterated]:
    """A whole iteration as one jitted call: sample → reward → targets → updates.

    For rewards that are functions of arrays, such as a reward model's. Nothing leaves the devices
    between prompts and new parameters, and one compiled program is all that is dispatched. What the
    host decides is the loop's alone: rounds of sampling that depend on what was sampled (DAPO's),
    an early stop between updates, a critic's warm-up, and old log-probs that are scored again.

    Args:
      programs: "sample", "reference", "targets", "take" and "update", and as ``needs`` and states
        have it "greedy" and "baseline", "value", "critic_update".
      reward: (parameters, rollout) → float [B], reward units; NaN where a row has none.
      needs: those of the algorithm.

    Returns:
      iteration(states, frozen, reference, judge, prompt_QP, prompt_mask_QP, key, row_UM,
      coefficients) → Iterated, jitted. ``states`` are donated. ``frozen`` are the weights under
      adapters, or None, by the same names; ``reference`` and ``judge`` the parameters of the
      reference and of ``reward``; ``row_UM`` int32, the rows of each of U updates;
      ``coefficients`` traced scalars, such as ``kl_coef``.
    """

    def iteration(
        states: States,
        frozen: dict[str, Params | None],
        reference: Params,
        judge: Any,
        prompt_QP: Array,
        prompt_mask_QP: Array,
        key: Array,
        row_UM: Array,
        coefficients: Metrics,
    ) -> Iterated:
        given = (states["policy"].params, frozen["policy"], prompt_QP, prompt_mask_QP, key)
        rollout = programs["sample"](*given)
        reward_B = reward(judge, rollout)
        baseline_B = None
        if "greedy" in needs:
            greedy = programs["greedy"](*given)
            baseline_B = programs["baseline"](greedy, reward(judge, greedy))
        judged = (reward_B, jnp.isfinite(reward_B))
        batch, measured = prepare(
            programs, needs, states, frozen, reference, rollout, judged, coefficients, baseline_B
        )

        def step(states: States, row_M: Array) -> tuple[States, Metrics]:
            return update_on(programs, states, frozen, cut(programs, batch, row_M))

        states, learnt = jax.lax.scan(step, states, row_UM)
        return Iterated(states, {**measured, **learnt}, rollout, reward_B)

    return jax.jit(iteration, donate_argnums=0)


def prepare(
    programs: Programs,
    needs: frozenset[str],
    states: States,
    frozen: dict[str, Params | None],
    reference: Params,
    rollout: Rollout,
    judged: tuple[Array, Array],
    coefficients: Mapping[str, Any],
    baseline_B: Array | None = None,
) -> tuple[AnyBatch, Metrics]:
    """What to learn from a judged rollout, compared with the reference and with what was expected.

    Args:
      judged: reward_B, and valid_B, where there is one.
      baseline_B: what each prompt's greedy response is worth, if ``needs`` has "greedy".
    """
    rows = (rollout.token_BT, rollout.attention_mask_BT)
    extra = () if baseline_B is None else (baseline_B,)
    if "value" in needs:
        value_BT = rollout.value_BT
        if value_BT is None:
            value_BT = programs["value"](states["critic"].params, frozen["critic"], *rows)
        extra = (value_BT,)
    ref_logp_BT = programs["reference"](reference, *rows)
    return programs["targets"](rollout, ref_logp_BT, *judged, coefficients, *extra)


def cut(programs: Programs, batch: AnyBatch, row_M: Array | np.ndarray) -> AnyBatch:
    """A minibatch, its weights its own; all rows are the batch itself."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    return batch if len(row_M) == rows else programs["take"](batch, row_M)


def update_on(
    programs: Programs,
    states: States,
    frozen: dict[str, Params | None],
    batch: AnyBatch,
    warming: bool = False,
) -> tuple[States, Metrics]:
    """An optimizer step of each network.

    Args:
      warming: only values are learnt as yet.
    """
    states, metrics = dict(states), {}
    if "critic" in states:
        states["critic"], learnt = programs["critic_update"](
            states["critic"], batch, frozen["critic"]
        )
        metrics = {f"critic/{name}": x for name, x in learnt.items()}
    if not warming or "critic" not in states:
        update = programs["warmup" if warming else "update"]
        states["policy"], learnt = update(states["policy"], batch, frozen["policy"])
        metrics |= learnt
    return states, metrics
