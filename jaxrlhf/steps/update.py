"""One optimizer step as a pure function of a TrainState."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.config import OptimConfig
from jaxrlhf.core.types import Array, Params, TrainState
from jaxrlhf.steps.losses import Loss, Metrics


def make_optimizer(config: OptimConfig, steps: int | None = None) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; eps is added outside the square root.

    Args:
      config: learning rate and its schedule, betas, weight decay (relative to the learning rate).
      steps: optimizer steps of the whole run, over which a schedule decays.

    Raises:
      ValueError: if the schedule decays and ``steps`` is not given.
    """
    if config.schedule != "constant" and steps is None:
        raise ValueError(f"optim.schedule={config.schedule}: make_optimizer needs steps")
    decay = max((steps or 0) - config.warmup, 1)
    peak = config.learning_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay),
    }[config.schedule]
    rise = optax.linear_schedule(peak / max(config.warmup, 1), peak, max(config.warmup - 1, 1))
    rate = optax.join_schedules([rise, after], [config.warmup]) if config.warmup else after
    tx = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays
        ),
    )
    return tx if config.state_dtype == "float32" else keep_state_in(config.state_dtype, tx)


def keep_state_in(dtype: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` with the float32 arrays of its state kept in ``dtype`` from one step to the next.

    A step computes in float32 and rounds the new state to nearest. In bfloat16, eight bits of
    precision, a moment m ← b·m + (1 − b)·x stays where it is once (1 − b)·|x − m| < 2⁻⁸·|m|: of a
    steady gradient Adam's first moment comes within 4 % with b1 = 0.9, and the root of the second
    within 4 % with b2 = 0.95. That, and no more, is lost: parameters and gradients stay float32.
    """

    def cast(state: Any, before: Any, after: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(after) if x.dtype == before else x, state)

    def init(params: Params) -> Any:
        return cast(tx.init(params), jnp.float32, dtype)

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(init, update)


def decays(params: Params) -> Any:
    """True for the weights that decay: not for norms, biases and heads."""

    def leaf(path: Any, _: Any) -> bool:
        names = [getattr(entry, "key", "") for entry in path]
        return "head" not in names and names[-1] not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(leaf, params)


def make_update(
    tx: optax.GradientTransformation,
    loss: Loss,
    microbatches: int = 1,
    donate: bool = True,
    layout: Any = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """update(state, batch, frozen=None) → (state, metrics), jitted.

    The gradient of ``loss`` with respect to ``state.params`` is summed over ``microbatches``
    pieces of the rows (the loss carries its normaliser in the batch's weights, so the split
    changes nothing but rounding) and applied by ``tx``. If it is not finite, parameters and
    optimizer stay as they are, ``state.skipped`` grows by one, and ``metrics["skipped"]`` is 1.

    Args:
      loss: loss(params, frozen, batch) → (scalar, metrics); both additive over rows. Metrics whose
        name ends in _max or _min are combined so.
      microbatches: static; must divide the number of rows.
      donate: the old state's buffers are reused. Whatever else holds them (a reference policy that
        is the same array) must be a copy.
      layout: shardings of the new state (sharding.train_state_shardings), so that it lies where
        the old one did; None leaves it to the compiler.

    ``frozen`` is an argument, not a closure: it is neither donated nor differentiated.
    """

    def update(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        def value_and_grad(piece: Any) -> tuple[Array, Metrics, Params]:
            (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
                state.params, frozen, piece
            )
            return total, metrics, grads

        if microbatches == 1:
            total, metrics, grads = value_and_grad(batch)
        else:
            total, metrics, grads = _accumulate(value_and_grad, _split(batch, microbatches))
        return _apply(tx, state, total, metrics, grads)

    return jax.jit(update, donate_argnums=(0,) if donate else (), out_shardings=(layout, None))


def _split(batch: Any, pieces: int) -> Any:
    """[B, …] → [pieces, B/pieces, …]; piece i takes rows i, i + pieces, …, so that rows stay on
    their devices."""

    def leaf(x: Array) -> Array:
        if x.shape[0] % pieces:
            raise ValueError(f"{x.shape[0]} rows % microbatches={pieces}: must be 0")
        return jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0)

    return jax.tree.map(leaf, batch)


def _accumulate(value_and_grad: Any, pieces: Any) -> Any:
    """Sum over pieces, one at a time, from nothing, so that one piece's program is all there is."""

    def add(total: Any, piece: Any) -> tuple[Any, None]:
        value, metrics, grads = value_and_grad(piece)
        both = {name: combine(name, total[1][name], metrics[name]) for name in metrics}
        return (total[0] + value, both, jax.tree.map(jnp.add, total[2], grads)), None

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), pieces)
    value, metrics, grads = jax.eval_shape(value_and_grad, first)
    start = {name: nothing(name, x) for name, x in metrics.items()}
    zeros = jax.tree.map(jnp.zeros_like, (value, grads))
    return jax.lax.scan(add, (zeros[0], start, zeros[1]), pieces)[0]


def nothing(name: str, x: Any) -> Array:
    """A metric of no rows, of x's shape and dtype: what ``combine`` takes no notice of."""
    least, most = -jnp.inf, jnp.inf
    if not jnp.issubdtype(x.dtype, jnp.floating):
        least, most = jnp.iinfo(x.dtype).min, jnp.iinfo(x.dtype).max
    return jnp.full(x.shape, {"_max": least, "_min": most}.get(name[-4:], 0), x.dtype)


def combine(name: str, left: Array, right: Array) -> Array:
    """How a metric of two parts becomes that of the whole: by its name."""
    if name.endswith("_max"):
        return jnp.maximum(left, right)
    return jnp.minimum(left, right) if name.endswith("_min") else left + right


def _apply(
    tx: optax.GradientTransformation, state: TrainState, value: Array, metrics: Metrics, grads: Any
) -> tuple[TrainState, Metrics]:
    """The optimizer's step, unless the loss or a gradient is not finite."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)

    def step(_: None) -> tuple[Params, Any]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(finite, step, lambda _: (state.params, state.opt_state), None)
    taken = finite.astype(jnp.int32)
    state = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + taken,
        skipped=(state.skipped + 1) * (1 - taken),
    )
    return state, {**metrics, "loss": value, "grad_norm": norm, "skipped": 1.0 - taken}
