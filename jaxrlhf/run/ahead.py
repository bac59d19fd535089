"""What the programs of a run will be called with, and compiling them before they are called.

``arguments`` follows ``loop.iterate``, or ``distil``, line by line, on shapes. ``plan`` reads it.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.config import is_on_policy, on_policy
from jaxrlhf.data.batches import minibatch_rows
from jaxrlhf.mesh.sharding import at_hand, few_rows_layout, row_layout, with_layout
from jaxrlhf.models.decode import Weights, decode_layout
from jaxrlhf.run.setup import Run, beneath

log = logging.getLogger(__name__)

Arguments = tuple[Any, ...]


def arguments(run: Run, key: Any = None) -> Iterator[tuple[str, Arguments]]:
    """(name, shapes, dtypes and layouts of all arguments) of the programs that one iteration calls.

    This is ``loop.iterate`` or ``loop.distil`` on shapes: no array is made, nothing is compiled. A
    program is traced when what follows it is asked for.

    Args:
      run: one that samples.
      key: the shape of a key, where nothing can be run on the mesh's devices; None makes a key.
    """
    config, programs = run.config, run.programs
    policy, base = shapes(run.states["policy"]).params, shapes(run.frozen["policy"])
    assert run.reference is not None

    def rows(name: str, given: Arguments) -> Any:
        """What the program returns: rows, laid out as all rows are."""
        return on_rows(run, jax.eval_shape(getattr(programs, name), *given))

    yield "lay_out", (policy, base)
    prompts = (policy, base, decoding(run), *_prompts(run, key))
    yield "sample", prompts
    # From here on each program's arguments are the shapes that the one before returns.
    rollout = rows("sample", prompts)
    if "teacher" in run.algorithm.needs:
        yield "targets", (rollout,)
        yield from _updates(run, on_rows(run, jax.eval_shape(programs.targets, rollout)[0]))
        return
    texts = (rollout.token_BT, rollout.attention_mask_BT)
    extra = ()
    if "greedy" in run.algorithm.needs:
        yield "greedy", prompts
        few = few_rows_layout(run.mesh, config.data.batch_size)
        judged_Q = jax.ShapeDtypeStruct((config.data.batch_size,), jnp.float32)
        compared = on(few, (jax.eval_shape(programs.greedy, *prompts), judged_Q))
        yield "baseline", compared
        extra = (rows("baseline", compared),)
    if on_policy(config).old_logp == "rescore":
        yield "rescore", (policy, base, *texts, rollout.expert_BTM)
    scored = (shapes(at_hand(run.reference.params)), *texts)
    yield "reference", scored
    if "value" in run.algorithm.needs:
        extra = (rollout.value_BT,)
    if "critic" in run.states:
        valued = (shapes(run.states["critic"]).params, shapes(run.frozen["critic"]), *texts)
        yield "value", valued
        extra = (rows("value", valued),)
    count = rollout.token_BT.shape[0]
    if "scores" in run.algorithm.needs:
        sources = len(config.rewards)
        score_BS = on_rows(run, jax.ShapeDtypeStruct((count, sources), jnp.float32))
        extra = (score_BS, jax.ShapeDtypeStruct((sources,), jnp.float32))
    judged = [jax.ShapeDtypeStruct((count,), kind) for kind in (jnp.float32, jnp.bool_)]
    coefficients = {"kl_coef": jax.ShapeDtypeStruct((), jnp.float32)}
    given = (rollout, rows("reference", scored), *on_rows(run, judged), coefficients, *extra)
    yield "targets", given
    yield from _updates(run, on_rows(run, jax.eval_shape(programs.targets, *given)[0]))


def _updates(run: Run, batch: Any) -> Iterator[tuple[str, Arguments]]:
    """What learns from a batch, as ``loop.update`` calls it."""
    count = jax.tree.leaves(batch)[0].shape[0]
    row_M = minibatch_rows(count, on_policy(run.config).minibatches, 0, 0, 0)[0]
    if len(row_M) < count:
        yield "take", (batch, row_M)
        batch = on_rows(run, jax.eval_shape(run.programs.take, batch, row_M))
    critic = run.states.get("critic"), run.frozen.get("critic")
    policy = run.states["policy"], beneath(run)
    for name, who in {"critic_update": critic, "warmup": policy, "update": policy}.items():
        if getattr(run.programs, name) is not None:
            yield name, (shapes(who[0]), batch, shapes(who[1]))


def decoding(run: Run) -> Weights:
    """Shapes and layouts of the policy as decoding reads it."""
    policy, base = shapes(run.states["policy"]).params, shapes(run.frozen["policy"])
    found = jax.eval_shape(run.programs.lay_out, policy, base)
    return with_layout(found, decode_layout(run.model, run.mesh, found))


def _prompts(run: Run, key: Any) -> tuple[Any, ...]:
    """Prompts, their mask, and the key of the draws."""
    width = (run.config.data.batch_size, run.config.data.max_prompt_tokens)
    layout = few_rows_layout(run.mesh, width[0])
    prompts = (jax.ShapeDtypeStruct(width, jnp.int32, sharding=layout),) * 2
    return *prompts, jax.random.fold_in(jax.random.key(0), 0) if key is None else key


def shapes(tree: Any) -> Any:
    """Arrays → their shapes, dtypes and layouts."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def on_rows(run: Run, tree: Any) -> Any:
    """Shapes with a leading row axis, laid out as the programs leave rows."""
    return on(row_layout(run.mesh), tree)


def on(layout: Any, tree: Any) -> Any:
    """Shapes, all with this layout."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree)


@contextmanager
def compiled_ahead(run: Run) -> Iterator[threading.Thread | None]:
    """Compiles an on-policy run's programs while the block goes on, in the order of an iteration.

    Meant for a run that is not filled yet: weights are read meanwhile. What is compiled is found in
    jit's own cache; without this a first step waits for each program in turn. With several
    processes it does nothing: they must reach the compiler in one order.

    At the block's end no further program is begun. The interpreter ends once the one at hand is
    compiled: a thread that it stopped within XLA would abort the process.
    """
    if jax.process_count() > 1 or not is_on_policy(run.config):
        yield None
        return
    over = threading.Event()

    def work() -> None:
        name = ""
        try:
            with jax.set_mesh(run.mesh):
                for name, given in arguments(run):
                    if over.is_set():
                        return
                    getattr(run.programs, name).lower(*given).compile()
        except Exception as error:  # the call that needs it will say so
            log.info("%s does not compile: %s", name, error)

    thread = threading.Thread(target=work, name="compile ahead")
    thread.start()
    try:
        yield thread
    finally:
        over.set()
